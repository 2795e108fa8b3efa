"""Evidence of the simulator is the engine's: the same numbers in the same layout."""

import numpy as np
import pytest
import torch

from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.evidence.probe import Probe
from deepspeed_sentinel.evidence.table import BY_JUDGE, NAMES, OF_PAIR, RECEIVED, SENT
from deepspeed_sentinel.evidence.transfer import Sketches, Transfers
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh
from deepspeed_sentinel.simulation.evidence import Verifiers
from deepspeed_sentinel.simulation.observation import PUBLIC_SEED, Observer, end_statistics

MESH = Mesh(4, 5)
SERVED = np.tile(np.arange(5), (4, 1))
DECAYS = (0.9, 0.8)
ENERGY = NAMES.index("energy")


def drawn(seed, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [20, 300])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_rows_of_an_end_are_what_the_probe_computes(bad, tokens):
    messages = drawn(0, 3, 2, tokens // 2, 16, scale=3.0)
    if bad is not None:
        messages[1, 0, 5, 3] = bad
    probe = Probe(MESH, 1, torch.device("cpu"), seed=PUBLIC_SEED)
    probe.begin_step(3)
    end = (FORWARD, SENT)
    for message in messages:
        probe.observe(end, probe.next_micro_batch(end), [message])
    theirs = probe.end_statistics(end, 1.0)
    ours, digests = end_statistics(messages.flatten(1, 2))
    for name in ("means_MD", "quantiles_MQ", "scalars_M3"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-6)
    assert torch.equal(digests, probe.digests(end)[:, 0])


def step_messages(seed, tokens=130):
    """A residual stage between any two links: what leaves is what entered plus a little."""
    messages = {}
    for direction, links in ((FORWARD, range(3)), (BACKWARD, range(2, -1, -1))):
        hidden = drawn(seed * 2 + direction, 5, 2, 1, tokens, 8)
        for link in links:
            messages[direction, link] = hidden
            hidden = hidden + 0.3 * drawn((seed * 2 + direction) * 10 + link, 5, 2, 1, tokens, 8)
    return messages


def observe_all(verifiers, step, parts=1, tokens=130):
    verifiers.begin_step(step)
    messages = step_messages(step, tokens)
    for (direction, link), sent in messages.items():
        for part in sent.split(2 // parts, dim=1):
            verifiers.observe(direction, link, part)
    return messages


@pytest.mark.parametrize(("parts", "tokens"), [(1, 130), (2, 130), (1, 400), (2, 400)])
def test_layout_and_values(parts, tokens):
    """Against baselines and transfers fed by hand, over three steps of which one column is not clean."""
    verifiers = Verifiers(MESH, DECAYS, seed=3, paper_only=False)
    observer = Observer(MESH, 3, pairs=True)
    baselines = {(direction, link): Baselines(*DECAYS) for direction in (0, 1) for link in range(3)}
    transfers = {stage: Transfers(*DECAYS) for stage in (1, 2)}
    clean = np.array([True, True, False, True, True])
    for step in range(3):
        messages = observe_all(verifiers, step, parts, tokens)
        evidence = verifiers.evidence(step, SERVED)
        assert evidence.statistics.shape == (2, 2, 3, 5, 2, len(NAMES))
        np.testing.assert_array_equal(evidence.statistics[SENT], evidence.statistics[RECEIVED])
        np.testing.assert_array_equal(evidence.digests[SENT], evidence.digests[RECEIVED])
        assert len(np.unique(evidence.digests)) == 2 * 3 * 5 * 2
        observer.begin_step(step)
        for (direction, link), sent in messages.items():
            rows, _ = end_statistics(sent.flatten(0, 1).flatten(1, 2))
            end = (direction, RECEIVED)
            expected = torch.cat([baselines[direction, link].distances(end, rows), rows.scalars_M3], 1)
            ours = evidence.statistics[RECEIVED, direction, link].reshape(10, -1)
            np.testing.assert_allclose(ours[:, ~(OF_PAIR | BY_JUDGE)], expected.numpy(), rtol=1e-3, atol=1e-6)
            summaries = torch.cat([rows.means_MD, rows.quantiles_MQ], 1).view(5, 2, -1).mean(1)
            baselines[direction, link].learn(end, summaries, clean)
            sender, came_over = (link, link - 1) if direction == FORWARD else (link + 1, link + 1)
            if sender not in transfers:
                assert np.isnan(ours[:, OF_PAIR]).all(), "first and last stage have no pair"
                continue
            pair = [observer._sketch(sender, messages[direction, at].flatten(2, 3)) for at in (came_over, link)]
            found, lessons = transfers[sender].statistics(end, *pair)
            np.testing.assert_allclose(ours[:, OF_PAIR], found.numpy(), rtol=1e-3, atol=1e-5)
            transfers[sender].learn(end, lessons.view(5, 2, -1).mean(1), clean)
        verifiers.learn(clean)
    known = ~np.isnan(evidence.statistics[RECEIVED, :, 1]).any(axis=(0, 1, 2))
    assert known[~BY_JUDGE].all(), "after a step everything is available"


def test_token_samples_differ_between_columns_and_steps_and_agree_within_a_pair():
    observer = Observer(MESH, 3, pairs=True)
    same = drawn(0, 1, 1, 400, 8).expand(5, 2, 400, 8)

    def sketch(step, stage):
        observer.begin_step(step)
        found = observer._sketch(stage, same)
        assert isinstance(found, Sketches)
        return found.sketch_XmK

    first = sketch(0, 1)
    assert torch.equal(first, sketch(0, 1))
    assert torch.equal(first[0], first[1]), "micro-batches of a column share their sample"
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], sketch(1, 1)[0])
    assert not torch.equal(first[0], sketch(0, 2)[0])


