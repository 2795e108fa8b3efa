import numpy as np
import pytest
import torch

from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.evidence.buffers import PUBLIC
from deepspeed_sentinel.evidence.exchange import REPORTED, Exchange, build_report
from deepspeed_sentinel.evidence.parts import Layout
from deepspeed_sentinel.evidence.probe import ENDS, SECRET, Probe
from deepspeed_sentinel.evidence.table import BY_JUDGE, NAMES, OF_PAIR, RECEIVED, SENT
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh

CPU = torch.device("cpu")


def probe(stage=1, micro_batches=2, mesh=None):
    made = Probe(mesh or Mesh(3, 2), stage, CPU, seed=0)
    made.begin_step(micro_batches)
    return made


def test_first_and_last_stage_have_two_ends_each():
    assert probe(0).ends == ((FORWARD, SENT), (BACKWARD, RECEIVED))
    assert probe(1).ends == ENDS
    assert probe(2).ends == ((FORWARD, RECEIVED), (BACKWARD, SENT))


def test_both_ends_of_a_message_report_the_same_bits():
    message = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    sender, receiver = probe(0), probe(1)
    for end, one in (((FORWARD, SENT), sender), ((FORWARD, RECEIVED), receiver)):
        for _ in range(2):
            one.observe(end, one.next_micro_batch(end), (message, torch.arange(4)))
    sent = sender.end_statistics((FORWARD, SENT), 1.0)
    received = receiver.end_statistics((FORWARD, RECEIVED), 1.0)
    for name in ("means_MD", "quantiles_MQ", "scalars_M3"):
        assert torch.equal(getattr(sent, name), getattr(received, name))
    assert torch.equal(sender.digests((FORWARD, SENT)), receiver.digests((FORWARD, RECEIVED)))
    torch.testing.assert_close(sent.means_MD[0], message.mean((0, 1)))


def test_scale_is_undone():
    gradient = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    plain, scaled = probe(micro_batches=1), probe(micro_batches=1)
    plain.observe((BACKWARD, SENT), plain.next_micro_batch((BACKWARD, SENT)), (gradient,))
    scaled.observe((BACKWARD, SENT), scaled.next_micro_batch((BACKWARD, SENT)), (gradient * 1024,))
    one = plain.end_statistics((BACKWARD, SENT), 1.0)
    other = scaled.end_statistics((BACKWARD, SENT), 1 / 1024)
    for name in ("means_MD", "quantiles_MQ", "scalars_M3"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_a_changed_mask_changes_the_digest():
    hidden, mask = torch.ones(4, 3), torch.ones(4, 4, dtype=torch.bool)
    one = probe()
    one.observe((FORWARD, SENT), 0, (hidden, mask))
    mask[3, 2] = False
    one.observe((FORWARD, SENT), 1, (hidden, mask))
    hidden_of, mask_of = one.digests((FORWARD, SENT)).unbind(1)
    assert torch.equal(hidden_of[0], hidden_of[1]) and not torch.equal(mask_of[0], mask_of[1])


def test_a_forged_sketch_changes_nothing_but_the_secret_sketch():
    end, seeds = (FORWARD, SENT), {(FORWARD, SENT): torch.tensor([[0, 0], [5, 6], [5, 7]])}
    message = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(2))
    honest, liar = (Probe(Mesh(4, 2), 1, CPU, seed=0) for _ in range(2))
    for one in (honest, liar):
        one.begin_step(1, seeds)
        one.observe(end, one.next_micro_batch(end), (message,))
    liar.forge_sketch(end, 0, (-message,))
    public, secret = slice(PUBLIC, SECRET), slice(SECRET, None)
    assert torch.equal(liar.sketches(end, public)[0], honest.sketches(end, public)[0])
    assert liar.sketches(end, secret)[0].shape[0] == 2
    assert torch.equal(liar.sketches(end, secret)[0], -honest.sketches(end, secret)[0])
    mine, true = liar.end_statistics(end, 1.0), honest.end_statistics(end, 1.0)
    assert torch.equal(liar.digests(end), honest.digests(end)) and torch.equal(mine.means_MD, true.means_MD)


def test_a_message_of_another_hidden_size_has_no_statistics_but_a_digest():
    one, end = probe(micro_batches=3), (FORWARD, SENT)
    for message in (torch.ones(4, 3), torch.ones(9, 3), torch.ones(4, 5)):
        one.observe(end, one.next_micro_batch(end), (message,))
    assert one.tokens(end) == [4, 9, 0]
    for rows in vars(one.end_statistics(end, 1.0)).values():
        assert torch.isfinite(rows[:2]).all() and torch.isnan(rows[2]).all()
    assert one.digests(end)[2].any()
    assert one.seen(end).widths == (0,)


