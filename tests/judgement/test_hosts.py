"""The same verdict on unlike hosts: another process, told that its CPU can do less, judges the same evidence."""

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
from synthetic import World

import deepspeed_sentinel
from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.judgement.judge import Judge
from deepspeed_sentinel.mesh import BACKWARD, FORWARD

STAGES, REPLICAS, MICRO_BATCHES, STEPS = 7, 7, 4, 80
ENERGY, GAIN, SLOPE = (NAMES.index(name) for name in ("energy", "transfer_gain", "prediction_slope"))
# numpy's own choice of code, and that of the C library for what numpy leaves to it
LESSER_HOSTS = {
    "NPY_DISABLE_CPU_FEATURES": " ".join(np._core._multiarray_umath.__cpu_dispatch__),
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F,-AVX2_Usable,-FMA_Usable",
}


def record(path):
    """Evidence of some hundred steps, float32 as ranks exchange it: clean ones, and all that a judge has to decide."""
    saved, synthetic.MICRO_BATCHES = synthetic.MICRO_BATCHES, MICRO_BATCHES
    world, generator = World(STAGES, REPLICAS, seed=11), np.random.default_rng(12)
    statistics, served = [], []
    for step in range(STEPS):
        world.time = step
        values = world.statistics()
        # each end measures against a baseline of its own
        values[0, ..., :4] *= 1 + 1e-3 * generator.standard_normal(values[0, ..., :4].shape)
        if step >= 30:
            values[:, FORWARD, 2, 3, :, GAIN] += 0.02  # adds up
        if step >= 45 and step % 4 == 0:
            values[:, BACKWARD, 3, 5, 1:4, ENERGY] *= 1.7  # about the fence, and what follows
            values[:, BACKWARD, :3, 5, 1:4, ENERGY] *= 40.0
        if step >= 66 and step % 2 == 0:
            values[:, FORWARD, 1, 4, :, ENERGY] *= 60.0  # far out, of one worker: a conviction
        if step % 17 == 16:
            values[1, FORWARD, 4, 1, 2, SLOPE] = np.nan  # a dispute
            values[:, FORWARD, 5, 6, 0, NAMES.index("non_finite")] = 7
        statistics.append(values.astype(np.float32))
        dealt = np.tile(np.arange(REPLICAS), (STAGES, 1))
        if step % 2:
            dealt[1:-1] = [generator.permutation(REPLICAS) for _ in range(STAGES - 2)]
        served.append(dealt)
    synthetic.MICRO_BATCHES = saved
    np.savez(path, statistics=np.stack(statistics), served=np.stack(served))


def judge_recorded(path):
    """Lines for the other process: what numpy's functions give here, then a digest and a hash of state each step."""
    probes = np.random.default_rng(0).uniform(0.01, 0.99, 200_000)
    lines = [hashlib.sha256(np.stack([np.log(probes), np.arctanh(probes), np.arcsin(probes)]).tobytes()).hexdigest()]
    recorded = np.load(path)
    mesh = synthetic.Mesh(STAGES, REPLICAS)
    judge = Judge(mesh, synthetic.settings())
    findings = disputes = 0
    for step, (values, served) in enumerate(zip(recorded["statistics"], recorded["served"], strict=True)):
        marks = np.zeros((*values.shape[:5], 1), np.int64)
        verdict = judge.step(Evidence(mesh, step, values.astype(np.float64), marks, served))
        findings, disputes = findings + len(verdict.findings), disputes + len(verdict.disputed)
        state = hashlib.sha256()
        arrays = [verdict.scores, verdict.worker_scores, *_leaves(judge.state_dict())]
        for array in arrays:
            # one NaN for all, and no negative zero: neither decides anything
            state.update(np.where(np.isnan(array), np.nan, array + 0.0).tobytes())
        lines.append(f"{verdict.digest()} {state.hexdigest()}")
    lines.append(f"{findings} findings, {disputes} disputes, {int(verdict.convicted.sum())} convicted")
    return lines


def _leaves(state):
    for name in sorted(state):
        yield from _leaves(state[name]) if isinstance(state[name], dict) else [np.asarray(state[name])]


