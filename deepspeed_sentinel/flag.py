"""The flag alone: sees ``"sentinel": {"enabled": true}`` in the config of a script that knows nothing of this package.

torch calls ``begin`` at the end of its own import (entry points of the group ``torch.backends``), and deepspeed imports
torch before any part of itself. So ``begin`` comes before deepspeed or in the midst of its import, and
``deepspeed.initialize`` is wrapped when it is first looked at, ``from deepspeed import initialize`` included. The rest
of this package is imported once an engine has a config with a block.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

SWITCH = "DEEPSPEED_SENTINEL"  # "0" leaves deepspeed.initialize alone
BLOCK = "sentinel"


def begin() -> None:
    """Await deepspeed. Raises nothing: that would break ``import torch``."""
    if os.environ.get(SWITCH) != "0":
        sys.meta_path.insert(0, _Lookout())
        _await(sys.modules.get("deepspeed"))


class _Lookout:
    """Asked by the import system for every module, and finds none.

    Where a part of deepspeed is sought, deepspeed itself is there, if half made. No loader is replaced, so deepspeed
    stays what it is to whoever looks at its spec.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.startswith("deepspeed."):
            _await(sys.modules.get("deepspeed"))


def _await(module: Any) -> None:
    """Have ``module.initialize`` wrapped when it is first read; then nothing of this is left but the wrapper.

    The function may not be there yet. A property of the module's class comes before what the module holds.
    """
    plain = type(module)
    if not issubclass(plain, ModuleType) or hasattr(plain, "initialize"):
        return

    def done() -> None:
        module.__class__ = plain
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Lookout)]

    def read(_: ModuleType) -> Any:
        if "initialize" not in vars(module):
            raise AttributeError("initialize")  # Python asks the module's own __getattr__ next, which words it
        done()
        module.initialize = guarded(module.initialize)
        return module.initialize

    def replaced(_: ModuleType, value: Any) -> None:
        done()
        module.initialize = value

    try:
        module.__class__ = type(plain.__name__, (plain,), {"initialize": property(read, replaced)})
    except TypeError as error:  # somebody else's class of modules, which cannot be extended
        print(f"[sentinel] the flag in a DeepSpeed config does nothing in this process: {error}", file=sys.stderr)


def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    """``deepspeed.initialize``, and then a Sentinel for the engine if its config has a block that says so."""

    @functools.wraps(original)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        block = block_of(result[0])
        if block is not None:
            from deepspeed_sentinel.engine.launch import follow

            follow(result[0], block)
        return result

    initialize.guarded_by_sentinel = True  # type: ignore[attr-defined]
    return initialize


def block_of(engine: Any) -> Any:
    """The block of an engine's config as DeepSpeed has read it, from whatever it was given; None if there is none.

    A name that is nearly the block's gets a warning.
    """
    read = getattr(getattr(engine, "_config", None), "_param_dict", None)
    config = read if isinstance(read, Mapping) else getattr(engine, "config", None)
    if not isinstance(config, Mapping):
        say(f"cannot read the config of {type(engine).__name__}: if it has a block, it guards nothing")
        return None
    if config.get(BLOCK) is None:
        for name in config:
            if mistyped(name):
                say(meant(name))
    return config.get(BLOCK)


def meant(name: Any) -> str:
    """What to say of such a name."""
    return f'"{name}" in the DeepSpeed config guards nothing; did you mean "{BLOCK}"?'


def mistyped(name: Any) -> bool:
    """Whether a name is nearly the block's."""
    from difflib import SequenceMatcher

    matcher = SequenceMatcher(None, BLOCK, str(name).lower())
    return name != BLOCK and matcher.real_quick_ratio() > 0.8 and matcher.ratio() > 0.8


def say(text: str) -> None:
    """A line of DeepSpeed's log on rank 0, at a level that it shows."""
    from deepspeed.utils import logger
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_rank() == 0:
        logger.warning(f"[sentinel] {text}")
