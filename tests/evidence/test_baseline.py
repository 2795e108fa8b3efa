import numpy as np
import pytest
import torch

from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.evidence.buffers import EndStatistics
from deepspeed_sentinel.evidence.probe import Probe
from deepspeed_sentinel.evidence.table import SENT
from deepspeed_sentinel.kernels.sliced_wasserstein import DIRECTIONS, QUANTILES
from deepspeed_sentinel.mesh import FORWARD, Mesh

END, HIDDEN, CPU = (FORWARD, SENT), 16, torch.device("cpu")
ALL = np.ones(4, bool)
LARGEST = np.full(4, 5.0)


def summaries(seed=0):
    return torch.randn(4, HIDDEN + DIRECTIONS * QUANTILES, generator=torch.Generator().manual_seed(seed))


def message(seed=9):
    values = summaries(seed)
    return EndStatistics(values[:1, :HIDDEN], values[:1, HIDDEN:], torch.ones(1, 3))


@pytest.mark.parametrize("liar", range(4))
@pytest.mark.parametrize("lie", [float("nan"), float("inf"), 1e30, -1e30, 11.0])
def test_a_mean_that_no_message_of_its_size_can_have_changes_nothing_and_is_named(lie, liar):
    told, without = Baselines(0.9, 0.8), Baselines(0.9, 0.8)
    for step in range(3):
        values = summaries(step)
        without.learn(END, values, np.arange(4) != liar, LARGEST)
        values[liar, 3] = lie
        assert told.learn(END, values, ALL, LARGEST).tolist() == [replica == liar for replica in range(4)]
    assert torch.equal(told.distances(END, message()), without.distances(END, message()))


def test_who_is_not_clean_or_sent_nothing_but_zeros_is_not_named():
    baselines, values = Baselines(0.9, 0.8), summaries()
    values[1] = float("nan")
    assert not baselines.learn(END, values, np.array([True, False, True, True]), LARGEST).any()
    assert not baselines.learn(END, summaries(), ALL, np.zeros(4)).any()
    honest = summaries().clamp(-5.0, 5.0)
    assert not baselines.learn(END, honest, ALL, LARGEST).any()
    projections_may_be_longer = honest.clone()
    projections_may_be_longer[:, HIDDEN:] = 4.0 * 5.0
    assert not baselines.learn(END, projections_may_be_longer, ALL, LARGEST).any()


def test_a_single_replica_that_miscalculates_learns_nothing_from_it():
    baselines = Baselines(0.9, 0.8)
    one, clean = summaries()[:1], np.array([True])
    baselines.learn(END, one, clean, LARGEST[:1])
    before = baselines.state_dict()["average_0_0"]
    assert baselines.learn(END, torch.full_like(one, float("nan")), clean, LARGEST[:1]).tolist() == [True]
    assert torch.equal(baselines.state_dict()["average_0_0"], before)


def test_what_a_checkpoint_holds_that_is_not_finite_is_found_and_left_out():
    baselines = Baselines(0.9, 0.8)
    for end in (END, (FORWARD, 1)):
        baselines.learn(end, summaries(), ALL)
    state = baselines.state_dict()
    assert Baselines.spoilt(state) == ()
    state["average_0_1"][7] = float("nan")
    assert Baselines.spoilt(state) == ((FORWARD, 1),)
    restored = Baselines(0.9, 0.8)
    restored.load_state_dict(state, CPU, without=((FORWARD, 1),))
    assert torch.equal(restored.distances(END, message()), baselines.distances(END, message()))
    assert restored.distances((FORWARD, 1), message()).isnan().all()
    restored.learn((FORWARD, 1), summaries(), ALL)
    assert restored.distances((FORWARD, 1), message()).isfinite().all()


@pytest.mark.parametrize("left", [1e38, -1e19, 1e6, float("nan")])
def test_what_a_fault_leaves_in_an_average_is_gone_after_a_step(left):
    """One of the two copies of a baseline has a bit flipped; what its end reports must soon agree with the other's."""
    one, other = Baselines(0.9, 0.8), Baselines(0.9, 0.8)
    usual = summaries(7)[:1]

    def learn(step):
        for copy in (one, other):
            copy.learn(END, usual + 0.1 * summaries(step), ALL, LARGEST)

    for step in range(50):
        learn(step)
    one._averages[END][3] = left
    for step in range(50, 53):
        learn(step)
    near = usual + 0.1 * summaries(99)[:1]
    of_both = [
        copy.distances(END, EndStatistics(near[:, :HIDDEN], near[:, HIDDEN:], torch.ones(1, 3)))
        for copy in (one, other)
    ]
    assert (of_both[0].log() - of_both[1].log()).abs()[:, :2].max() < 0.3


def test_only_what_can_be_a_state_is_one():
    baselines = Baselines(0.9, 0.8)
    assert Baselines.holds(baselines.state_dict())
    baselines.learn(END, summaries(), ALL)
    state = baselines.state_dict()
    assert Baselines.holds(state)
    for spoilt in (
        None,
        {name: value for name, value in state.items() if not name.startswith("count")},
        {**state, "average_0_0": state["average_0_0"].double()},
        {**state, "average_0_0": state["average_0_0"][None]},
        {**state, "count_0_0": -1},
        {**state, "count_0_0": 10**400},
        {**state, "count_0_0": True},
    ):
        assert not Baselines.holds(spoilt)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("least", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
def test_masks_whose_sums_overflow_name_nobody(least):
    """Additive masks of attention hold the least number that there is."""
    baselines, largest = Baselines(0.9, 0.8), np.full(3, -least)
    for step in range(3):
        shares = []
        for replica in range(3):
            mask = torch.zeros(4, 1, 16, 16)
            mask[..., 9 + replica + step :] = least
            probe = Probe(Mesh(4, 3), 1, CPU, 0)
            probe.begin_step(1)
            probe.observe(END, 0, (mask,))
            probe.next_micro_batch(END)
            shares.append(baselines.summary(END, probe.end_statistics(END, 1.0)))
        assert not baselines.learn(END, torch.stack(shares), ALL[:3], largest).any()
    lie = torch.stack(shares)
    lie[1] = float("nan")
    assert baselines.learn(END, lie, ALL[:3], np.array([-least, 5.0, -least])).tolist() == [False, True, False]
