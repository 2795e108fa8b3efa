"""Keyed digests: taken by receivers, of all that a message is made of, and what a twin step makes of them."""

import numpy as np
import pytest
import torch
from everybody import everybodys_keys

from deepspeed_sentinel.evidence.exchange import REPORTED, Exchange, build_report
from deepspeed_sentinel.evidence.parts import Layout
from deepspeed_sentinel.evidence.probe import ENDS, Probe
from deepspeed_sentinel.evidence.stage_secret import digest_keys, seal, unseal
from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.judgement.proof import try_twins
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker

CPU = torch.device("cpu")
MESH = Mesh(4, 3)
END = (FORWARD, RECEIVED)
RANKS = np.arange(12).reshape(4, 3)


def message(seed=0):
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(seed))


def made_up(honest):
    """Another message with the same public digest, by hand: see tests/kernels/test_keyed_digest.py."""
    forged = honest.clone()
    for row, column in ((0, 3), (2, 5)):
        forged.view(torch.int32)[row, column] ^= -(1 << 31) | 1 << 15
    assert not torch.equal(forged, honest)
    return forged


def keyed(*messages, keys=11, end=END):
    probe = Probe(MESH, 1, CPU, seed=0)
    generator = torch.Generator().manual_seed(keys)
    keys_K = torch.randint(-(1 << 62), 1 << 62, (96,), generator=generator)
    probe.begin_step(len(messages), keys={end: keys_K})
    for tensors in messages:
        probe.observe(end, probe.next_micro_batch(end), tensors)
    return probe, probe.keyed(end).tolist()


def test_one_digest_a_message_that_changes_with_every_tensor_and_key():
    mask = torch.arange(240).view(6, 40) % 3 == 0
    other = mask.clone()
    other[5, 39] ^= True
    bf16 = message().bfloat16()
    messages = [
        (message(), mask),
        (message(), other),
        (message(1), mask),
        (message(), mask, torch.arange(4)),
        (message(), mask.long()),
        (bf16, mask),
        (message(),),
    ]
    _, digests = keyed(*messages)
    assert len(set(digests)) == len(messages)
    assert keyed(*messages)[1] == digests and not set(keyed(*messages, keys=12)[1]) & set(digests)


def test_who_has_no_keys_and_who_sends_has_none():
    probe, _ = keyed((message(),))
    assert probe.keyed((FORWARD, SENT)).tolist() == [0]
    probe.begin_step(2)
    assert probe.keyed(END).tolist() == [0, 0]


def test_the_public_digest_is_the_same_with_keys_and_without():
    for tensors in ((message(), torch.arange(4)), (message()[:0], message())):
        probe, _ = keyed(tensors)
        plain = Probe(MESH, 1, CPU, seed=0)
        plain.begin_step(1)
        plain.observe(END, plain.next_micro_batch(END), tensors)
        assert torch.equal(probe.digests(END), plain.digests(END))


def test_a_message_that_was_made_up_to_look_right_is_told_apart():
    probe, (one, other) = keyed((message(), torch.arange(4)), (made_up(message()), torch.arange(4)))
    assert torch.equal(*probe.digests(END)), "who sends it reports the honest one's digest"
    assert one != other


def test_zeros_that_are_added_to_a_message_change_it():
    longer = torch.cat([message(), torch.zeros(2, 40)])
    probe, (one, other) = keyed((message(),), (longer,))
    assert torch.equal(*probe.digests(END)) and one != other


def test_tensors_have_keys_of_their_own():
    """Else what one of two tensors changes the other could take back."""
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randint(-99, 99, (5, 8), generator=generator, dtype=torch.int16) for _ in range(2))
    hidden, change = message(), torch.zeros(5, 8, dtype=torch.int16)
    change[2, 3] = 7
    _, digests = keyed((hidden, one, other), (hidden, one + change, other - change))
    assert digests[0] != digests[1]


