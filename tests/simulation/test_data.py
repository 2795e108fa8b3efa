"""What columns learn from, and the honest changes that training goes through."""

import numpy as np
import pytest
import torch

from deepspeed_sentinel import corpus
from deepspeed_sentinel.simulation.data import Contents, Text, prepare
from deepspeed_sentinel.simulation.kinds import KINDS, tokens
from deepspeed_sentinel.simulation.run import Simulation

TEXT, NOISE = -1, -2


def contents(change, steps, at=4, columns=4, seed=0):
    made = Contents(change, at, columns, seed)
    return np.array([made.next_step() for _ in range(steps)])


def test_without_a_change_each_column_draws_its_own_windows_of_the_text(options):
    some = options()
    text = Text(some)
    train = corpus.load(*prepare(some.size.vocabulary), "train")
    plain = [
        corpus.batches(train, seed=some.seed, replica=column, size=some.micro_batches, sequence=some.sequence)
        for column in range(some.replicas)
    ]
    for _ in range(3):
        ids, _ = text.next_step()
        for column, batches in enumerate(plain):
            assert torch.equal(ids[column].flatten(0, 1), next(batches)[0])


def test_each_column_has_its_kind_from_the_start():
    made = contents("kinds", 6)
    assert (made == made[0]).all() and len(set(made[0])) == 4


def test_columns_cross_one_after_the_other_and_stay():
    made = contents("crossing", 60)
    assert (made[:4] == TEXT).all()
    crossed = np.count_nonzero(made != TEXT, axis=1)
    assert crossed[[4, 15, 16, 28, 40, 59]].tolist() == [1, 1, 2, 3, 4, 4]
    assert len(set(made[-1])) == 1


def test_spells_begin_and_end():
    made = contents("spells", 300)
    assert (made[:4] == TEXT).all()
    share = np.count_nonzero(made[4:] != TEXT) / made[4:].size
    assert 0.1 < share < 0.6 and (made[-100:] == TEXT).any(0).all()


@pytest.mark.parametrize(("change", "columns"), [("spike", 1), ("spikes", 4)])
def test_a_batch_of_noise_in_one_step_of_ten(change, columns):
    noisy = np.count_nonzero(contents(change, 40) == NOISE, axis=1)
    assert np.flatnonzero(noisy).tolist() == [4, 14, 24, 34]
    assert set(noisy[noisy > 0]) == {columns}


def test_all_turn_at_once():
    made = contents("turn", 10)
    assert (made[:4] == TEXT).all() and len(set(made[4:].ravel())) == 1 and made[5, 0] in range(len(KINDS))


def test_kinds_are_the_same_tokens_every_time_and_differ_from_each_other(options):
    folder, tokenizer = prepare(options().size.vocabulary)
    counts = {}
    for kind in KINDS:
        made = tokens(folder, tokenizer, kind)
        assert np.array_equal(made, tokens(folder, tokenizer, kind)) and made.size > 50_000
        counts[kind] = np.bincount(made, minlength=256) / made.size
    for kind in KINDS:
        for other in KINDS:
            assert kind == other or np.abs(counts[kind] - counts[other]).sum() > 0.2, (kind, other)


def test_sequences_double(options):
    text = Text(options(change="sequence", change_at=2))
    assert [text.next_step()[0].shape[-1] for _ in range(4)] == [8, 8, 16, 16]


def test_the_learning_rate_jumps_and_static_columns_stay(options):
    simulation = Simulation(options(change="rate", change_at=5, guard="off"))
    rates, served = [], []
    for _ in range(7):
        rates.append(simulation.optimizer.param_groups[0]["lr"])
        simulation.step()
        served.append(simulation.served)
    base = simulation.options.size.learning_rate / 10
    assert rates == pytest.approx([base, 2 * base, 3 * base, 4 * base, 5 * base, 30 * base, 35 * base])
    assert all((one == np.arange(4)).all() for one in served)


def test_a_change_belongs_to_the_clean_run_too(options):
    """What a guarded run is compared with goes through the same data."""
    changed = options(change="kinds")
    assert changed.honest().change == "kinds"
