"""Ways in: the flag, attach to an engine, initialize in place of DeepSpeed's, or install where the flag is not seen."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel import flag
from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.ending import refused_once
from deepspeed_sentinel.engine.sentinel import Sentinel


def attach(engine: Any, config: SentinelConfig | Mapping[str, Any] | None = None) -> Sentinel:
    """Watch an engine that ``deepspeed.initialize`` returned. To be called on every rank.

    Args:
        engine: a PipelineEngine.
        config: settings; by default the ``"sentinel"`` block of the engine's DeepSpeed config. Given here, the
            settings count as enabled.

    Returns:
        The handle; ``handle.detach()`` gives the engine back as it was. Where the flag has attached one with these
        settings already, that one.

    Raises:
        ValueError: invalid settings, an engine that is not supported, one attached with other settings, or no settings
            at all.
    """
    if config is None:
        config = flag.block_of(engine)
        if config is None:
            raise ValueError(
                'no settings: pass config, or put "sentinel": {"enabled": true} into the DeepSpeed config.'
            )
    with _refused_once():
        parsed = SentinelConfig.parse(config)
        there = getattr(engine, "sentinel", None)
        return there if isinstance(there, Sentinel) and there.has(parsed) else Sentinel(engine, parsed)


@functools.wraps(deepspeed.initialize)
def initialize(*args: Any, **kwargs: Any) -> Any:
    """``deepspeed.initialize``, with a Sentinel attached if the DeepSpeed config's ``"sentinel"`` block says so.

    Where the flag would say in one line why it does not guard, this raises ValueError.
    """
    result = deepspeed.initialize(*args, **kwargs)
    block = flag.block_of(result[0])
    with _refused_once():
        wanted = block is not None and SentinelConfig.parse(block).enabled
    if wanted:
        attach(result[0], block)
    return result


def _refused_once() -> AbstractContextManager[None]:
    return refused_once(dist.get_rank() if dist.is_initialized() else 0)


def follow(engine: Any, block: Any) -> None:
    """Do what a block in the config of a script that knows nothing of Sentinel says, or say why not."""
    with _refused_once():
        config = SentinelConfig.parse(block)
    if not config.enabled:
        if "enabled" not in block:
            flag.say('not guarding: the "sentinel" block has no "enabled": true')
    elif not isinstance(engine, PipelineEngine):
        flag.say(
            f"NOT guarding this {type(engine).__name__}: Sentinel watches what passes between pipeline stages, so it "
            "needs a deepspeed.PipelineModule (with ZeRO stage 1 at most)"
        )
    else:
        attach(engine, config)


def install() -> Callable[[], None]:
    """Make ``deepspeed.initialize`` see the flag from now on, where torch has not had it do so.

    A module that has imported the function by name gets the new one too.

    Returns:
        A function that undoes it.
    """
    original = deepspeed.initialize
    if hasattr(original, "guarded_by_sentinel"):
        return lambda: None
    wrapped = flag.guarded(original)

    def put(new: Any, old: Any) -> None:
        for module in list(sys.modules.values()):
            if isinstance(module, ModuleType):
                for name in [name for name, value in vars(module).items() if value is old]:
                    setattr(module, name, new)

    put(wrapped, original)
    return lambda: put(original, wrapped)
