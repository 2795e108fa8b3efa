"""Evidence of the simulator is the engine's: the same numbers in the same layout."""

import numpy as np
import pytest
import torch

from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.evidence.probe import Probe
from deepspeed_sentinel.evidence.renewal import LEAD, PERIOD, READY, Renewal, of_senders
from deepspeed_sentinel.evidence.table import BY_JUDGE, NAMES, OF_PAIR, RECEIVED, SENT
from deepspeed_sentinel.evidence.transfer import FRESH, LASTING, Sketches, Transfers, pair_rows
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, identity
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


@pytest.mark.parametrize(
    ("parts", "tokens"),
    [(1, 130), (2, 400), *(pytest.param(*case, marks=pytest.mark.long) for case in [(2, 130), (1, 400)])],
)
def test_layout_and_values(parts, tokens):
    """Against baselines and each column's transfers fed by hand, over steps in which some messages are not clean."""
    verifiers = Verifiers(MESH, DECAYS, seed=3, paper_only=False)
    observer = Observer(MESH, 3, pairs=True)
    baselines = {(direction, link): Baselines(*DECAYS) for direction in (0, 1) for link in range(3)}
    transfers = {(stage, column): Transfers(*DECAYS) for stage in (1, 2) for column in range(5)}
    clean = np.ones((2, 3, 5), bool)
    clean[:, :, 2] = clean[BACKWARD, :, 3] = clean[BACKWARD, 0, 4] = False
    for step in range(READY + 2):
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
            baselines[direction, link].learn(end, summaries, clean[direction, link].copy())
            sender, came_over = (link, link - 1) if direction == FORWARD else (link + 1, link + 1)
            if sender not in (1, 2):
                assert np.isnan(ours[:, OF_PAIR]).all(), "first and last stage have no pair"
                continue
            for column in range(5):
                one = transfers[sender, column]
                pair = [
                    of_column(observer._look(direction, sender, messages[direction, at].flatten(2, 3)).now, column)
                    for at in (came_over, link)
                ]
                ready = observer.renewal.ready_X[direction, sender, column]
                found, lessons = pair_rows(*pair, one.known(end) if ready else None)
                of_pair = evidence.statistics[RECEIVED, direction, link, column][:, OF_PAIR]
                np.testing.assert_allclose(of_pair, found.numpy(), rtol=1e-3, atol=1e-5)
                one.learn(end, lessons[0].mean(0), clean[direction, link, column])
        verifiers.learn(clean)
        observer.renewal.learn(of_senders(clean))
    known = ~np.isnan(evidence.statistics[RECEIVED, :, 1][..., ~BY_JUDGE]).any(axis=(2, 3))
    assert (known == clean[:, 1]).all(), "what is learnt on a link is available there"


def of_column(sketches, column):
    return Sketches(sketches.sketch_JXmK[:, column], sketches.norms_Xm[column])


def test_samples_and_fresh_projections_differ_between_columns_and_steps_and_agree_within_a_pair():
    observer = Observer(MESH, 3, pairs=True)
    same = (2.0 + drawn(0, 1, 1, 400, 200)).expand(5, 2, 400, 200)

    def look(step, stage, direction=FORWARD):
        observer.begin_step(step)
        return observer._look(direction, stage, same).now

    first = look(0, 1)
    assert torch.equal(first.sketch_JXmK, look(0, 1).sketch_JXmK)
    assert torch.equal(first.norms_Xm[:, 0], first.norms_Xm[:, 1]), "micro-batches of a column share their sample"
    for other in (look(1, 1), look(0, 2), look(0, 1, BACKWARD)):
        assert (first.norms_Xm[0] != other.norms_Xm[0]).any(), "another sample"
        assert (first.sketch_JXmK[FRESH, 0].mean((0, 1)) - other.sketch_JXmK[FRESH, 0].mean((0, 1))).abs().max() > 1.0
    assert (first.norms_Xm[0] != first.norms_Xm[2]).any()
    means_JCK = first.sketch_JXmK.mean((2, 3))
    for which in (FRESH, LASTING):
        assert (means_JCK[which, 0] - means_JCK[which, 2]).abs().max() > 0.5, "another projection"
    again = look(1, 1).sketch_JXmK.mean((2, 3))
    torch.testing.assert_close(means_JCK[LASTING], again[LASTING], atol=0.5, rtol=0)


