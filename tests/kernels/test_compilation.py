"""Every kernel and dtype, compiled ahead of time for GPUs that are not there: no spills, the same order of sums."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from deepspeed_sentinel.kernels import (
    baseline_distances,
    message_statistics,
    message_stream,
    observe_message,
    sliced_wasserstein,
    tensor_digest,
    token_sketch,
    transfer_kernel,
    transfer_statistics,
)
from deepspeed_sentinel.kernels.dispatch import INTERPRETED, LAUNCH
from deepspeed_sentinel.kernels.keyed_digest import DigestKey
from integration_tests.variants import some

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    "seeds_ptr": "*i64",
    "words_ptr": "*i32",
    "digest_ptr": "*i32",
    "key_ptr": "*i64",
    "keyed_ptr": "*i64",
    "clean_ptr": "*i1",
}
FLOATS = ("correction", "decay", "rest", "unit")
# Arguments that are 1 in practice, which Triton compiles in; the other integers are multiples of 16.
ONES = ("stride_d", "copy_stride_d", "stride_k", "sketch_k", "norms_m", "e_k", "l_k", "en_m", "ln_m", "stride_v")
LANES = {"bf16": 1024, "fp16": 1024, "fp32": 512}
KINDS = tuple(LANES)

KEYLESS = {"KEYED": False, "key_ptr": None, "keyed_ptr": None}
STREAM = {
    kind: {"KIND": kind, "COPY": False, "FULL": True, "BT": 8, "BD": lanes, "KEYED": True}
    for kind, lanes in LANES.items()
}
KERNELS = {
    **{f"stream-{kind}": (message_stream._stream_kernel, STREAM[kind], 4) for kind in KINDS},
    **{f"stream-{kind}-keyless": (message_stream._stream_kernel, {**STREAM[kind], **KEYLESS}, 4) for kind in KINDS},
    "reduce": (message_statistics._reduce_kernel, {"BLOCK": message_stream.REDUCED, "KEYED": True}, 4),
    **{f"sketch-{kind}": (token_sketch._sketch_kernel, {"KIND": kind, **token_sketch.SHAPE}, 4) for kind in KINDS},
    **{
        f"observe-{kind}": (
            observe_message._observe_kernel,
            {"KIND": kind, "KEYED": True, "BLOCK": message_stream.REDUCED, **token_sketch.SHAPE},
            4,
        )
        for kind in KINDS
    },
    "quantiles": (
        sliced_wasserstein._quantiles_kernel,
        sliced_wasserstein.SHAPE,
        4,
    ),
    "distances": (baseline_distances._distances_kernel, {"BLOCK": baseline_distances.BLOCK}, 4),
    "update": (baseline_distances._update_kernel, {"BV": 256, "BR": 8}, 4),
    "transfer": (transfer_kernel.transfer_kernel, transfer_kernel.SHAPE, transfer_kernel.WARPS),
    **{
        f"digest-{kind}": (
            tensor_digest._digest_kernel,
            {"BR": 128, "BC": 1024, "GROUP": 8, "KEYED": True, "WIDE": kind == "i32"},
            4,
        )
        for kind in ("u8", "i16", "i32")
    },
}
# What messages of unusual shapes make of the arguments: no multiples of 16, no unit stride, indices beyond 32 bits.
UNUSUAL = {
    "stream-bf16": {"COPY": True, "FULL": False, "stride_d": "i64", "hidden": "i32", "tokens": "i64"},
    "stream-fp32": {"COPY": True, "FULL": False, "tokens": 1, "hidden": 1},
    "observe-fp16": {"stride_d": "i64", "hidden": "i32", "tokens": "i64", "rows": "i32"},
    "observe-bf16": {"tokens": 1, "hidden": 1, "rows": 1, "groups": 1, "programs": 1},
    "quantiles": {"tokens": "i32"},
    "distances": {"hidden": 1, "quantiles": "i32"},
    "update": {"replicas": 1, "BR": 2, "values": "i32"},
    "transfer": {"tokens": "i32", "en_m": "i32"},
}


@cache
def build(name, target, unusual=False):
    kernel, constants, warps = KERNELS[name]
    given = {**constants, **(UNUSUAL[name] if unusual else {})}
    signature, constexprs, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        kind = given.get("KIND", "fp32")
        if argument in given and not str(given[argument]).startswith("i"):
            signature[argument], constexprs[argument] = "constexpr", given[argument]
        elif argument in given:
            signature[argument] = given[argument]
        elif argument == "bits_ptr":
            signature[argument] = f"*{name.removeprefix('digest-')}"
        elif argument in ("x_ptr", "copy_ptr"):
            signature[argument] = "*i32" if kind == "fp32" else "*i16"
        elif argument.endswith("_ptr"):
            signature[argument] = POINTERS.get(argument, "*fp32")
        elif argument in FLOATS:
            signature[argument] = "fp32"
        elif argument in ONES:
            signature[argument], constexprs[argument] = "constexpr", 1
        else:
            signature[argument] = "i32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        if signature[argument].startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": warps, **LAUNCH})


def spills(compiled, target, folder):
    """Bytes or registers that do not fit into the register file, as the assembler reports them."""
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        return [int(re.search(rf"\.{kind}_spill_count:\s+(\d+)", text)[1]) for kind in ("sgpr", "vgpr")]
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    reported = re.findall(r"(?:STACK|LOCAL):(\d+)", done.stdout)
    assert len(reported) >= 2
    return [int(size) for size in reported]


# A kernel has one body for all its kinds. The other kinds, and the other generations, are `make test-all`'s.
NVIDIA = [name for name in KERNELS if "fp16" not in name]
AMD = [
    name for name in NVIDIA if "fp32" not in name and "keyless" not in name and name not in ("digest-u8", "digest-i16")
]
EVERY_TIME = [("sm_90", name) for name in NVIDIA] + [("gfx942", name) for name in AMD]


@pytest.mark.parametrize(("target", "name"), some([(one, name) for one in TARGETS for name in KERNELS], EVERY_TIME))
def test_compiles_without_spills(name, target, tmp_path):
    assert set(spills(build(name, target), target, tmp_path)) == {0}


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("target", some(("sm_90", "gfx942"), ("sm_90",)))
def test_unusual_messages_compile(name, target, tmp_path):
    reported = spills(build(name, target, unusual=True), target, tmp_path)
    if target == "gfx942":
        reported = reported[1:]  # masks of ragged edges fill the scalar registers, which spill into lanes of others
    assert set(reported) == {0}


def order_of_sums(compiled):
    """Every reduction and matrix product with the layouts of its operands spelt out."""
    text = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.[^\n]*)$", text, re.MULTILINE))
    assert layouts
    operations = re.findall(r"^\s*\}\) : (\(tensor<.*?\) -> [^\n]*?)(?: loc.*)?$", text, re.MULTILINE)
    operations += re.findall(r"tt\.dot [^\n]*? : (tensor<[^\n]*?)(?: loc.*)?$", text, re.MULTILINE)
    return sorted(re.sub(r"#\w+(?![\w.])", lambda m: layouts.get(m[0], m[0]), operation) for operation in operations)


SUMMED = ("sm_80", "stream-bf16"), ("sm_80", "reduce"), ("sm_80", "distances"), ("sm_80", "transfer")


@pytest.mark.parametrize(
    ("target", "name"), some([(one, name) for one in ("sm_80", "sm_100") for name in KERNELS], SUMMED)
)
def test_sums_are_taken_in_the_same_order_on_every_nvidia_gpu(name, target):
    orders = [order_of_sums(build(name, one)) for one in ("sm_90", target)]
    assert orders[0] == orders[1]
    assert orders[0]
    # A product fused into a sum is rounded once less: whether that is done must not be left to the compiler. Matrix
    # products, of which transfer has five, are chains of fused operations by definition.
    for one in ("sm_90", target):
        ptx = build(name, one).asm["ptx"]
        assert name == "transfer" or not re.search(r"\bfma\.rn\.f32", ptx)


def compilations(monkeypatch, launch):
    """How many variants of each kernel a series of launches needs, by the key that Triton keeps them under."""
    variants = {}

    def record(kernel, *args, grid, warmup, **kwargs):
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS["sm_90"]))
        names = {name: kwargs.pop(name) for name in list(kwargs) if name not in kernel.arg_names}
        _, specialization, _ = bind(*args, **kwargs, **names)
        variants.setdefault(kernel.__name__, set()).add(str(specialization))

    monkeypatch.setattr(triton.JITFunction, "run", record)
    for module in (message_statistics, observe_message, sliced_wasserstein, transfer_statistics):
        monkeypatch.setattr(module, "runs_on_triton", lambda x: True)
    monkeypatch.setattr(tensor_digest, "runs_on_gpu", lambda x: True)
    launch()
    return {name: len(found) for name, found in variants.items()}


def test_messages_of_all_lengths_share_one_compilation(monkeypatch):
    seeds_J2, keys_K = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)

    def launch():
        for tokens in (1, 2, 5, 16, 33, 200, 256, 300, 512, 1000, 1024, 4096, 8192, 8200):
            rows = token_sketch.sketch_rows(tokens)
            x_TD = torch.zeros(tokens, 1024, dtype=torch.bfloat16)
            sums, scalars, digest = torch.zeros(1024), torch.zeros(3), torch.zeros(2, dtype=torch.int32)
            sketches, norms = torch.zeros(3, 4, 256, 64), torch.zeros(3, 4, 256)
            # Keys and digests are rows of the step's: of any alignment.
            keyed = DigestKey(keys_K[tokens % 4 :][:1]), torch.zeros(9, dtype=torch.int64)[tokens % 5 :][:1]
            message_statistics.message_statistics(x_TD, sums, scalars, digest, None, *keyed)
            observe_message.observe_message(
                x_TD, seeds_J2, sums, scalars, digest, sketches[:, 1, :rows], norms[:, 1, :rows], None, *keyed
            )
            tensor_digest.tensor_digest(torch.zeros(2, tokens, dtype=torch.bool), *keyed)
            sliced_wasserstein.sliced_wasserstein(sketches[0][:, :rows], 1024)
            pair = sketches[1:, :, :rows].flatten(0, -3), norms[0, :, :rows].expand(2, 4, -1).flatten(0, -2)
            transfer_statistics.transfer_statistics(pair[0], pair[0], pair[1], pair[1], torch.zeros(64, 64))

    counted = compilations(monkeypatch, launch)
    assert set(counted) == {
        "_stream_kernel",
        "_reduce_kernel",
        "_observe_kernel",
        "_digest_kernel",
        "_quantiles_kernel",
        "transfer_kernel",
    }
    assert set(counted.values()) == {1}, counted
