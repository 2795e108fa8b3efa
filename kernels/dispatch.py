"""Where an operation runs: Triton kernels on GPU tensors (CUDA or HIP), the torch reference everywhere else.

The reference is the definition and runs on any device. TRITON_INTERPRET=1 sends CPU tensors through the kernels
too, in Triton's interpreter; it must be set before triton is imported and is for tests only.
"""

from __future__ import annotations

import os
from importlib import import_module
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch

triton: Any
tl: Any
try:
    triton, tl = import_module("triton"), import_module("triton.language")
    if "do_not_specialize_on_alignment" not in signature(triton.jit).parameters:  # triton 3.2, which torch 2.6 brings
        raise ImportError(f"triton {triton.__version__} is older than the kernels")
except ImportError:  # or none for this platform: kernels are left as plain functions that nobody calls
    triton, tl = SimpleNamespace(jit=lambda function=None, **_: function or (lambda decorated: decorated)), None

INTERPRETED = tl is not None and os.environ.get("TRITON_INTERPRET") == "1"
# Sums are to have the same bits on every GPU, so the compiler may not decide where a product is fused into a sum.
LAUNCH = {"enable_fp_fusion": False}
# The dtypes that kernels read; others (float64) take the reference.
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def runs_on_gpu(x: torch.Tensor) -> bool:
    """Whether kernels can read this tensor where it lies."""
    return tl is not None and (x.is_cuda or (INTERPRETED and x.device.type == "cpu"))


def runs_on_triton(x: torch.Tensor) -> bool:
    """Whether a kernel, not the reference, handles this floating-point tensor."""
    return runs_on_gpu(x) and x.dtype in KINDS


def integer_view(x: torch.Tensor) -> torch.Tensor:
    """The same elements as integers of their size; kernels load bits and cast them to float32 themselves."""
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def check_output(name: str, out: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Raise ValueError unless ``out`` has this dtype and shape and lives where ``like`` does."""
    if out.dtype != dtype or tuple(out.shape) != shape or out.device != like.device:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} must be {kind} {list(shape)} on {like.device}, got {str(out.dtype).removeprefix('torch.')} "
            f"{list(out.shape)} on {out.device}"
        )


def check_contiguous(**outputs: torch.Tensor) -> None:
    """Raise ValueError unless all are contiguous."""
    for name, out in outputs.items():
        if not out.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {out.stride()} for shape {list(out.shape)}")
