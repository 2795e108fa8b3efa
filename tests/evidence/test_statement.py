"""A statement's bytes, and what else may come in their place."""

import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepspeed_sentinel.evidence.keeping import look_again
from deepspeed_sentinel.evidence.parts import Layout, digest_of
from deepspeed_sentinel.evidence.statement import _DTYPES, WORDS, Header, Malformed, Statement, raw
from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.evidence.transfer import Known
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh

CPU = torch.device("cpu")
MOST_BYTES = 1 << 16
KNOWN = Known(torch.rand(DIMENSIONS), torch.rand(DIMENSIONS, DIMENSIONS))
TENSORS = (torch.randn(2, 5, 6).bfloat16(), torch.arange(4), torch.tensor([True, False]), torch.tensor(1.5))
TOLD = Statement(3, (2**61 + 1, 5, 6), (KNOWN,), TENSORS)


def read(words, body):
    header = Header.from_words(np.asarray(words, "<i8"), MOST_BYTES)
    return Statement.from_parts(header, body, CPU)


@pytest.mark.parametrize("known", [(), (None,), (KNOWN,), (None, KNOWN, None), (KNOWN,) * 96])
def test_a_statement_travels_bit_by_bit(known):
    told = replace(TOLD, known=known)
    heard = read(told.header.to_words(), told.body())
    assert (heard.micro_batch, heard.seeds) == (3, (2**61 + 1, 5, 6))
    for one, other in zip(TENSORS, heard.tensors, strict=True):
        assert torch.equal(one, other) and (one.dtype, one.shape) == (other.dtype, other.shape)
    for one, other in zip(known, heard.known, strict=True):
        assert (one is None) == (other is None)
        if one:
            assert torch.equal(one.expected_K, other.expected_K) and torch.equal(one.w_KK, other.w_KK)


@pytest.mark.parametrize("tensor", [torch.tensor(3).expand(1), torch.tensor(3).expand(1, 1), torch.tensor(3).expand(2)])
def test_the_bits_of_an_expanded_tensor_are_those_of_its_copy(tensor):
    assert torch.equal(raw(tensor).view(torch.int64), tensor.clone().flatten())


def test_any_bits_travel():
    """Not a number and infinity are for the audit to judge, as for everybody else."""
    odd = torch.tensor([float("nan"), float("inf"), -0.0]).view(torch.int32)
    odd[0] |= 1  # another NaN
    told = replace(
        TOLD, tensors=(odd.view(torch.float32),), known=(Known(KNOWN.expected_K * float("nan"), KNOWN.w_KK),)
    )
    heard = read(told.header.to_words(), told.body())
    assert torch.equal(heard.tensors[0].view(torch.int32), odd)
    assert heard.known[0].expected_K.isnan().all()


DTYPE, DIMENSION_COUNT, FIRST_SIZE = 15, 16, 17  # of the first tensor
EDGES = [-(2**63), -1, 0, 1, 2, 97, 2**31, 2**40, 2**62, 2**63 - 1]


@pytest.mark.parametrize(
    ("word", "value", "why"),
    [
        (0, 2, "version"),
        (1, -1, "micro-batch"),
        (2, 9, "number of seeds"),
        (2, 1, "unused"),
        (6, 1, "unused"),
        (11, 97, "parts"),
        (12, 3, "more than 1 parts"),
        (13, 1, "more than 1 parts"),
        (14, 0, "number of tensors"),
        (14, 97, "number of tensors"),
        (14, 3, "the header announces"),
        (14, 2, "unused"),
        (DTYPE, len(_DTYPES), "dtype"),
        (DIMENSION_COUNT, 9, "dimensions"),
        (DIMENSION_COUNT, 2, "unused"),
        (FIRST_SIZE, -5, "dimension"),
        (FIRST_SIZE, 2**50, "dimension"),
        (FIRST_SIZE, 2000, "more than 65536 bytes"),
        (FIRST_SIZE, 3, "the header announces"),
        (DTYPE, 0, "the header announces"),
        (WORDS - 1, 1, "unused"),
    ],
)
def test_what_is_wrong_is_said(word, value, why):
    words = TOLD.header.to_words()
    assert words[DTYPE] == 2 and words[DIMENSION_COUNT] == 3 and words[FIRST_SIZE] == 2
    words[word] = value
    with pytest.raises(Malformed, match=why):
        read(words, TOLD.body())


