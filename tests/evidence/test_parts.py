"""The tensors of a message: which are judged, as what, and what all ranks agree on."""

import numpy as np
import pytest
import torch

from deepspeed_sentinel.evidence.parts import Layout, Seen, as_tokens, combine, digest_of, parts_of, report
from deepspeed_sentinel.evidence.probe import ENDS, SECRET, Probe
from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh

CPU = torch.device("cpu")
END = (FORWARD, SENT)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def probe(*messages, micro_batches=None, layout=None, seeds=None):
    """A worker of stage 1 of 4 that has sent these messages."""
    one = Probe(Mesh(4, 2), 1, CPU, seed=0)
    if layout:
        one.adopt(layout)
    one.begin_step(micro_batches or len(messages), seeds)
    for message in messages:
        one.observe(END, one.next_micro_batch(END), message)
    return one


def layout(*widths, tensors=2):
    return Layout(np.tile(widths, (3, 1)), np.full((2, 3), tensors))


def test_every_floating_point_tensor_is_judged():
    message = (torch.arange(3), normal(2, 3), torch.ones(2, dtype=torch.bool), normal(1).bfloat16())
    assert parts_of(message) == [1, 3]


@pytest.mark.parametrize(
    ("shape", "tokens", "hidden"),
    [((2, 5, 6), 10, 6), ((5, 6), 5, 6), ((6,), 6, 1), ((), 1, 1), ((2, 3, 4, 5), 40, 3), ((2, 1, 4, 4), 32, 1)],
)
def test_layouts(shape, tokens, hidden):
    x_TD = as_tokens(normal(*shape))
    assert tuple(x_TD.shape) == (tokens, hidden)


def test_the_channels_of_an_image_are_its_features():
    image = normal(2, 3, 4, 5)
    x_TD = as_tokens(image)
    assert torch.equal(x_TD[1 * 20 + 2 * 5 + 3], image[1, :, 2, 3])
    channels_last = image.to(memory_format=torch.channels_last)
    assert torch.equal(digest_of(image), digest_of(channels_last)), "the same values, laid out otherwise"


def test_each_tensor_has_its_digest_and_each_part_its_statistics():
    hidden, bias, ids = normal(2, 5, 6), normal(2, 5, seed=1), torch.arange(10)
    one = probe((ids, hidden, bias), (ids, hidden, bias + 1))
    digests_MT2 = one.digests(END)
    for index, tensor in enumerate((ids, hidden, bias)):
        assert torch.equal(digests_MT2[0, index], digest_of(tensor))
    assert (digests_MT2[0, :2] == digests_MT2[1, :2]).all() and (digests_MT2[0, 2] != digests_MT2[1, 2]).any()
    assert one.parts(END) == [0, 1] and one.judged(END) == [1, 2]
    torch.testing.assert_close(one.end_statistics(END, 1.0, 0).means_MD[0], hidden.mean((0, 1)))
    torch.testing.assert_close(one.end_statistics(END, 1.0, 1).means_MD[1], bias.mean(0) + 1)


def test_sizes_of_images_may_change():
    one = probe((normal(2, 3, 4, 4),), (normal(2, 3, 8, 8, seed=1),))
    assert one.tokens(END) == [32, 128] and one.seen(END) == Seen(1, (3,))
    assert torch.isfinite(one.end_statistics(END, 1.0).means_MD).all()


def test_sketches_of_all_parts_stand_one_after_the_other():
    seeds = {END: torch.tensor([[0, 0], [5, 6], [5, 7]])}
    hidden, bias = normal(2, 5, 6), normal(2, 5, seed=1)
    both = probe((hidden, bias), (hidden, bias), seeds=seeds, layout=layout(6, 5, 9))
    alone = [probe((part,), (part,), seeds=seeds, layout=layout(width)) for part, width in ((hidden, 6), (bias, 5))]
    secret = slice(SECRET, None)
    sketch_JNmK, norms_JNm = both.sketches(END, secret)
    assert len(sketch_JNmK) == 2
    for part, one in enumerate(alone):
        assert torch.equal(sketch_JNmK[:, 2 * part : 2 * part + 2], one.sketches(END, secret)[0])
        assert torch.equal(norms_JNm[:, 2 * part : 2 * part + 2], one.sketches(END, secret)[1])
    assert not sketch_JNmK[:, 4:].any(), "a part that this link does not have"
    assert both.token_counts(END).tolist() == [10, 10, 2, 2, 0, 0]


def test_a_forged_message_forges_the_sketches_of_all_its_parts():
    seeds = {END: torch.tensor([[0, 0], [5, 6], [5, 7]])}
    hidden, bias = normal(2, 5, 6), normal(2, 5, seed=1)
    one = probe((hidden, bias), seeds=seeds, layout=layout(6, 5))
    secret = slice(SECRET, None)
    honest = one.sketches(END, secret)[0].clone()
    one.forge_sketch(END, 0, (hidden, -bias))
    assert torch.equal(one.sketches(END, secret)[0], honest * torch.tensor([1, -1])[:, None, None])


