"""Digests of lists of tensors, and what they say of a stage's replicas."""

import numpy as np
import pytest
import torch

from deepspeed_sentinel.evidence import weights
from deepspeed_sentinel.evidence.weights import Division, divisions, layout, tensors_digest

CPU = torch.device("cpu")


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(70, 130, generator=generator)
    return {
        "matrix": draw.clone(),
        "transposed": draw[:40].clone().t(),
        "flat, with a rest": torch.randn(2 * weights.WIDTH + 7, generator=generator),
        "half": draw[0].to(torch.bfloat16),
        "double": draw[1].double(),
        "mask": draw[:3] > 0,
        "count": torch.tensor(7.0),
        "ids": torch.arange(9),
        "wide complex": torch.complex(draw[2].double(), draw[3].double()),
        "nothing": torch.zeros(0, 4),
    }


def digest(tensors):
    found = tensors_digest(list(tensors), CPU)
    assert found.dtype == torch.int64 and found.shape == ()
    return int(found)


def flip(tensor, place, bit):
    """The same tensor with one bit changed, in its own strides."""
    changed = tensor.clone()
    whole = changed.untyped_storage()
    octets = torch.tensor([], dtype=torch.uint8).set_(whole, 0, (whole.nbytes(),))
    octets[(place * octets.numel()) // 8] ^= 1 << bit
    return changed


@pytest.mark.parametrize("name", [name for name, tensor in some_tensors().items() if tensor.numel()])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_one_bit_in_any_tensor_is_another_digest(name, place):
    tensors = some_tensors()
    before = digest(tensors.values())
    assert before == digest(some_tensors().values())
    # The lowest bit: a flag is one byte, of which no other means anything.
    tensors[name] = flip(tensors[name], place, 0)
    assert digest(tensors.values()) != before


def test_order_shape_dtype_and_number_count():
    a, b = torch.arange(6.0), torch.arange(6.0) + 1
    lists = [
        [a, b],
        [b, a],
        [a, b.reshape(2, 3)],
        [a, b.reshape(3, 2)],
        [a, b.view(torch.int32)],
        [torch.cat([a, b])],
        [a],
        [a, b, torch.zeros(0)],
        [a, b, torch.zeros(0, 1)],
        [],
    ]
    assert len({digest(tensors) for tensors in lists}) == len(lists)
    assert len({layout(tensors) for tensors in lists}) == len(lists) - 1, "the first two are of one layout"


def test_strides_do_not_count_and_signs_and_nan_do():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert digest([x.t().contiguous().t()]) == digest([x])
    assert digest([torch.tensor([0.0])]) != digest([torch.tensor([-0.0])])
    nan = torch.tensor([float("nan")])
    assert digest([nan]) == digest([nan.clone()]) != digest([-nan])


def test_a_parameter_is_read_without_a_graph():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert not tensors_digest([parameter], CPU).requires_grad
    assert digest([parameter]) == digest([parameter.data])


@pytest.mark.parametrize(
    ("digests", "groups", "majority", "minority"),
    [
        ([7, 7, 8], ((0, 1), (2,)), (0, 1), (2,)),
        ([8, 7, 7], ((1, 2), (0,)), (1, 2), (0,)),
        ([7, 8, 7, 9, 7], ((0, 2, 4), (1,), (3,)), (0, 2, 4), (1, 3)),
        ([7, 8], ((0,), (1,)), (), ()),
        ([7, 8, 8, 7], ((0, 3), (1, 2)), (), ()),
        # Two of four are no strict majority, though more than any others.
        ([9, 7, 7, 8], ((1, 2), (0,), (3,)), (), ()),
        ([-5, 6, 7], ((0,), (1,), (2,)), (), ()),
    ],
)
def test_a_strict_majority_decides(digests, groups, majority, minority):
    (one,) = divisions(np.array([[3] * len(digests), digests], np.int64))
    assert (one.stage, one.groups, one.majority, one.minority) == (1, groups, majority, minority)


def test_every_stage_by_itself_and_alike_is_nothing():
    assert divisions(np.array([[1, 1, 1], [2, 2, 2]])) == ()
    assert divisions(np.array([[1], [2]])) == (), "one replica has nothing to be compared with"
    found = divisions(np.array([[1, 1, 2], [3, 3, 3], [5, 4, 4]]))
    assert [(one.stage, one.minority) for one in found] == [(0, (2,)), (2, (0,))]


def test_it_says_who_holds_what():
    (one,) = divisions(np.array([[255, -1, 255]]))
    assert isinstance(one, Division)
    assert str(one) == (
        "stage 0: replicas 0, 2 hold the digest 00000000000000ff; worker (stage 0, replica 1) holds the digest "
        "ffffffffffffffff"
    )
    (one,) = divisions(np.array([[1, 2]]))
    assert str(one).startswith("stage 0: worker (stage 0, replica 0) holds"), "where nobody is right, all are named"


def test_what_is_conjugated_or_negated_when_it_is_read_has_the_digest_of_what_it_is():
    for dtype in (torch.complex64, torch.complex128):
        held = torch.randn(3, 5, dtype=dtype).conj()
        assert tensors_digest([held], CPU) == tensors_digest([held.resolve_conj()], CPU)
        negative = held.imag
        assert tensors_digest([negative], CPU) == tensors_digest([negative.clone()], CPU)


def embedded(places, values, size=10):
    """A sparse gradient as torch.nn.Embedding makes it."""
    return torch.sparse_coo_tensor(torch.tensor([places]), torch.tensor(values), (size, 2))


def test_a_sparse_tensor_has_the_digest_of_where_its_elements_are_and_what():
    one = embedded([1, 2, 2], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    alike = [one.clone(), one.coalesce(), embedded([2, 1], [[8.0, 10.0], [1.0, 2.0]])]
    assert {digest([other]) for other in alike} == {digest([one])}
    others = [
        one.to_dense(),
        embedded([1, 3], [[1.0, 2.0], [8.0, 10.0]]),
        embedded([1, 2], [[1.0, 2.0], [8.0, 10.5]]),
        embedded([1, 2], [[1.0, 2.0], [8.0, 10.0]], size=11),
        one * 0,
        torch.zeros(10, 2).to_sparse(),
        torch.zeros(10, 2).to_sparse(1),
        torch.zeros(10, 2),
        one.to_dense().to_sparse(),
    ]
    assert len({digest([other]) for other in [one, *others]}) == 1 + len(others)
    assert digest([one, torch.ones(2)]) != digest([torch.ones(2), one])
    assert not one.is_coalesced(), "it was altered"
