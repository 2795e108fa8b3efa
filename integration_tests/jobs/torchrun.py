"""torchrun with its options, but workers are forked from it, once it has imported what costs each of them seconds."""

from __future__ import annotations

import contextlib
import importlib
import runpy
import sys
from collections.abc import Sequence

import deepspeed  # noqa: F401
import torch.utils.cpp_extension  # noqa: F401
from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch


def worker(script: str, *arguments: str) -> None:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def main(options: Sequence[str]) -> None:
    with contextlib.suppress(ImportError):  # torch's compiler and more; DeepSpeed 0.16 has none
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    asked = run.parse_args(options)
    config, *_ = run.config_from_args(asked)
    config.start_method = "fork"
    elastic_launch(config, worker)(asked.training_script, *asked.training_script_args)


if __name__ == "__main__":
    main(sys.argv[1:])
