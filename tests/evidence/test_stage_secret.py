import numpy as np
import pytest
import torch
from everybody import everybodys_keys

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence.stage_secret import digest_keys, seal, stage_secret, unseal
from deepspeed_sentinel.mesh import Worker

RANKS = np.arange(6).reshape(3, 2)
KEYS = everybodys_keys(6, seed=None)


def opened(sealed, rank, keys=KEYS):
    return unseal(sealed, rank, keys[rank].secret_with(0))


def numbers(sealed, keys=KEYS):
    return [opened(sealed, rank, keys).number("test") for rank in range(6)]


def test_workers_of_a_stage_share_a_secret_that_no_other_stage_has():
    of_ranks = np.array(numbers(seal(RANKS, KEYS[0], None)))[RANKS]
    assert (of_ranks[:, 0] == of_ranks[:, 1]).all() and len(set(of_ranks[:, 0].tolist())) == 3


def test_no_other_rank_can_open_what_is_sealed_for_one():
    sealed = seal(RANKS, KEYS[0], None)
    for rank in range(1, 6):
        for other in range(1, 6):
            could = unseal(sealed, rank, KEYS[other].secret_with(0)) is not None
            assert could == (other == rank)


@pytest.mark.parametrize("place", [0, 31, 47])
def test_what_is_altered_on_its_way_cannot_be_opened(place):
    sealed = seal(RANKS, KEYS[0], None)
    sealed[3 * 48 + place] ^= 1
    assert [opened(sealed, rank) is None for rank in range(6)] == [rank == 3 for rank in range(6)]


def test_each_attach_draws_others_and_a_seed_repeats_them():
    assert numbers(seal(RANKS, KEYS[0], None)) != numbers(seal(RANKS, KEYS[0], None))
    seeded = [everybodys_keys(6, seed) for seed in (7, 7, 8)]
    first, again, other = (
        numbers(seal(RANKS, keys[0], seed), keys) for keys, seed in zip(seeded, (7, 7, 8), strict=True)
    )
    assert first == again != other
    assert bytes(seal(RANKS, KEYS[0], None).tolist()).find(bytes(32)) == -1


class Told:
    """A control plane on which one rank hears something else."""

    def __init__(self, sealed, opened):
        self._sealed, self._opened = sealed, opened

    def of_dealer(self, mine):
        return self._sealed

    def gather_words(self, word):
        return torch.tensor(self._opened)[:, None]


def test_a_secret_that_cannot_be_opened_ends_all_ranks_and_names_whose_it_is():
    sealed = seal(RANKS, KEYS[0], None)
    sealed[3 * 48] ^= 1
    said = [1, 1, 1, 0, 1, 1]
    for rank in (1, 3):
        worker = Worker(*divmod(rank, 2))
        with pytest.raises(SentinelError, match=r"dealt by .*0.*0.* cannot be opened by .*1.*1"):
            stage_secret(worker, RANKS, KEYS[rank], Told(sealed, said), None)
    whole = stage_secret(Worker(2, 1), RANKS, KEYS[5], Told(sealed, [1] * 6), None)
    assert whole.number("test") == opened(sealed, 4).number("test")


def test_every_step_direction_and_telling_has_keys_of_its_own():
    secret = opened(seal(RANKS, KEYS[0], None), 1)
    every = [digest_keys(secret, *purpose) for purpose in ((0, 3, 0), (1, 3, 0), (0, 4, 0), (0, 3, 1))]
    assert all(keys.shape == (96,) and keys.dtype == torch.int64 for keys in every)
    assert len(set(torch.cat(every).tolist())) == 4 * 96
    assert torch.equal(every[0], digest_keys(secret, 0, 3, 0))