def test_more_tensors_than_were_agreed_on_are_all_in_it():
    probe, _ = keyed((message(),))
    probe.adopt(Layout(np.full((3, 1), 40), np.ones((2, 3), np.int64)))
    last = torch.arange(4)
    found = set()
    for extra in ((last, last), (last, last + 1), (last + 1, last)):
        probe.begin_step(1, keys={END: torch.arange(96) + 5})
        probe.observe(END, probe.next_micro_batch(END), (message(), *extra))
        found |= set(probe.keyed(END).tolist())
    assert len(found) == 3


def work(stage, direction, given):
    """What honest workers of a stage make of what they are given."""
    weights = torch.randn(40, 40, generator=torch.Generator().manual_seed(10 * stage + direction)) / 6
    return torch.tanh(given @ weights)


def evidence_of_twins(forger):
    """Of a twin step in which one worker of stage 1 or none makes up what it sends forward (None)."""
    keys = everybodys_keys(12)
    sealed = seal(RANKS, keys[0], None)
    layout = Layout(np.full((3, 1), 40), np.ones((2, 3), np.int64))
    reports = np.zeros((4, 3, len(ENDS), 1, REPORTED + 3), np.int32)
    for column in range(3):
        crossed, flowing = {}, message()
        for stage in range(3):
            flowing = work(stage, FORWARD, flowing)
            if (stage, column) == forger:
                flowing = made_up(flowing)
            crossed[FORWARD, stage] = flowing
        for stage in (3, 2, 1):
            flowing = work(stage, BACKWARD, flowing)
            crossed[BACKWARD, stage - 1] = flowing
        for stage in range(4):
            rank = int(RANKS[stage, column])
            secret = unseal(sealed, rank, keys[rank].secret_with(0))
            probe = Probe(MESH, stage, CPU, seed=0)
            received = [end for end in probe.ends if end[1] == RECEIVED]
            probe.begin_step(1, keys={end: digest_keys(secret, end[0], 5, 0) for end in received})
            for end in probe.ends:
                probe.observe(end, probe.next_micro_batch(end), (crossed[end[0], probe.link(end)],))
            digests = {end: probe.digests(end) for end in probe.ends}
            told = {end: probe.keyed(end) for end in received}
            reports[stage, column] = build_report(1, layout, {}, {}, digests, told).numpy()
    return Exchange(MESH, RANKS, None).assemble(reports, 5, layout)


def tried(evidence, keyed):
    disputed = (evidence.digests[SENT] != evidence.digests[RECEIVED]).any(-1)
    assert not disputed.any(), "what crossed is what both ends report"
    none, alike = np.zeros((4, 3), bool), np.ones((4, 3), np.int64)
    twins = Twins(0, np.ones(3, bool), alike, alike.astype(float), alike)
    measures = np.ones((2, *disputed.shape, 1))
    served = np.tile(np.arange(3), (4, 1))
    return try_twins(
        MESH, evidence.digests[RECEIVED], measures, disputed, twins, served, none, none, np.zeros(4, bool), keyed
    )


@pytest.mark.parametrize("column", [0, 2])
def test_behind_one_that_makes_up_its_message_the_honest_worker_is_not_proved(column):
    evidence = evidence_of_twins(forger=(1, column))
    by_public = tried(evidence, None)
    assert {proof.worker for proof in by_public.proofs} == {Worker(2, column)}, "which is what the key is for"
    trial = tried(evidence, evidence.keyed)
    assert not trial.proofs and not trial.differences
    assert np.argwhere(trial.forged[..., 0]).tolist() == [[FORWARD, 1, column]], "between it and who received it"
    assert trial.spoilt.tolist() == [one == column for one in range(3)]
    assert not trial.sound[1, column], "the one that sent it is not cleared"


def test_honest_twins_are_right_under_every_key():
    trial = tried(evidence_of_twins(forger=None), evidence_of_twins(forger=None).keyed)
    assert not trial.proofs and trial.right.all() and trial.sound.all() and not trial.spoilt.any()
