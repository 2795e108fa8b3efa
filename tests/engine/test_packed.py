"""What one rank hands another as bytes: it comes out the same to the bit, and no larger than what came."""

import io
import json
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sentinel.engine.packed import TYPES, can_be_packed, pack, text_bytes, unpack

PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(PLAIN.filter(lambda key: key == key), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_plain_values_come_out_as_they_were(value):
    assert can_be_packed(value)
    assert repr(unpack(pack(value))) == repr(value)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_a_tensor_of_each_type_comes_out_the_same_to_the_bit(dtype, shape):
    size = TYPES[dtype].itemsize * int(torch.Size(shape).numel())
    bits = torch.randint(0, 2 if dtype == "bool" else 256, [size], dtype=torch.uint8)
    tensor = bits.view(TYPES[dtype]).reshape(shape)
    found, rest = unpack(pack((tensor, 7)))
    assert (found.dtype, found.shape, rest) == (tensor.dtype, tensor.shape, 7)
    assert torch.equal(found.reshape(-1).view(torch.uint8), bits)


def test_strides_stay_since_last_bits_of_a_product_may_depend_on_them():
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    found = unpack(pack(images))
    assert found.stride() == images.stride() and torch.equal(found, images)


def test_views_are_packed_as_what_they_show():
    base = torch.arange(1000.0)
    conjugated = torch.randn(3, dtype=torch.complex64).conj()
    for view in (base[::7], base[3:4].expand(5, 5), base.reshape(10, 100).T[2:4], conjugated):
        packed = pack([view])
        assert torch.equal(unpack(packed)[0], view)
        assert packed.numel() < 200 + view.numel() * view.element_size()


@pytest.mark.parametrize(
    "value",
    [{1, 2}, object(), torch.Size([1]), {(1, 2): 3}, torch.eye(2).to_sparse(), torch.ones(2, device="meta"), b"bytes"],
    ids=["set", "object", "Size", "tuple key", "sparse", "meta", "bytes"],
)
def test_what_is_something_else_cannot_be_packed(value):
    assert not can_be_packed([value])


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_what_is_nested_too_deeply_cannot_be_packed(kind):
    """Whoever reads it may stand deeper in calls than who wrote it."""

    def nested(depth):
        inner = 7
        for _ in range(depth):
            inner = {"a": inner} if kind is dict else kind([inner])
        return inner

    assert can_be_packed(nested(60)) and repr(unpack(pack(nested(60)))) == repr(nested(60))
    assert not any(can_be_packed(nested(depth)) for depth in (200, 500, 1500, 100_000))
    endless = []
    endless.append(endless)
    assert not can_be_packed(endless)


def test_the_text_is_measured_before_it_is_packed():
    for value in (7, [torch.ones(3), {"a": "öx"}], ["x" * 1000]):
        assert text_bytes(value) == int(pack(value)[0]) + 256 * int(pack(value)[1])


def made(text, bits=0):
    """A file of this text and so many bytes of bits."""
    text = text.encode() if isinstance(text, str) else json.dumps(text).encode()
    return torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text + bytes(bits)), dtype=torch.uint8)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


FOREIGN = {
    "nothing": torch.empty(0, dtype=torch.uint8),
    "no text": made(""),
    "no JSON": made("{"),
    "no list": made({"a": 1}),
    "an object": made(["list", {"a": 1}]),
    "a list without a kind": made([]),
    "another kind": made(["set", 1]),
    "a list as a key": made(["dict", [["list"], 1]]),
    "a pair too long": made(["dict", [1, 2, 3]]),
    "nested too deeply": made("[" * 100_000),
    "a text longer than the file": torch.full([8], 255, dtype=torch.uint8),
    "another type": made(["tensor", "object", [1], []], 8),
    "a name of torch": made(["tensor", "load", [1], []], 8),
    "a size that is none": made(["tensor", "float32", [1.0], []], 4),
    "a negative size": made(["tensor", "float32", [-1, -1], []], 4),
    "more than there is": made(["tensor", "float32", [2**40], []], 4),
    "expanded": made(["tensor", "float32", [2**30], [0]], 4),
    "less than there is": made(["tensor", "float32", [1], []], 8),
    "strides with gaps": made(["tensor", "float32", [2], [2**40]], 8),
    "strides that share": made(["tensor", "float32", [2, 2], [1, 1]], 16),
    "strides of nothing": made(["tensor", "float32", [0, 2**60], [1, 2**60]], 0),
    "too few strides": made(["tensor", "float32", [2, 2], [1]], 16),
    "what torch saves, some KB that are gigabytes": saved([torch.zeros(1).expand(2**30)] * 4),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_nobody_packed_is_refused_and_takes_no_memory(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        unpack(FOREIGN[name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_bytes_of_flags_stay():
    bits = torch.tensor([0, 1, 2, 255], dtype=torch.uint8)
    for flags in (bits.view(torch.bool), torch.stack([bits, bits]).T.contiguous().T.view(torch.bool)):
        found = unpack(pack(flags))
        assert torch.equal(found.view(torch.uint8), flags.view(torch.uint8)) and found.stride() == flags.stride()


class Canvas(torch.Tensor):
    """What a subclass adds would be lost."""


def test_what_is_more_than_its_bits_cannot_be_packed():
    assert not can_be_packed([torch.zeros(2).as_subclass(Canvas)])
    assert not can_be_packed([10**5000]) and can_be_packed([10**3000])
    assert can_be_packed([torch.nn.Parameter(torch.zeros(2))])


def test_an_endless_shape_is_refused_before_it_is_multiplied():
    """The product of 100,000 factors would keep every thread of the process waiting for seconds."""
    for shape in ([9] * 65, [9] * 100_000, [10**4000], [2**63]):
        with pytest.raises(ValueError, match="no tensor has the type"):
            unpack(made(["tensor", "float32", shape, []], 4))


def test_more_text_than_anybody_needs_is_not_read():
    with pytest.raises(ValueError, match="bytes of text announced"):
        unpack(torch.cat([made("[]")[:3], torch.ones(5, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)]))