def test_paper_only_hides_the_other_rows():
    verifiers = Verifiers(MESH, DECAYS, seed=0, paper_only=True)
    observe_all(verifiers, 0)
    verifiers.evidence(0, SERVED)
    verifiers.learn(np.ones(5, bool))
    observe_all(verifiers, 1)
    known = ~np.isnan(verifiers.evidence(1, SERVED).statistics).any(axis=(0, 1, 2, 3, 4))
    paper = {"mean_abs", "l2_rel", "sign_flip", "sliced_wasserstein"}
    assert {name for name, shown in zip(NAMES, known, strict=True) if shown} == paper | {"non_finite"}


def test_a_receivers_lie_changes_its_own_report_and_what_it_says_of_the_pair():
    verifiers = Verifiers(MESH, DECAYS, seed=0, paper_only=False)
    messages = observe_all(verifiers, 0)
    truth = verifiers.evidence(0, SERVED)
    verifiers.begin_step(0)
    for (direction, link), sent in messages.items():
        claimed = sent.clone()
        if (direction, link) == (BACKWARD, 1):
            claimed[2, 1] *= -2
        verifiers.observe(direction, link, sent, claimed)
    told = verifiers.evidence(0, SERVED)
    assert np.argwhere(told.digests != truth.digests).tolist() == [[RECEIVED, BACKWARD, 1, 2, 1, 0]]
    own = told.statistics[..., ENERGY], truth.statistics[..., ENERGY]
    assert np.argwhere(own[0] != own[1]).tolist() == [[RECEIVED, BACKWARD, 1, 2, 1]]
    at = (RECEIVED, BACKWARD, 1, 2, 1)
    assert told.statistics[at][ENERGY] == pytest.approx(4 * truth.statistics[at][ENERGY], rel=1e-5)
    cosine = NAMES.index("transfer_cosine")
    pair = told.statistics[..., cosine], truth.statistics[..., cosine]
    both = np.argwhere((pair[0] != pair[1]) & ~np.isnan(pair[1])).tolist()
    assert both == [[SENT, BACKWARD, 1, 2, 1], [RECEIVED, BACKWARD, 1, 2, 1]]


def test_a_senders_lie_changes_what_entered_the_next_stage():
    verifiers = Verifiers(MESH, DECAYS, seed=0, paper_only=False)
    messages = observe_all(verifiers, 0)
    truth = verifiers.evidence(0, SERVED)
    verifiers.begin_step(0)
    for (direction, link), sent in messages.items():
        claimed = -sent if (direction, link) == (FORWARD, 0) else sent
        verifiers.observe(direction, link, claimed, sent)
    told = verifiers.evidence(0, SERVED)
    cosine = NAMES.index("transfer_cosine")
    flipped = told.statistics[:, FORWARD, 1, ..., cosine], truth.statistics[:, FORWARD, 1, ..., cosine]
    np.testing.assert_allclose(flipped[0], -flipped[1], rtol=1e-4)
    np.testing.assert_array_equal(told.statistics[:, FORWARD, 2], truth.statistics[:, FORWARD, 2])
