import numpy as np
import torch

from deepspeed_sentinel.evidence.table import NAMES, OF_PAIR
from deepspeed_sentinel.evidence.transfer import Sketches, Transfers
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS
from deepspeed_sentinel.mesh import BACKWARD, FORWARD

END = (FORWARD, 0)
PAIR_NAMES = [name for name, of_pair in zip(NAMES, OF_PAIR, strict=True) if of_pair]
COSINE, CORRELATION, SLOPE = (
    PAIR_NAMES.index(name) for name in ("transfer_cosine", "prediction_correlation", "prediction_slope")
)


class Stage:
    """A residual stage whose change is linear in what enters, with a little noise: what W can learn exactly."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.w_KK = 0.05 * self._normal(DIMENSIONS, DIMENSIONS)

    def _normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def messages(self, replicas=3, micro_batches=2, tokens=200):
        entering = self._normal(replicas, micro_batches, tokens, DIMENSIONS) + 2.0
        leaving = entering + entering @ self.w_KK + 0.01 * self._normal(*entering.shape)
        return entering, leaving


def sketches(values):
    return Sketches(values, torch.linalg.vector_norm(values, dim=-1))


def teach(transfers, stage, steps, clean=(True, True, True)):
    for _ in range(steps):
        entering, leaving = stage.messages()
        _, lessons = transfers.statistics(END, sketches(entering), sketches(leaving))
        transfers.learn(END, lessons.mean(1), np.array(clean))


def rows(transfers, entering, leaving):
    return transfers.statistics(END, sketches(entering), sketches(leaving))[0]


def test_before_anything_is_learnt_predictions_are_not_available():
    entering, leaving = Stage().messages()
    found = rows(Transfers(0.9, 0.8), entering, leaving)
    missing = torch.isnan(found).all(0).all(0)
    assert [name for name, gone in zip(PAIR_NAMES, missing, strict=True) if gone] == [
        "cross_moment",
        "prediction_correlation",
        "prediction_slope",
    ]
    assert torch.isfinite(found[..., ~missing]).all()


def test_the_map_that_a_stage_applies_is_learnt():
    transfers, stage = Transfers(0.9, 0.8), Stage()
    teach(transfers, stage, 6)
    found = rows(transfers, *stage.messages())
    assert (found[..., CORRELATION] > 0.95).all()
    torch.testing.assert_close(found[..., SLOPE], torch.ones(3, 2), atol=0.1, rtol=0)


def test_a_skipped_stage_a_flip_and_another_tokens_message_stand_out():
    transfers, stage = Transfers(0.9, 0.8), Stage()
    teach(transfers, stage, 6)
    entering, leaving = stage.messages()
    honest = rows(transfers, entering, leaving)
    passed_through = rows(transfers, entering, entering + 0.01 * stage._normal(*entering.shape))
    assert (passed_through[..., CORRELATION].abs() < 0.2).all()
    assert (rows(transfers, entering, -leaving)[..., COSINE] < -0.9).all()
    shuffled = rows(transfers, entering, leaving.roll(7, dims=2))
    assert (shuffled[..., COSINE] < honest[..., COSINE] - 0.1).all()


def test_it_learns_from_clean_replicas_alone_and_however_large_the_values():
    one, other = Transfers(0.9, 0.8), Transfers(0.9, 0.8)
    for step in range(4):
        entering, leaving = Stage(step).messages()
        _, lessons = one.statistics(END, sketches(entering), sketches(leaving))
        one.learn(END, lessons.mean(1), np.array([True, True, False]))
        scaled = torch.tensor([1.0, 1e4, 1.0]).view(3, 1, 1, 1)
        poisoned = torch.where(torch.tensor([0, 0, 1]).view(3, 1, 1, 1) == 1, 7.0, leaving)
        _, lessons = other.statistics(END, sketches(entering * scaled), sketches(poisoned * scaled))
        other.learn(END, lessons.mean(1), np.array([True, True, False]))
    entering, leaving = Stage(9).messages()
    torch.testing.assert_close(rows(one, entering, leaving), rows(other, entering, leaving), rtol=1e-3, atol=1e-4)
    before = rows(one, entering, leaving)
    one.learn(END, lessons.mean(1), np.zeros(3, bool))
    assert torch.equal(rows(one, entering, leaving), before)


def test_state_round_trip():
    transfers, stage = Transfers(0.9, 0.8), Stage()
    teach(transfers, stage, 3)
    restored = Transfers(0.9, 0.8)
    restored.load_state_dict(transfers.state_dict(), torch.device("cpu"))
    entering, leaving = stage.messages()
    assert torch.equal(rows(restored, entering, leaving), rows(transfers, entering, leaving))
    unknown = restored.statistics((BACKWARD, 0), sketches(entering), sketches(leaving))[0]
    assert torch.isnan(unknown[..., CORRELATION]).all()
