"""What a module keeps beside its parameters: which of it can be read, compared and set again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from deepspeed_sentinel.engine.packed import PLAIN, has_bits

_TORCHS_OWN = vars(nn.Module()).keys() - {"training"}  # which hooks there are, and the like


def numbers(module: nn.Module) -> dict[str, Any]:
    """Its plain attributes: numbers, flags, texts and None."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in _TORCHS_OWN and (type(value) in PLAIN or isinstance(value, np.number | np.bool_))
    }


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Those that are plain attributes of it and that nothing is learnt of."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if type(value) is torch.Tensor and is_readable(value) and not value.requires_grad
    }


def is_batch_norm(module: nn.Module) -> bool:
    """Of torch's own, which in training uses nothing of what it keeps: one of somebody else's may."""
    return isinstance(module, _NormBase) and type(module).__module__.startswith("torch.nn.modules.")


def size_in_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def version(tensor: torch.Tensor) -> int:
    """Its version counter, or -1 where it has none."""
    return -1 if not has_values(tensor) or tensor.is_inference() else tensor._version


def is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def has_values(tensor: torch.Tensor) -> bool:
    """None on the meta device, or of a lazy module, has."""
    return not (nn.parameter.is_lazy(tensor) or tensor.is_meta)


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether its bits can be read as they lie."""
    return has_values(tensor) and type(tensor) is torch.Tensor and has_bits(tensor)


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether each can take the other's values."""
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def with_value(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tensor with another's value: the same one, since others may hold it too, or a new one where that cannot be
    written to (made by ``expand``, or in inference mode)."""
    try:
        if is_plain(tensor) and alike(tensor, value):
            return tensor.copy_(value)
        tensor.data = value.clone()
    except RuntimeError:
        return value.clone()
    return tensor