def test_what_was_agreed_on_is_expected_of_later_messages():
    hidden, weights = normal(2, 5, 6), normal(2, 5, seed=1)
    one = probe((hidden, weights), (hidden, weights[:, :4]))
    assert one.seen(END) == Seen(2, (6, 0)), "its hidden size changes"
    one.adopt(layout(6, 0, tensors=3))
    assert one.parts(END) == [0] and one.digests(END).shape == (2, 3, 2)
    one.begin_step(1)
    one.observe(END, one.next_micro_batch(END), (weights, hidden))  # in another order
    assert torch.isnan(one.end_statistics(END, 1.0).scalars_M3).all()
    assert torch.equal(one.digests(END)[0, 0], digest_of(weights)) and not one.digests(END)[0, 2].any()


def test_a_part_that_one_message_lacks_is_missing_there_alone():
    hidden, bias = normal(2, 5, 6), normal(2, 5, seed=1)
    one = probe((hidden, bias), (hidden, bias), layout=layout(6, 5))
    one.begin_step(2)
    one.observe(END, one.next_micro_batch(END), (hidden,))
    one.observe(END, one.next_micro_batch(END), (hidden, bias))
    rows = one.end_statistics(END, 1.0, 1).scalars_M3
    assert torch.isnan(rows[0]).all() and torch.isfinite(rows[1]).all(), "nothing of the step before is left"
    assert not one.digests(END)[0, 1].any()


def test_more_tensors_than_agreed_on_join_the_last_digest():
    hidden = normal(2, 5, 6)
    digests = []
    for last in (1, 2):
        one = probe((hidden, torch.tensor([1]), torch.tensor([last])), layout=layout(6))
        digests.append(one.digests(END)[0])
    assert digests[0].shape == (2, 2)
    assert torch.equal(digests[0][0], digests[1][0]) and not torch.equal(digests[0][1], digests[1][1])


def reports(mesh, seen):
    """What all ranks report; ``seen(stage, replica, end)`` is what one saw at an end that it has."""
    ends_of = {stage: Probe(mesh, stage, CPU, 0).ends for stage in range(mesh.stages)}
    return np.array(
        [
            [
                report([seen(stage, replica, end) if end in ends_of[stage] else None for end in ENDS])
                for replica in range(mesh.replicas)
            ]
            for stage in range(mesh.stages)
        ]
    )


def test_all_ranks_agree_link_by_link():
    mesh = Mesh(4, 2)

    def seen(stage, replica, end):
        link = stage if end in ((FORWARD, SENT), (BACKWARD, RECEIVED)) else stage - 1
        widths = (64, 8) if link == 1 else (64,)
        return Seen(3 if end[0] == FORWARD else len(widths), widths)

    agreed = combine(reports(mesh, seen), mesh, ENDS)
    assert agreed.widths.tolist() == [[64, 0], [64, 8], [64, 0]] and agreed.parts == 2
    assert agreed.tensors.tolist() == [[3, 3, 3], [1, 2, 1]] and agreed.slots == 3


@pytest.mark.parametrize("told", [Seen(1, (0,)), Seen(90, (7, 7)), Seen(1, (1 << 40,))])
def test_no_single_rank_decides_what_is_judged(told):
    mesh = Mesh(4, 3)
    agreed = combine(
        reports(mesh, lambda stage, replica, end: told if (stage, replica) == (1, 2) else Seen(2, (64,))), mesh, ENDS
    )
    assert agreed.widths.tolist() == [[64]] * 3 and (agreed.tensors == 2).all()


def test_a_hidden_size_without_a_majority_is_not_judged():
    mesh = Mesh(3, 4)
    agreed = combine(reports(mesh, lambda stage, replica, end: Seen(1, (32 + replica,))), mesh, ENDS)
    assert agreed.widths.tolist() == [[0]] * 2 and agreed.parts == 1


def test_zeros_differ_from_nothing():
    agreed = Layout(np.full((3, 1), 4), np.array([[2, 1, 2], [1, 1, 1]]))
    marked = agreed.mark_all(np.zeros((2, 2, 3, 2, 5, 2), np.int64))
    assert (marked[:, FORWARD, [0, 2]] != 0).all() and (marked[:, FORWARD, 1, ..., 1] == 0).all()
    assert (marked[:, BACKWARD, :, ..., 1] == 0).all()
    assert (marked[RECEIVED, FORWARD, 2] == agreed.mark(np.zeros((2, 5, 2), np.int64), FORWARD, 2)).all()
