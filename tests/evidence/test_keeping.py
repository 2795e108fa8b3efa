import numpy as np
import pytest
import torch
from everybody import everybodys_keys

from deepspeed_sentinel.evidence.keeping import Keeping, look_again
from deepspeed_sentinel.evidence.parts import Layout
from deepspeed_sentinel.evidence.probe import SECRET, Probe
from deepspeed_sentinel.evidence.sketch import PairSketches
from deepspeed_sentinel.evidence.statement import Statement
from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker

CPU = torch.device("cpu")
END = (FORWARD, SENT)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pairs(mesh, worker):
    ranks = np.arange(mesh.stages * mesh.replicas).reshape(mesh.stages, mesh.replicas)
    return PairSketches(mesh, worker, ranks, CPU, everybodys_keys(ranks.size)[ranks[worker]])


def test_only_the_chosen_message_is_kept_and_as_it_was():
    keeping, message = Keeping(), normal(3, 4)
    keeping.begin_step({END: 1})
    for micro_batch in range(3):
        keeping.observe(END, micro_batch, (message + micro_batch, torch.arange(3)))
        keeping.observe((BACKWARD, SENT), micro_batch, (message,))
    micro_batch, (kept, positions) = keeping.kept(END)
    assert micro_batch == 1 and torch.equal(kept, message + 1) and torch.equal(positions, torch.arange(3))
    assert not keeping._kept.keys() - {END}
    keeping.observe(END, 1, (message,))
    assert keeping.kept(END)[1][0] is not message, "the engine reuses its buffers"
    keeping.begin_step({})
    assert not keeping._kept


def test_what_is_taken_of_others_follows_what_passes_here():
    keeping = Keeping()
    assert keeping.most_bytes == 1 << 26
    keeping.observe(END, 0, (torch.empty(1 << 14, 1 << 13, dtype=torch.int8), torch.arange(3)))
    assert keeping.most_bytes == 8 * ((1 << 27) + 24)


def test_what_no_header_can_tell_is_refused_where_it_passes():
    keeping = Keeping()
    keeping.begin_step({END: 0})
    for tensors, what in (
        ([torch.zeros(1)] * 97, "97 tensors"),
        ([torch.zeros([1] * 9)], "9 dimensions"),
        ([torch.zeros(1, dtype=torch.uint16)], "uint16"),
    ):
        with pytest.raises(ValueError, match=what):
            keeping.observe(END, 0, tensors)


def test_both_neighbours_keep_the_same_micro_batch_and_it_changes():
    mesh = Mesh(5, 2)
    below, above = pairs(mesh, Worker(1, 0)), pairs(mesh, Worker(3, 0))
    chosen = [below.to_keep(step, 8)[END] for step in range(40)]
    assert chosen == [above.to_keep(step, 8)[FORWARD, RECEIVED] for step in range(40)]
    assert chosen == [above.to_keep(step, 8)[BACKWARD, SENT] for step in range(40)]
    assert set(chosen) == set(range(8))
    between = pairs(mesh, Worker(2, 0))
    assert chosen != [between.to_keep(step, 8)[END] for step in range(40)]


def test_nothing_is_kept_where_both_neighbours_are_trusted():
    assert pairs(Mesh(3, 2), Worker(0, 0)).ends and not pairs(Mesh(3, 2), Worker(0, 0)).to_keep(0, 4)
    assert pairs(Mesh(4, 2), Worker(0, 0)).to_keep(0, 4).keys() == {END, (BACKWARD, RECEIVED)}


@pytest.mark.parametrize("tokens", [9, 400])
def test_a_second_look_sees_what_the_witness_saw(tokens):
    mesh, seeds, message = Mesh(5, 2), (11, 12, 13), (normal(tokens, 80), torch.arange(7))
    probe = Probe(mesh, 1, CPU, seed=0)
    probe.begin_step(1, {END: torch.tensor([[0, 0], [11, 12], [11, 13]])})
    probe.observe(END, probe.next_micro_batch(END), message)
    layout = Layout(np.full((4, 1), 80), np.full((2, 4), 2))
    look = look_again(Statement(0, seeds, (None,), message), END, 1, mesh, layout, CPU)
    sketch_JMmK, norms_JMm = probe.sketches(END, slice(SECRET, None))
    (sketches,) = look.sketches
    assert torch.equal(sketches.sketch_JXmK, sketch_JMmK) and torch.equal(sketches.norms_Xm, norms_JMm[0])
    digests_T2 = probe.digests(END)[0].numpy()
    assert (look.digests == layout.mark(digests_T2.view(np.int64)[:, 0], *END)).all() and look.tokens == (tokens,)


def test_there_may_be_nothing_to_look_at():
    for tensors in ((), (torch.arange(3),), (torch.empty(0, 4),)):
        layout = Layout(np.full((4, 1), 4), np.ones((2, 4), np.int64))
        assert look_again(Statement(0, (1, 2, 3), (None,), tensors), END, 1, Mesh(5, 2), layout, CPU) is None
