"""What a replica is given, without processes: what one rank sends is what the other receives."""

from collections import deque

import pytest
import torch

from deepspeed_sentinel.response import healing

CPU = torch.device("cpu")


def tensors(seed):
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(4, 6, generator=draw)),
        torch.randn(5, 3, generator=draw).t(),
        torch.randn(12, generator=draw)[::2],
        torch.randn(7, generator=draw).to(torch.bfloat16),
        torch.rand(9, generator=draw) < 0.5,
        torch.tensor(float(seed)),
        torch.zeros(0, 3),
    ]


@pytest.fixture
def wire(monkeypatch):
    """{(from, to): what is under way}; ``wire.rank`` is who acts."""

    class Wire(dict):
        rank = 0

    lines = Wire()

    def send(tensor, dst, group):
        assert tensor.is_contiguous() and tensor.dtype == torch.uint8
        lines.setdefault((lines.rank, dst), deque()).append(tensor.clone())

    def recv(tensor, src, group):
        assert tensor.is_contiguous() and tensor.dtype == torch.uint8
        tensor.copy_(lines[src, lines.rank].popleft())

    monkeypatch.setattr(healing.dist, "get_rank", lambda: lines.rank)
    monkeypatch.setattr(healing.dist, "send", send)
    monkeypatch.setattr(healing.dist, "recv", recv)
    return lines


def test_receivers_get_every_bit_in_place_and_others_keep_theirs(wire):
    held = {rank: tensors(seed=rank) for rank in (4, 5, 6, 7)}
    places = {rank: [tensor.data_ptr() for tensor in of_rank] for rank, of_rank in held.items()}
    for rank in (5, 4, 6, 7):  # the source first: nobody else waits here
        wire.rank = rank
        healing.heal(held[rank], source=5, receivers=[4, 7], group=None, device=CPU)
    for rank, seed in {4: 5, 5: 5, 6: 6, 7: 5}.items():
        for tensor, expected in zip(held[rank], tensors(seed), strict=True):
            assert torch.equal(tensor, expected)
        assert [tensor.data_ptr() for tensor in held[rank]] == places[rank]
    assert sorted(wire) == [(5, 4), (5, 7)] and not any(wire.values())
