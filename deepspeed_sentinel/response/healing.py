"""A replica whose weights are not those of the majority is given the majority's, tensor by tensor.

The first replica of the majority sends to each that needs it, over the group of the stage's replicas, in the order of
the list. It is no broadcast: that would write into the sound replicas as well, so that a worker that lies about its own
weights could hand them to all. Whether the right ones arrived is for the caller to see, by another digest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist


@torch.no_grad()
def heal(
    tensors: Sequence[torch.Tensor],
    source: int,
    receivers: Collection[int],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """Send or receive all tensors in place, or do nothing: to be called on the source and on all receivers.

    Args:
        tensors: of the same layout on the source and the receivers, of any dtype, strides and device.
        source: global rank whose tensors are right.
        receivers: global ranks that are to hold the same.
        group: of the stage's replicas.
        device: what the group's backend sends from; tensors elsewhere take a copy on the way.
    """
    rank = dist.get_rank()
    for tensor in tensors:
        if not tensor.numel():
            continue
        if rank == source:
            octets = _octets(tensor, device)
            for receiver in sorted(receivers):
                dist.send(octets, receiver, group=group)
        elif rank in receivers:
            there = tensor.detach().to(device).contiguous()
            dist.recv(_octets(there, device), source, group=group)
            if there.data_ptr() != tensor.data_ptr():
                tensor.copy_(there)


def _octets(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 [bytes] on ``device``, of the tensor itself where it lies there without gaps. Every backend sends bytes."""
    return tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8)
