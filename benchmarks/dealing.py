"""What healing costs until all bad workers are convicted, and how long one deal takes.

    python benchmarks/dealing.py --out benchmarks/results/dealing.json

No model is trained: bad workers act in every message, an alarm points at the first of each column, and twin steps are
judged by the real rules (``try_twins``, ``Unsettled``, ``Record``), drawn as likely as ``Record.suspicion`` says. That
is the best case of detection, so what is left is the price of dealing. Beside it stands what docs/wiring.md derives.
Columns lost are summed over the steps until the last conviction; partners are the most that a worker had over one link.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np

from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.judgement.proof import tried, try_twins
from deepspeed_sentinel.judgement.record import Record
from deepspeed_sentinel.judgement.trial import Trial
from deepspeed_sentinel.judgement.unsettled import Unsettled
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker
from deepspeed_sentinel.response.dealing import Dealer

STRIKES, WINDOW, PROBATION = 3, 20, 200
MESHES = ((5, 3, 1), (6, 4, 1), (8, 8, 2), (16, 8, 2), (22, 8, 2), (16, 8, 3), (22, 8, 3), (16, 16, 4), (16, 16, 6))
MOST_STEPS = 2000


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dealing.json"))
    return parser.parse_args(argv)


class Healing:
    """A run of which all is known but who is bad."""

    def __init__(self, mesh: Mesh, bad: np.ndarray, seed: int) -> None:
        self.mesh, self.bad = mesh, bad
        self.record = Record(mesh, STRIKES, WINDOW, PROBATION, by_proof=True, heals=True)
        self.unsettled, self.dealer = Unsettled(mesh, PROBATION), Dealer(mesh)
        self.generator = np.random.default_rng((seed, 7))
        self.met = np.zeros((mesh.links, mesh.replicas, mesh.replicas), bool)
        self.steps = self.skipped = self.lost = self.trials = 0

    def run(self) -> dict[str, int]:
        while (self.bad & ~self.record.convicted).any():
            assert self.steps < MOST_STEPS, "somebody is never convicted"
            self.step()
        return {
            "steps": self.steps,
            "skipped_steps": self.skipped,
            "lost_columns": self.lost,
            "twin_steps": self.trials,
            "partners": int(np.count_nonzero(self.met, axis=2).max()),
        }

    def step(self) -> None:
        mesh, wiring = self.mesh, self.dealer.wiring
        for link in range(mesh.links):
            self.met[link, wiring[link], wiring[link + 1]] = True
        by_column = np.take_along_axis(self.bad, wiring, 1)
        lost = by_column.any(0)
        struck = np.zeros_like(self.bad)
        trial = None
        if self.generator.random() < self.record.suspicion:
            trial = self.trial(wiring, by_column)
            lost = lost | trial.spoilt
            self.trials += 1
        else:
            for column in np.flatnonzero(lost).tolist():
                stage = int(np.argmax(by_column[:, column]))
                struck[stage, wiring[stage, column]] = True
        nothing = np.zeros((2, mesh.links, mesh.replicas), bool)
        found = self.unsettled.step(wiring, nothing, nothing, trial, self.record.convicted)
        proved = tuple(one.worker for one in found)
        shown = tried(mesh, trial, proved) if trial or proved else None
        self.record.update(struck, nothing[0], shown, doubted=self.unsettled.doubted)
        convicted = self.record.convicted.copy()
        assert not (convicted & ~self.bad).any()
        record = self.record
        doubts = Doubts(convicted, record.suspects, record.accused, record.untried, self.unsettled.pairs(convicted))
        self.dealer.next(self.steps, doubts)
        self.steps += 1
        self.skipped += bool(lost.all())
        self.lost += int(np.count_nonzero(lost))

    def trial(self, wiring: np.ndarray, by_column: np.ndarray) -> Trial:
        """Bad workers send something of their own forward; honest work is the same of the same."""
        mesh = self.mesh
        own = wiring + 1
        state = np.zeros(mesh.replicas, np.int64)
        digests = np.zeros((2, mesh.links, mesh.replicas, 1, 1), np.int64)
        gradients = np.zeros((mesh.stages, mesh.replicas), np.int64)
        for direction, stages in ((FORWARD, range(mesh.links)), (BACKWARD, range(mesh.links, 0, -1))):
            for stage in stages:
                altered = by_column[stage] if direction == FORWARD else np.zeros_like(by_column[stage])
                state = (state * 31 + np.where(altered, own[stage], 0) * 7919 + 1) % (1 << 40)
                digests[direction, stage if direction == FORWARD else stage - 1, :, 0, 0] = state + 1
        for stage in range(mesh.stages):
            gradients[stage, wiring[stage]] = state + 1
        given, ones = np.ones(mesh.replicas, bool), np.ones(gradients.shape)
        twins = Twins(0, given, gradients, ones, np.zeros(gradients.shape, np.int64))
        measures = np.ones((2, *digests.shape[:4], 1))
        disputed = np.zeros(digests.shape[:4], bool)
        record = self.record
        return try_twins(
            mesh, digests, measures, disputed, twins, wiring, record.convicted, record.accused, record.unlike
        )


def expected(mesh: Mesh, a_stage: int, chance: float = 0.5) -> dict[str, float]:
    """Steps and columns lost as docs/wiring.md derives them."""
    replicas, bad = mesh.replicas, (mesh.stages - 2) * a_stage
    most = (replicas - 1) // 2
    left, rounds, packed = float(bad), 0.0, 0.0
    while left > 0:
        # In the order of the flow, so whole stages come first.
        lost = min(a_stage, bad - left)
        parallel = max(1, replicas - lost - most - 1)
        trials = 1.0 if replicas - lost - parallel > most else most + 1.0
        rounds += trials
        left -= parallel
        packed += trials / chance * lost
    each = sum((1.0, 1.0 / chance))
    twice = 0.0 if replicas > 3 else (bad - 1) * most / chance
    return {"steps": 1 + rounds / chance, "lost_columns": bad * each + twice + packed}


def deal_64() -> list[dict[str, float | int]]:
    """Milliseconds of one deal, 64 stages x 64 replicas, from DeepSpeed's own wiring and when all stand well."""
    mesh, generator, results = Mesh(64, 64), np.random.default_rng(0), []
    for convicted_share, suspects in ((0.0, 4), (0.25, 8), (0.25, 64), (0.45, 64)):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(20):
            convicted = generator.random((64, 64)) < convicted_share
            convicted[[0, -1]] = False
            suspected = np.zeros_like(convicted)
            suspected[generator.integers(1, 63, suspects), generator.integers(0, 64, suspects)] = True
            suspected &= ~convicted
            nobody = np.zeros_like(convicted)
            free = [Worker(*place) for place in np.argwhere(suspected).tolist()]
            apart = tuple((one, other) for one, other in pairwise(free) if other.stage - one.stage < 3)
            dealer, doubts = Dealer(mesh), Doubts(convicted, suspected, suspected, nobody, apart)
            for measured in times:
                begin = time.process_time()
                dealer.next(0, doubts)
                measured.append(1e3 * (time.process_time() - begin))
        results.append(
            {
                "convicted_share": convicted_share,
                "suspects": suspects,
                "milliseconds": statistics.median(times[0]),
                "milliseconds_at_rest": statistics.median(times[1]),
            }
        )
    return results


