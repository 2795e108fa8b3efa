import warnings

import numpy as np
import pytest
import torch

from deepspeed_sentinel.evidence.exchange import REPORTED, Exchange
from deepspeed_sentinel.evidence.parts import Layout
from deepspeed_sentinel.evidence.probe import ENDS
from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import NAMES, OF_PAIR, RECEIVED, SENT
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh

COSINE, ENERGY = NAMES.index("transfer_cosine"), NAMES.index("energy")


def test_both_neighbours_of_a_sender_report_on_its_pair():
    mesh = Mesh(5, 2)
    values = np.zeros((5, 2, len(ENDS), 1, REPORTED), np.float32)
    values[..., OF_PAIR[:REPORTED]] = np.nan
    for stage in range(5):
        for column in range(2):
            for index, (direction, role) in enumerate(ENDS):
                upward = (direction == FORWARD) == (role == SENT)
                about = stage + (1 if upward else -1)
                values[stage, column, index, 0, ENERGY] = 100 * stage + column
                if 0 < about < 4:
                    values[stage, column, index, 0, COSINE] = 1000 * about + 100 * stage + 10 * column + index
    reports = np.concatenate([values.view(np.int32), np.zeros((*values.shape[:-1], 2 + 1), np.int32)], axis=-1)
    layout = Layout(np.full((4, 1), 6), np.ones((2, 4), np.int64))
    statistics = Exchange(mesh, np.arange(10).reshape(5, 2), None).assemble(reports, 0, layout).statistics
    for link in range(4):
        for column in range(2):
            for direction, sender, receiver in ((FORWARD, link, link + 1), (BACKWARD, link + 1, link)):
                ends = statistics[:, direction, link, column, 0]
                assert ends[SENT, ENERGY] == 100 * sender + column
                assert ends[RECEIVED, ENERGY] == 100 * receiver + column
                if sender in (0, 4):
                    assert np.isnan(ends[:, COSINE]).all()
                    continue
                before = 2 * sender - receiver
                left, entered = ENDS.index((direction, RECEIVED)), ENDS.index((direction, SENT))
                assert ends[RECEIVED, COSINE] == 1000 * sender + 100 * receiver + 10 * column + left
                assert ends[SENT, COSINE] == 1000 * sender + 100 * before + 10 * column + entered


def test_of_pairs_that_the_ends_of_the_pipeline_have_not_nobody_can_say_anything():
    mesh = Mesh(4, 2)
    values = np.zeros((4, 2, len(ENDS), 1, REPORTED), np.float32)  # everybody gives a number for everything
    reports = np.concatenate([values.view(np.int32), np.zeros((*values.shape[:-1], 2 + 1), np.int32)], axis=-1)
    layout = Layout(np.full((3, 1), 6), np.ones((2, 3), np.int64))
    evidence = Exchange(mesh, np.arange(8).reshape(4, 2), None).assemble(reports, 0, layout)
    made_up = Evidence(mesh, 0, np.zeros_like(evidence.statistics), evidence.digests)
    for statistics in (evidence.statistics, made_up.statistics):
        for direction, link in ((FORWARD, 0), (BACKWARD, -1)):
            assert np.isnan(statistics[:, direction, link][..., OF_PAIR]).all()
            assert not np.isnan(statistics[:, direction, link][..., ~OF_PAIR]).any()
        assert not np.isnan(statistics[:, FORWARD, 1:]).any() and not np.isnan(statistics[:, BACKWARD, :-1]).any()


@pytest.fixture(params=[False, True], ids=["as they are", "flushed"])
def denormals(request):
    """How this host takes denormal numbers, a mode of the processor."""
    if request.param and not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    yield
    torch.set_flush_denormal(False)


def test_what_a_host_does_with_denormal_numbers_changes_no_verdict(denormals):
    """Of gradients of a size of 1e-20 the mean square is one; a stranger may send any bits."""
    mesh = Mesh(3, 2)
    bits = np.array([0x00000001, 0x007FFFFF, 0x80000001, 0x80000000, 0x7F800001, 0x00800000, 0x3F800000], np.int64)
    words = np.resize(bits, (3, 2, len(ENDS), 1, REPORTED)).astype(np.uint32).view(np.int32)
    reports = np.concatenate([words, np.zeros((*words.shape[:-1], 2 + 1), np.int32)], axis=-1)
    layout = Layout(np.full((2, 1), 6), np.ones((2, 2), np.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics = Exchange(mesh, np.arange(6).reshape(3, 2), None).assemble(reports, 0, layout).statistics
        values = statistics[..., :REPORTED].astype(np.float64)
    assert set(np.unique(statistics[~np.isnan(statistics)].view(np.int32))) == {0, 0x00800000, 0x3F800000}
    assert np.array_equal(
        values[values > 0] < 1e-30, statistics[..., :REPORTED][values > 0].view(np.int32) == 0x00800000
    )
