"""Evidence of the simulator is the engine's: the same numbers in the same layout."""

import numpy as np
import pytest
import torch

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.evidence.probe import Probe
from deepspeed_sentinel.evidence.table import HARD, NAMES, RECEIVED, SENT
from deepspeed_sentinel.kernels.sliced_quantiles import unit_directions
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh
from deepspeed_sentinel.simulation.batched import message_rows
from deepspeed_sentinel.simulation.evidence import Verifiers

MESH = Mesh(3, 4)
SERVED = np.tile(np.arange(4), (3, 1))


def drawn(seed, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_batched_rows_are_what_the_probe_computes(bad):
    messages = drawn(0, 3, 2, 20, 16, scale=3.0)
    if bad is not None:
        messages[1, 0, 5, 3] = bad
    probe = Probe(MESH, 1, torch.device("cpu"), seed=7)
    probe.begin_step(3)
    end = (FORWARD, SENT)
    for message in messages:
        probe.observe(end, probe.next_micro_batch(end), [message])
    theirs = probe.end_statistics(end, 1.0)
    ours = message_rows(messages.flatten(1, 2), unit_directions(16, 7, torch.device("cpu")))
    for name in ("means_MD", "quantiles_MQ", "scalars_M3"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-6)


def observe_all(verifiers, seed, parts=1):
    verifiers.begin_step()
    messages = {}
    for direction in (FORWARD, BACKWARD):
        for link in range(MESH.links):
            # As large as ten links may differ.
            sent = drawn((seed * 2 + direction) * 2 + link, 4, 2, 1, 130, 8, scale=10.0**link)
            messages[direction, link] = sent
            for part in sent.split(2 // parts, dim=1):
                verifiers.observe(direction, link, part)
    return messages


@pytest.mark.parametrize("parts", [1, 2])
def test_layout_and_values(parts):
    verifiers = Verifiers(MESH, SentinelConfig(), paper_only=False)
    reference = {(direction, link): Baselines(0.9, 0.8) for direction in (0, 1) for link in range(2)}
    directions = unit_directions(8, 0, torch.device("cpu"))
    for step in range(3):
        messages = observe_all(verifiers, step, parts)
        evidence = verifiers.evidence(step, SERVED)
        assert evidence.statistics.shape == (2, 2, 2, 4, 2, len(NAMES))
        assert (evidence.digests == 0).all()
        np.testing.assert_array_equal(evidence.statistics[SENT], evidence.statistics[RECEIVED])
        clean = np.array([True, True, False, True])
        for (direction, link), sent in messages.items():
            rows = message_rows(sent.flatten(0, 1).flatten(1, 2), directions)
            end = (direction, SENT)
            expected = torch.cat([reference[direction, link].distances(end, rows), rows.scalars_M3], 1)
            np.testing.assert_allclose(
                evidence.statistics[SENT, direction, link].reshape(8, -1), expected.numpy(), rtol=1e-4
            )
            by_column = torch.cat([rows.means_MD, rows.quantiles_MQ], 1).view(4, 2, -1).mean(1)
            reference[direction, link].learn(end, by_column, clean)
        verifiers.learn(clean)


def test_paper_only_hides_the_other_rows():
    verifiers = Verifiers(MESH, SentinelConfig(), paper_only=True)
    observe_all(verifiers, 0)
    verifiers.evidence(0, SERVED)
    verifiers.learn(np.ones(4, bool))
    observe_all(verifiers, 1)
    known = ~np.isnan(verifiers.evidence(1, SERVED).statistics).any(axis=(0, 1, 2, 3, 4))
    paper = {"mean_abs", "l2_rel", "sign_flip", "sliced_wasserstein"}
    assert {name for name, shown in zip(NAMES, known, strict=True) if shown} == paper | set(np.array(NAMES)[HARD])


@pytest.mark.parametrize("parts", [1, 2])
def test_a_claim_changes_one_ends_report_on_its_messages_alone(parts):
    verifiers = Verifiers(MESH, SentinelConfig(), paper_only=False)
    messages = observe_all(verifiers, 0, parts)
    truth = verifiers.evidence(0, SERVED)
    mask = torch.zeros(4, 2 // parts, dtype=torch.bool)
    mask[2, -1] = True  # column 2, micro-batch 1: of the part observed last
    claimed = 2 * messages[BACKWARD, 1][:, -mask.shape[1] :]
    verifiers.claim(RECEIVED, BACKWARD, 1, mask, claimed)
    told = verifiers.evidence(0, SERVED)
    different = np.argwhere(told.digests != truth.digests)
    assert different.tolist() == [[RECEIVED, BACKWARD, 1, 2, 1]]
    energy = NAMES.index("energy")
    at = (RECEIVED, BACKWARD, 1, 2, 1, energy)
    assert told.statistics[at] == pytest.approx(4 * truth.statistics[at], rel=1e-5)
    changed = np.argwhere((told.statistics != truth.statistics)[..., energy])
    assert changed.tolist() == different.tolist()