def deal_of_pairs() -> list[dict[str, float | int]]:
    """Milliseconds of one deal, 64 x 64, where 33 workers of each of some stages are at odds with one another."""
    mesh, results = Mesh(64, 64), []
    for stages in (1, 16, 61):
        places = [[Worker(stage, replica) for replica in range(33)] for stage in range(1, stages + 1)]
        apart = tuple(pair for of_stage in places for pair in combinations(of_stage, 2))
        packed, suspects, nobody = (np.zeros((64, 64), bool) for _ in range(3))
        packed[62, :31] = suspects[1 : stages + 1, :33] = True
        doubts, begin = Doubts(packed, suspects, suspects, nobody, apart), time.process_time()
        Dealer(mesh).next(0, doubts)
        results.append({"stages_with_pairs": stages, "milliseconds": 1e3 * (time.process_time() - begin)})
    return results


def main(arguments: argparse.Namespace) -> None:
    results = []
    for stages, replicas, a_stage in MESHES:
        mesh = Mesh(stages, replicas)
        runs = []
        for seed in range(arguments.seeds):
            generator = np.random.default_rng(seed)
            bad = np.zeros((stages, replicas), bool)
            for stage in range(1, stages - 1):
                bad[stage, generator.permutation(replicas)[:a_stage]] = True
            runs.append(Healing(mesh, bad, seed).run())
        mean = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
        derived = expected(mesh, a_stage)
        results.append({"stages": stages, "replicas": replicas, "bad_a_stage": a_stage, **mean, "derived": derived})
        print(
            f"{stages:2} x {replicas:2}, {a_stage} bad a stage: {mean['steps']:6.1f} steps (derived "
            f"{derived['steps']:.0f}), {mean['skipped_steps']:4.1f} skipped, {mean['lost_columns']:6.1f} columns lost "
            f"(derived {derived['lost_columns']:.0f}), {mean['twin_steps']:5.1f} twin steps, "
            f"{mean['partners']:.1f} partners",
            flush=True,
        )
    deals, of_pairs = deal_64(), deal_of_pairs()
    for deal in (*deals, *of_pairs):
        print(deal)
    document = {
        "what": __doc__,
        "seeds": arguments.seeds,
        "healing": results,
        "dealing_64_x_64": deals,
        "of_pairs": of_pairs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse())
