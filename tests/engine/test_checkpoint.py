"""What a checkpoint holds that cannot be taken over is told in words, whatever it is: never an error of its own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepspeed_sentinel.engine import checkpoint
from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.judgement.judge import Judge, JudgeSettings
from deepspeed_sentinel.mesh import Mesh, Worker

SHAPE = {"stages": 3, "replicas": 3, "fence_window": 64, "strike_window": 20}
SETTINGS = JudgeSettings("exclude", 20, 64, 3.0, 0.005, 3, 20, "proof", 30, 5, 0)


def judge(parts=1):
    return Judge(Mesh(3, 3), SETTINGS, parts)


def good():
    return {
        "shape": {**SHAPE, "parts": 1},
        "judge": checkpoint.to_tensors(judge().state_dict()),
        "evidence": {"baselines": {"0": Baselines(0.9, 0.8).state_dict()}},
    }


def sentinel(stage=0):
    return SimpleNamespace(
        worker=Worker(stage, 0),
        state_shape=lambda: SHAPE,
        problem=lambda state, parts: judge(parts).problem(checkpoint.to_arrays(state.get("judge"))),
    )


def test_what_was_saved_is_taken_over():
    assert checkpoint._problem(good(), sentinel()) is None
    elsewhere = good()
    del elsewhere["judge"]
    assert checkpoint._problem(elsewhere, sentinel(stage=1)) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("shape"),
        lambda state: state.update(shape=3),
        lambda state: state["shape"].update(replicas=4),
        lambda state: state["shape"].update(parts="many"),
        lambda state: state["shape"].update(parts=2),
        lambda state: state["shape"].update(parts=True),
        lambda state: state["shape"].update(stages=3.0),
        lambda state: state["shape"].update(stages=torch.zeros(2)),
        lambda state: state.pop("judge"),
        lambda state: state.update(judge=torch.zeros(3)),
        lambda state: state["judge"].pop("content"),
        lambda state: state["judge"]["cusum"].update(sums="none"),
        lambda state: state["judge"]["cusum"]["sums"].fill_(np.nan),
        lambda state: state["judge"]["cusum"].update(sums=state["judge"]["cusum"]["sums"].bfloat16()),
        lambda state: state["judge"]["cusum"].update(sums=state["judge"]["cusum"]["sums"].requires_grad_()),
        lambda state: state["judge"]["fences"]["reach"].fill_(np.inf),
        lambda state: state.pop("evidence"),
        lambda state: state["evidence"].update(baselines=[]),
        lambda state: state["evidence"]["baselines"].update(one={}),
        lambda state: state["evidence"]["baselines"]["0"].update(average_0_0=torch.zeros(5)),
    ],
)
def test_what_cannot_be_taken_over_is_told(spoil):
    state = good()
    spoil(state)
    assert isinstance(checkpoint._problem(state, sentinel()), str)


@pytest.mark.parametrize("state", [None, [], 3, {}])
def test_what_is_no_state_at_all_is_told(state):
    assert isinstance(checkpoint._problem(state, sentinel()), str)


def deep(depth=2000):
    nested = []
    for _ in range(depth):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.update(columns=deep()),
        lambda state: state["shape"].update(stages=10**5000),
        lambda state: state["evidence"]["baselines"]["0"].update(
            average_0_0=torch.zeros(5, device="meta"), count_0_0=1
        ),
        lambda state: state["evidence"]["baselines"]["0"].update(average_0_0=torch.zeros(5).to_sparse(), count_0_0=1),
    ],
    ids=["deep", "huge", "meta", "sparse"],
)
def test_what_cannot_even_be_looked_at_is_told(spoil):
    """Else this rank alone would end, and the others wait for its word."""
    state, reader = good(), sentinel()
    reader.spoilt_links = lambda state: [Baselines.spoilt(one) for one in state["evidence"]["baselines"].values()]
    spoil(state)
    problem, spoilt = checkpoint._looked_at(state, reader)
    assert isinstance(problem, str) and not spoilt
