"""Made-up evidence: lognormal statistics, so that tests can say exactly what is clean and what is not."""

import pickle
from functools import cache

import numpy as np

from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import BY_JUDGE, NAMES, OF_PAIR
from deepspeed_sentinel.judgement.judge import Judge, JudgeSettings
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker

MICRO_BATCHES = 4
# As an honest residual stage shows them; the first and the last stage have none.
PAIR_VALUES = {
    "transfer_cosine": lambda noise: np.tanh(1.5 + 0.03 * noise),
    "transfer_gain": lambda noise: 0.1 + 0.01 * noise,
    "transfer_step": lambda noise: 0.4 * np.exp(0.05 * noise),
    "cross_moment": lambda noise: 0.05 * np.exp(0.1 * noise),
    "token_gram": lambda noise: np.clip(0.9 + 0.01 * noise, 0, 1),
    "prediction_correlation": lambda noise: np.tanh(0.9 + 0.03 * noise),
    "prediction_slope": lambda noise: 1.0 + 0.05 * noise,
}


def settings(**changes) -> JudgeSettings:
    defaults = {
        "action": "exclude",
        "warmup_steps": 20,
        "fence_window": 64,
        "fence_multiplier": 3.0,
        "target_false_positive_rate": 0.005,
        "strikes": 3,
        "strike_window": 20,
        "conviction": "statistics",
        "probation_steps": 30,
        "max_skipped_steps": 5,
        "seed": 0,
    }
    return JudgeSettings(**{**defaults, **changes})


class World:
    """Evidence of a mesh in which everybody is honest until a test changes the arrays."""

    def __init__(self, stages=4, replicas=3, seed=0, micro_batches=MICRO_BATCHES, **changes):
        self.mesh = Mesh(stages, replicas)
        self.judge = Judge(self.mesh, settings(**changes))
        self.micro_batches = micro_batches
        self.generator = np.random.default_rng(seed)
        self.time = 0

    def statistics(self):
        """[2 ends, 2, L, C, M, K], both ends alike."""
        reported = np.count_nonzero(~BY_JUDGE)
        shape = (2, self.mesh.links, self.mesh.replicas, self.micro_batches, reported)
        values = np.exp(0.1 * self.generator.standard_normal(shape) + 0.01 * self.time)
        values[..., NAMES.index("sign_flip")] = np.clip(0.2 + 0.02 * self.generator.standard_normal(shape[:-1]), 0, 1)
        values[..., NAMES.index("non_finite")] = 0
        spread = self.generator.standard_normal(shape)
        for name, pair in PAIR_VALUES.items():
            values[..., NAMES.index(name)] = pair(spread[..., NAMES.index(name)])
        values[FORWARD, 0][..., OF_PAIR[:reported]] = values[BACKWARD, -1][..., OF_PAIR[:reported]] = np.nan
        values = np.concatenate([values, np.zeros((*shape[:-1], len(NAMES) - reported))], axis=-1)
        return np.stack([values, values])

    def step(
        self,
        change=None,
        digests=None,
        overflow_limit=np.inf,
        served=None,
        tensors=1,
        twins=None,
        refused=False,
        keyed=None,
    ):
        values = self.statistics()
        marks = np.zeros((*values.shape[:5], tensors), np.int64)
        if change:
            change(values)
        if digests:
            digests(marks)
        reached = np.zeros(values.shape[1:5], np.int64)
        if keyed:
            keyed(reached)
        evidence = Evidence(self.mesh, self.time, values, marks, served, twins=twins, refused=refused, keyed=reached)
        verdict = self.judge.step(evidence, overflow_limit)
        self.time += 1
        return verdict

    def warm_up(self, steps=30):
        """Honest steps; worlds that begin alike share them, since most tests of this folder begin so."""
        if type(self) is not World:
            return [self.step() for _ in range(steps)]
        state = pickle.dumps((vars(self), steps))
        if state not in _WARMED:
            verdicts = [self.step() for _ in range(steps)]
            _WARMED[state] = pickle.dumps((vars(self.judge), self.generator, self.time, verdicts))
            return verdicts
        learnt, self.generator, self.time, verdicts = pickle.loads(_WARMED[state])
        vars(self.judge).update(learnt)
        return verdicts


_WARMED: dict[bytes, bytes] = {}


CULPRIT = Worker(1, 2)


def tamper(values):
    """What ``CULPRIT`` sends forward in a mesh of 4 x 3 stands out, and that of nobody else."""
    values[:, FORWARD, 1, 2, :, NAMES.index("energy")] *= 50


def blamed(step=0) -> Verdict:
    """Of a mesh of 4 x 3, after a warm-up, the n-th step (0 to 2) in which ``CULPRIT`` tampers and is blamed.

    By the third it is convicted.
    """
    return _three_blamed()[step]


@cache
def _three_blamed():
    world = World()
    world.warm_up()
    return tuple(world.step(tamper) for _ in range(3))