def test_a_truth_value_must_be_one():
    told = replace(TOLD, tensors=(torch.tensor([True]),), known=())
    with pytest.raises(Malformed, match="truth value"):
        read(told.header.to_words(), told.body() + 1)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, WORDS - 1), st.one_of(st.sampled_from(EDGES), st.integers(-(2**63), 2**63 - 1)))),
    st.integers(0, 20_000),
    st.booleans(),
)
@example([(14, 0)], 0, False)
@example([(FIRST_SIZE, 2**62), (FIRST_SIZE + 1, 2**62)], 0, False)
@example([(FIRST_SIZE, 0), (FIRST_SIZE + 1, 2**15)], 16_746, False)
def test_whatever_comes_is_a_statement_within_the_bounds_or_malformed(changes, size, noise):
    words = TOLD.header.to_words()
    for index, value in changes:
        words[index] = value
    body = TOLD.body()
    body = torch.cat([body, torch.full((max(size - body.numel(), 0),), 0xFF, dtype=torch.uint8)])[:size]
    if noise:
        body = torch.randint(0, 256, body.shape, dtype=torch.uint8)
    try:
        heard = read(words, body)
    except Malformed:
        return
    assert sum(tensor.nbytes for tensor in heard.tensors) <= MOST_BYTES
    assert np.array_equal(heard.header.to_words(), words) and torch.equal(heard.body(), body)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3))
@example(TOLD.header.to_words().tobytes(), 0)
def test_no_bytes_make_a_header_raise_anything_else(raw, shift):
    raw = (b"\x01".ljust(8 * shift, b"\x00") + raw).ljust(8 * WORDS, b"\x00")[: 8 * WORDS]
    try:
        header = Header.from_words(np.frombuffer(raw, "<i8"), MOST_BYTES)
    except Malformed:
        return
    assert header.to_words().tobytes() == raw


def test_no_memory_is_taken_for_what_a_header_announces():
    """2^62 bytes would end the process; the body that would belong to it is never asked for."""
    words = TOLD.header.to_words()
    for word in range(FIRST_SIZE, FIRST_SIZE + 3):
        words[word] = 2**21 - 1
    with pytest.raises(Malformed):
        Header.from_words(words, 1 << 30)
    assert struct.calcsize("<q") * WORDS == words.nbytes


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4, 5), (1, 1, 1, 1, 1, 1, 1, 2), (4, 0), (0,)])
def test_whatever_is_a_statement_can_be_looked_at(dtype, shape):
    """An auditor must not stumble over what a witness may hand in."""
    layout = Layout(np.array([[3], [3], [3], [3]]), np.full((2, 4), 2))
    tensor = torch.full((math.prod(shape) * dtype.itemsize,), 1, dtype=torch.uint8).view(dtype).reshape(shape)
    told = Statement(0, (1, 2, 3), (None,), (tensor, torch.ones(5, 3)))
    heard = read(told.header.to_words(), told.body())
    look = look_again(heard, (FORWARD, SENT), 1, Mesh(5, 2), layout, CPU)
    assert look is None or look.digests.shape == (2,)
    alone = Statement(0, (1, 2, 3), (None,), (tensor,))
    look_again(read(alone.header.to_words(), alone.body()), (BACKWARD, RECEIVED), 1, Mesh(5, 2), layout, CPU)


@pytest.mark.parametrize(
    "shape", [(2**15, 0, 2**15, 2**15), (0, 2**15, 2**15), (2**15, 2**15, 6, 0), (2**16,) * 7 + (0,)]
)
def test_a_size_of_zero_does_not_hide_the_others(shape):
    """No byte follows, but whoever computes with the other sizes runs out of integers."""
    words = replace(TOLD, tensors=(torch.zeros(1),)).header.to_words()
    words[DIMENSION_COUNT] = len(shape)
    words[FIRST_SIZE : FIRST_SIZE + len(shape)] = shape
    with pytest.raises(Malformed, match="more than 65536 bytes"):
        Header.from_words(words, MOST_BYTES)


def test_a_shape_that_no_tensor_can_have_is_malformed():
    header = Header(0, (1, 2, 3), (), ((torch.float32, (2**62, 2**62, 0)),))
    with pytest.raises(Malformed, match="shape"):
        Statement.from_parts(header, torch.zeros(0, dtype=torch.uint8), CPU)


def test_complex_numbers_of_every_kind_travel():
    """DeepSpeed sends complex128 too, and a conjugate may be a view."""
    pair = torch.randn(2, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    for tensor in (pair, pair.conj(), pair.conj().imag):
        heard = read(replace(TOLD, tensors=(tensor,)).header.to_words(), replace(TOLD, tensors=(tensor,)).body())
        assert torch.equal(heard.tensors[0], tensor.resolve_conj())
        assert digest_of(tensor).tolist() == digest_of(heard.tensors[0]).tolist() != [0, 0]