def test_renewals_leave_no_step_without_prediction():
    verifiers = Verifiers(Mesh(3, 2), DECAYS, seed=5, paper_only=False)
    offsets_SC = np.array([[9, 9], [1, 4], [9, 9]])
    verifiers._observer.renewal = Renewal(PERIOD - 2 * LEAD - np.stack([offsets_SC, offsets_SC]))
    everywhere, epochs = np.ones((2, 2, 2), bool), set()
    generator = torch.Generator().manual_seed(0)
    stage_DD = 0.1 * torch.randn(72, 72, generator=generator)
    for step in range(2 * LEAD + 10):
        entering = torch.randn(2, 1, 1, 24, 72, generator=generator)
        leaving = entering + entering @ stage_DD
        verifiers.begin_step(step)
        for link, sent in enumerate((entering, leaving)):
            verifiers.observe(FORWARD, link, sent)
            verifiers.observe(BACKWARD, 1 - link, sent)
        rows = verifiers.evidence(step, np.zeros((3, 2), int) + np.arange(2)).statistics[RECEIVED]
        correlations = rows[[FORWARD, BACKWARD], [1, 0], ..., NAMES.index("prediction_correlation")]
        assert np.isnan(correlations).all() if step < READY else (correlations > 0.3).all(), (step, correlations)
        epochs.add(tuple(verifiers._observer.renewal.epoch_X[FORWARD, 1].tolist()))
        verifiers.learn(everywhere)
    assert {(0, 0), (1, 0), (1, 1)} == epochs, "both columns' projections were renewed, each at its own step"


def test_a_pair_that_meets_anew_learns_from_the_start_and_the_others_go_on():
    verifiers = Verifiers(Mesh(3, 2), DECAYS, seed=5, paper_only=False)
    met = np.zeros((3, 2), bool)
    met[1, 1] = True
    generator, known, renewed = torch.Generator().manual_seed(0), [], []
    for step in range(3 * READY):
        sent = torch.randn(2, 1, 1, 24, 72, generator=generator)
        verifiers.begin_step(step, met if step == 2 * READY - 1 else None)
        for link in range(2):
            verifiers.observe(FORWARD, link, sent)
            verifiers.observe(BACKWARD, 1 - link, sent)
        evidence = verifiers.evidence(step, identity(Mesh(3, 2)))
        rows = evidence.statistics[RECEIVED][[FORWARD, BACKWARD], [1, 0], ..., NAMES.index("cross_moment")]
        known.append(~np.isnan(rows).any(axis=(0, 2)))
        renewed.append(evidence.renewed[:, 1].any(0))
        verifiers.learn(np.ones((2, 2, 2), bool))
    steps = np.arange(3 * READY)
    assert np.array(known)[:, 0].tolist() == (steps >= READY).tolist()
    anew = 2 * READY - 1
    assert np.array(known)[:, 1].tolist() == (((steps >= READY) & (steps < anew)) | (steps >= anew + READY)).tolist()
    assert np.array(renewed)[:, 1].tolist() == (steps == anew).tolist() and not np.array(renewed)[:, 0].any()


def test_paper_only_hides_the_other_rows():
    verifiers = Verifiers(MESH, DECAYS, seed=0, paper_only=True)
    observe_all(verifiers, 0)
    verifiers.evidence(0, SERVED)
    verifiers.learn(np.ones((2, 3, 5), bool))
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


def test_in_a_twin_step_receivers_digest_under_keys_of_their_stage_and_tell_what_was_made_up():
    verifiers = Verifiers(MESH, DECAYS, seed=0, paper_only=False)
    message = torch.randn(1, 2, 1, 9, 32, generator=torch.Generator().manual_seed(0)).expand(5, -1, -1, -1, -1)
    forged = message.clone()
    for token, place in ((0, 3), (2, 5)):  # the same public digest, see tests/kernels/test_keyed_digest.py
        forged.view(torch.int32)[3, 1, 0, token, place] ^= -(1 << 31) | 1 << 15
    told = []
    for step, twins in ((0, True), (1, True), (2, False)):
        verifiers.begin_step(step, twins=twins)
        for link in range(3):
            verifiers.observe(FORWARD, link, forged if link == 1 else message)
            verifiers.observe(BACKWARD, 2 - link, message)
        evidence = verifiers.evidence(step, SERVED)
        assert len(np.unique(evidence.digests)) == 2, "one a micro-batch, the forged one included"
        told.append(evidence.keyed)
    honest = told[0].copy()
    honest[FORWARD, 1, 3, 1] = honest[FORWARD, 1, 0, 1]
    assert np.argwhere(honest != told[0]).tolist() == [[FORWARD, 1, 3, 1]]
    assert (honest == honest[:, :, :1]).all(), "of all columns"
    of_keys = [keyed[direction, link, 0, 0] for keyed in told[:2] for direction in (0, 1) for link in range(3)]
    assert len(set(of_keys)) == 12 and not told[2].any()
