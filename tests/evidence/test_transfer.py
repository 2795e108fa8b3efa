import numpy as np
import pytest
import torch

from deepspeed_sentinel.evidence.table import NAMES, OF_PAIR
from deepspeed_sentinel.evidence.transfer import LASTING, NEXT, Sketches, Transfers, lessons, pair_rows
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS
from deepspeed_sentinel.mesh import BACKWARD, FORWARD

END = (FORWARD, 0)
PAIR_NAMES = [name for name, of_pair in zip(NAMES, OF_PAIR, strict=True) if of_pair]
COSINE, CORRELATION, SLOPE = (
    PAIR_NAMES.index(name) for name in ("transfer_cosine", "prediction_correlation", "prediction_slope")
)
CLEAN = np.array(True)


class Stage:
    """A residual stage whose change is linear in what enters, with a little noise: what W can learn exactly."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.w_KK = 0.05 * self._normal(DIMENSIONS, DIMENSIONS)

    def _normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def messages(self, *groups, micro_batches=3, tokens=200):
        entering = self._normal(*groups, micro_batches, tokens, DIMENSIONS) + 2.0
        leaving = entering + entering @ self.w_KK + 0.01 * self._normal(*entering.shape)
        return entering, leaving


def sketches(values, jobs=2):
    """The same in all projections."""
    return Sketches(values.expand(jobs, *values.shape), torch.linalg.vector_norm(values.double(), dim=-1).float())


def lesson(entering, leaving):
    return lessons(sketches(entering, 1), sketches(leaving, 1))[0].mean(-2)


def teach(transfers, stage, steps, which=LASTING):
    for _ in range(steps):
        transfers.learn(END, lesson(*stage.messages()), CLEAN, which)


def rows(transfers, entering, leaving):
    return pair_rows(sketches(entering), sketches(leaving), transfers.known(END))[0]


def test_before_anything_is_learnt_predictions_are_not_available():
    entering, leaving = Stage().messages()
    found = rows(Transfers(0.9, 0.8), entering, leaving)
    missing = torch.isnan(found).all(0)
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
    torch.testing.assert_close(found[..., SLOPE], torch.ones(3), atol=0.1, rtol=0)
    assert transfers.known((BACKWARD, 0)) is None


def test_memory_is_of_the_lasting_projection_and_the_rest_of_the_fresh_one():
    transfers, stage = Transfers(0.9, 0.8), Stage()
    teach(transfers, stage, 6)
    entering, leaving = stage.messages()
    honest = rows(transfers, entering, leaving)[0]
    flipped = [torch.stack([-leaving, leaving]), torch.stack([leaving, -leaving])]
    norms = torch.linalg.vector_norm(leaving, dim=-1)
    known = transfers.known(END)
    in_fresh, in_lasting = (
        pair_rows(sketches(entering), Sketches(both, norms), known)[0][0] - honest for both in flipped
    )
    changed = [
        [PAIR_NAMES[i] for i in np.flatnonzero(difference.abs() > 1e-4)] for difference in (in_fresh, in_lasting)
    ]
    assert changed[0] == ["transfer_cosine", "transfer_step"]
    assert changed[1] == ["cross_moment", "prediction_correlation", "prediction_slope"]


def test_a_skipped_stage_a_flip_and_another_tokens_message_stand_out():
    transfers, stage = Transfers(0.9, 0.8), Stage()
    teach(transfers, stage, 6)
    entering, leaving = stage.messages()
    honest = rows(transfers, entering, leaving)
    passed_through = rows(transfers, entering, entering + 0.01 * stage._normal(*entering.shape))
    assert (passed_through[..., CORRELATION].abs() < 0.2).all()
    assert (rows(transfers, entering, -leaving)[..., COSINE] < -0.9).all()
    shuffled = rows(transfers, entering, leaving.roll(7, dims=1))
    assert (shuffled[..., COSINE] < honest[..., COSINE] - 0.1).all()


def test_groups_learn_apart_and_only_where_they_are_clean():
    together = Transfers(0.9, 0.8)
    alone = [Transfers(0.9, 0.8) for _ in range(3)]
    stage, clean = Stage(), np.array([[True, True, False], [True, False, False], [True, True, False]])
    for step in range(3):
        lesson_XV = lesson(*stage.messages(3))
        together.learn(END, lesson_XV, clean[step])
        for group in range(3):
            alone[group].learn(END, lesson_XV[group], clean[step, group])
    known = together.known(END)
    for group in (0, 1):
        one = alone[group].known(END)
        torch.testing.assert_close(known.expected_K[group], one.expected_K)
        torch.testing.assert_close(known.w_KK[group], one.w_KK)
    assert known.expected_K[2].isnan().all() and not known.w_KK[2].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_lesson_that_is_not_finite_is_never_learnt(bad):
    transfers, stage = Transfers(0.9, 0.8), Stage()
    teach(transfers, stage, 3)
    before, spoilt = transfers.known(END), lesson(*stage.messages())
    spoilt[100] = bad
    transfers.learn(END, spoilt, CLEAN)
    after = transfers.known(END)
    torch.testing.assert_close(after.w_KK, before.w_KK)
    torch.testing.assert_close(after.expected_K, before.expected_K)


def test_what_was_learnt_ages_in_steps_that_teach_nothing():
    """A stage that changed meanwhile is known as it is soon after it is learnt from again."""
    gaps, stages, aged = (0, 20), (Stage(0), Stage(1)), []
    for gap in gaps:
        transfers = Transfers(0.9, 0.8)
        teach(transfers, stages[0], 20)
        for _ in range(gap):
            transfers.learn(END, lesson(*stages[0].messages()), np.array(False))
        teach(transfers, stages[1], 3)
        aged.append(float(rows(transfers, *stages[1].messages())[..., CORRELATION].min()))
    assert aged[1] > 0.9 > aged[0] + 0.1


@pytest.mark.parametrize("size", [1e30, 1e12, 1e-12, 1e-30])
def test_an_absurd_message_weighs_no_more_than_any_other(size):
    stage = Stage()
    entering, leaving = stage.messages()
    for absurd in (
        lesson(entering, size * leaving),
        lesson(size * entering, leaving),
        lesson(size * entering, size * leaving),
    ):
        assert absurd.isfinite().all() and (absurd.abs() <= 1.0 + 1e-5).all()
    transfers = Transfers(0.9, 0.8)
    teach(transfers, stage, 8)
    transfers.learn(END, lesson(entering, size * leaving), CLEAN)
    teach(transfers, stage, 20)
    assert (rows(transfers, *stage.messages())[..., CORRELATION] > 0.9).all()


def test_however_large_the_values_the_map_is_the_same():
    one, other, stage = Transfers(0.9, 0.8), Transfers(0.9, 0.8), Stage()
    for _ in range(4):
        entering, leaving = stage.messages()
        one.learn(END, lesson(entering, leaving), CLEAN)
        scale = torch.tensor([1.0, 1e4, 1e-4]).view(3, 1, 1)
        other.learn(END, lesson(entering * scale, leaving * scale), CLEAN)
    torch.testing.assert_close(one.known(END).w_KK, other.known(END).w_KK, rtol=1e-3, atol=1e-4)


def test_the_next_projection_takes_over_with_what_was_learnt_in_it():
    transfers, old, new = Transfers(0.9, 0.8), Stage(0), Stage(1)
    teach(transfers, old, 6)
    teach(transfers, new, 6, NEXT)
    assert (rows(transfers, *old.messages())[..., CORRELATION] > 0.95).all()
    transfers.renew(END, np.array(False), np.array(False))
    assert (rows(transfers, *old.messages())[..., CORRELATION] > 0.95).all()
    transfers.renew(END, np.array(True), np.array(False))
    assert (rows(transfers, *new.messages())[..., CORRELATION] > 0.95).all()
    transfers.renew(END, np.array(True), np.array(False))
    assert rows(transfers, *new.messages())[..., CORRELATION].isnan().all(), "nothing was learnt ahead since"


def test_what_is_stale_is_gone():
    transfers, stage = Transfers(0.9, 0.8), Stage()
    teach(transfers, stage, 6)
    teach(transfers, stage, 6, NEXT)
    transfers.renew(END, np.array(False), np.array(True))
    assert rows(transfers, *stage.messages())[..., CORRELATION].isnan().all()
    transfers.renew(END, np.array(True), np.array(False))
    assert rows(transfers, *stage.messages())[..., CORRELATION].isnan().all()