@pytest.mark.slow
def test_unlike_hosts_come_to_the_same_verdicts_and_keep_the_same_state(tmp_path):
    path = tmp_path / "recorded.npz"
    record(path)
    plain = {name: value for name, value in os.environ.items() if name not in LESSER_HOSTS}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(path)],
            env={**plain, "OMP_NUM_THREADS": "1", **changes},
            stdout=subprocess.PIPE,
            text=True,
        )
        for changes in ({}, LESSER_HOSTS)
    ]
    here, there = (process.communicate(timeout=300)[0].splitlines() for process in processes)
    assert all(process.returncode == 0 for process in processes)
    if here[0] == there[0]:
        pytest.skip("numpy and the C library here compute the same whatever they are told of the CPU")
    differing = [step for step, pair in enumerate(zip(here[1:-1], there[1:-1], strict=True)) if pair[0] != pair[1]]
    assert len(here) == STEPS + 2 and not differing, f"first step that differs: {differing[0]} of {len(differing)}"
    told = [int(word) for word in here[-1].replace(",", "").split() if word.isdigit()]
    assert here[-1] == there[-1] and min(told) > 0, f"the recording should have held something to decide: {here[-1]}"


# What rounds correctly, is exact, or only looks, moves and orders.
ALLOWED = {
    *(
        "abs",
        "copysign",
        "sqrt",
        "maximum",
        "minimum",
        "fmax",
        "fmin",
        "clip",
        "floor",
        "ceil",
        "rint",
        "add",
        "subtract",
        "sign",
    ),
    *("isnan", "isfinite", "isinf", "nan_to_num", "nan", "inf", "finfo", "float32", "float64", "int64", "intp"),
    *("where", "argwhere", "flatnonzero", "nonzero", "count_nonzero", "argmax", "argmin", "argsort", "sort"),
    *("array", "asarray", "ascontiguousarray", "zeros", "ones", "full", "empty", "arange", "tile", "eye", "unique"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "stack", "concatenate", "split", "roll", "ndindex"),
    *("moveaxis", "broadcast_to", "broadcast_arrays", "expand_dims", "squeeze", "swapaxes", "transpose", "reshape"),
    *("take_along_axis", "put_along_axis", "array_equal", "logical_or", "logical_and", "logical_not", "cumsum", "isin"),
    *(
        "random",
        "indices",
        "errstate",
        "ndarray",
        "partition",
        "bool_",
        "integer",
        "bincount",
        "newaxis",
        "ix_",
        "shape",
    ),
}
# Of these a reduction has one result in any order.
ORDERLESS = {"maximum", "minimum", "fmax", "fmin", "logical_or", "logical_and"}
FORBIDDEN_METHODS = {"sum", "mean", "std", "var", "prod", "dot", "reduce", "trace"}
FORBIDDEN_MODULES = {"math", "cmath", "statistics", "scipy", "torch"}


def inexact(source):
    """What in a source may round differently on another host, as (line, what)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult | ast.Pow):
            constant = isinstance(node, ast.BinOp) and not any(
                isinstance(part, ast.Name | ast.Call) for part in ast.walk(node)
            )
            if not constant:
                found.append((node.lineno, type(node.op).__name__))
        elif isinstance(node, ast.Attribute):
            of_numpy = isinstance(node.value, ast.Name) and node.value.id == "np"
            if node.attr == "reduce" and isinstance(node.value, ast.Attribute) and node.value.attr in ORDERLESS:
                continue
            if (of_numpy and node.attr not in ALLOWED) or (not of_numpy and node.attr in FORBIDDEN_METHODS):
                found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, name) for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("pow", "sum"):
            found.append((node.lineno, node.func.id))
    return found


def deciding_files():
    package = Path(deepspeed_sentinel.__file__).parent
    of_evidence = (package / "evidence" / name for name in ("table.py", "step.py"))
    return [*sorted((package / "judgement").glob("*.py")), *of_evidence]


@pytest.mark.parametrize("path", deciding_files(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_decides_uses_nothing_that_rounds_differently_elsewhere(path):
    assert not inexact(path.read_text()), "see evidence/exact.py for what to use instead"


@pytest.mark.parametrize(
    "source",
    [
        *(
            "np.log(x)",
            "x @ y",
            "x ** 2",
            "x **= y",
            "x.mean()",
            "x.sum(-1)",
            "np.add.reduce(x)",
            "np.einsum('i,i', x, y)",
        ),
        *(
            "import math",
            "from statistics import NormalDist",
            "pow(x, 2)",
            "np.linalg.norm(x)",
            "import torch",
            "sum(x)",
        ),
    ],
)
def test_the_rule_sees_what_it_forbids(source):
    assert inexact(source)
    assert not inexact("x = 2.0**-10\nnp.count_nonzero(y > exact.total(z)) + np.sqrt(w)")


if __name__ == "__main__":
    print("\n".join(judge_recorded(sys.argv[1])))