def test_zero_tokens_and_integer_only_messages_are_refused():
    with pytest.raises(ValueError, match=r"zero tokens: its shape is \(2, 0, 8\)"):
        probe().observe((FORWARD, SENT), 0, (torch.ones(2, 0, 8),))
    with pytest.raises(ValueError, match=r"no floating-point tensor, got \(int64\[2, 3\]\)"):
        probe().observe((FORWARD, SENT), 0, (torch.ones(2, 3, dtype=torch.int64),))


def test_reports_become_evidence_of_the_right_workers():
    mesh = Mesh(3, 2)
    reports = np.zeros((3, 2, 4, 2, REPORTED + 2 + 1), np.int32)
    for stage in range(3):
        for replica in range(2):
            for index, _ in enumerate(ENDS):
                reports[stage, replica, index, :, -3] = 100 * stage + 10 * replica + index
                reports[stage, replica, index, :, -1] = 100 * stage + 10 * replica + index
    exchange = Exchange(mesh, np.arange(6).reshape(3, 2), replica_group=None)
    layout = Layout(np.full((2, 1), 6), np.ones((2, 2), np.int64))
    evidence = exchange.assemble(reports, 5, layout)
    marked = evidence.digests
    digests = layout.mark_all(marked)[..., 0] & 0xFFFFFFFF  # twice is as before
    assert (marked != 0).all()
    for link in range(2):
        for column in range(2):
            assert digests[SENT, FORWARD, link, column, 0] == 100 * link + 10 * column + 0
            assert digests[RECEIVED, FORWARD, link, column, 1] == 100 * (link + 1) + 10 * column + 1
            assert digests[SENT, BACKWARD, link, column, 0] == 100 * (link + 1) + 10 * column + 2
            assert digests[RECEIVED, BACKWARD, link, column, 0] == 100 * link + 10 * column + 3
            above, below = 100 * (link + 1) + 10 * column, 100 * link + 10 * column
            assert (evidence.keyed[FORWARD, link, column] == above + (above + 1 << 32)).all()
            assert (evidence.keyed[BACKWARD, link, column] == below + 2 + (below + 3 << 32)).all()


def test_baseline_is_the_bias_corrected_ema_of_the_clean_median():
    one = probe(micro_batches=1)
    baselines, end = Baselines(0.9, 0.8), (FORWARD, SENT)
    one.observe(end, 0, (torch.full((4, 3), 2.0),))
    one._next[end] = 1
    rows = one.end_statistics(end, 1.0)
    assert torch.isnan(baselines.distances(end, rows)).all()
    summary = baselines.summary(end, rows)
    for _ in range(3):
        baselines.learn(end, torch.stack([summary, summary, summary * -50]), np.array([True, True, False]))
    torch.testing.assert_close(baselines.distances(end, rows), torch.zeros(1, 4), atol=1e-5, rtol=0)
    restored = Baselines(0.9, 0.8)
    restored.load_state_dict(baselines.state_dict(), CPU)
    assert torch.equal(restored.distances(end, rows), baselines.distances(end, rows))
    baselines.learn(end, torch.stack([summary] * 3), np.zeros(3, bool))
    assert torch.equal(restored.distances(end, rows), baselines.distances(end, rows))


def test_report_packs_statistics_by_their_bits():
    one = probe(0, micro_batches=1)
    for end in one.ends:
        one.observe(end, one.next_micro_batch(end), (torch.full((4, 3), 2.0),))
    rows = {end: one.end_statistics(end, 1.0) for end in one.ends}
    own = {(end, 1): torch.cat([torch.ones(1, 4), row.scalars_M3], dim=1) for end, row in rows.items()}
    layout = Layout(np.array([[0, 3], [0, 3]]), np.ones((2, 2), np.int64))
    keyed = {(BACKWARD, RECEIVED): torch.tensor([5 + (-7 << 32)])}
    report = build_report(1, layout, own, {}, {end: one.digests(end) for end in one.ends}, keyed)
    values_PK = report[:, 0, : 2 * REPORTED].view(torch.float32).unflatten(-1, (2, REPORTED))
    of_message, of_pair = np.flatnonzero(~(OF_PAIR | BY_JUDGE)), np.flatnonzero(OF_PAIR)
    assert values_PK[0, 1, NAMES.index("energy")] == 4.0 and values_PK[0, 1, NAMES.index("max_abs")] == 2.0
    assert torch.isnan(values_PK[0, 0]).all(), "a part that is not there"
    assert (values_PK[1][:, of_message] == 0).all(), "an end that is not there"
    assert torch.isnan(values_PK[..., of_pair]).all()
    assert torch.equal(report[0, 0, -3:-1], one.digests((FORWARD, SENT))[0, 0])
    assert report[:, 0, -1].tolist() == [0, 0, 5, -7]
