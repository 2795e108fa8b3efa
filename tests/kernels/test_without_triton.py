"""Where there is no Triton, or one that is too old for the kernels, everything takes the reference."""

import json
import subprocess
import sys

FAKES = {
    "none": "sys.modules['triton'] = None",
    "too old": "old = types.ModuleType('triton'); old.jit = lambda fn=None, *, do_not_specialize=None: fn\n"
    "old.language, old.__version__ = types.ModuleType('triton.language'), '3.1.0'\n"
    "sys.modules |= {'triton': old, 'triton.language': old.language}",
}
# One process for all, since torch takes seconds to load.
CODE = """
import importlib, json, pkgutil, sys, types
import torch
for name, fake in json.loads(sys.argv[1]).items():
    for loaded in [one for one in sys.modules if one.partition(".")[0] in ("triton", "deepspeed_sentinel")]:
        del sys.modules[loaded]
    exec(fake)
    kernels = importlib.import_module("deepspeed_sentinel.kernels")
    modules = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    for module in modules:
        importlib.import_module(f"{kernels.__name__}.{module}")
    dispatch = importlib.import_module(f"{kernels.__name__}.dispatch")
    print(name, len(modules) > 5, dispatch.tl, dispatch.runs_on_gpu(types.SimpleNamespace(is_cuda=True)), sep=", ")
"""


def test_kernels_are_imported_and_not_used():
    done = subprocess.run([sys.executable, "-c", CODE, json.dumps(FAKES)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name}, True, None, False" for name in FAKES]
