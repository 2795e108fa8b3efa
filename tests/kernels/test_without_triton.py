"""Where there is no Triton, or one that is too old for the kernels, everything takes the reference."""

import subprocess
import sys

import pytest

FAKES = {
    "none": "sys.modules['triton'] = None",
    "too old": "old = types.ModuleType('triton'); old.jit = lambda fn=None, *, do_not_specialize=None: fn\n"
    "old.language, old.__version__ = types.ModuleType('triton.language'), '3.1.0'\n"
    "sys.modules |= {'triton': old, 'triton.language': old.language}",
}
CODE = """
import pkgutil, sys, types
import torch
{fake}
import importlib
import deepspeed_sentinel.kernels as kernels
for module in pkgutil.iter_modules(kernels.__path__):
    importlib.import_module(f"{{kernels.__name__}}.{{module.name}}")
from deepspeed_sentinel.kernels.dispatch import runs_on_gpu, tl
print(tl, runs_on_gpu(types.SimpleNamespace(is_cuda=True)))
"""


@pytest.mark.parametrize("fake", FAKES)
def test_kernels_are_imported_and_not_used(fake):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(fake=FAKES[fake])], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-2:] == ["None", "False"]
