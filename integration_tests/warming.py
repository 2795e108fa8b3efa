"""What the nursery does once, beside its imports, that every process would do for itself."""

from __future__ import annotations

import contextlib
import importlib

WITH_AN_ENGINE = ("numpy.ma", "torch.profiler._cupti_monitor", "deepspeed.module_inject.auto_ep_layer")


def engine() -> None:
    """What the first engine imports, as far as this version has it, and DeepSpeed's CPU communication op.

    To load it each process would ask the compiler and ninja first.
    """
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()
    for name in WITH_AN_ENGINE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def conversions() -> None:
    """Compile the patterns for weights of other models' names: whoever saves or loads a model does, for a second."""
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
