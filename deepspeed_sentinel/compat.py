"""What has moved in Python and torch between the versions that are supported, and since when: nothing else knows."""

from __future__ import annotations

import sys
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import backends

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["all_gather_single", "precisions", "tomllib"]

# torch 2.13; it warns about the older name
all_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor

_BY_OPERATION = ("cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.matmul")


def precisions() -> tuple[object, ...]:
    """The settings by which float32 arithmetic may be done in fewer bits."""
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9
        return attrgetter(*(f"{one}.fp32_precision" for one in _BY_OPERATION))(backends)
    return backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
