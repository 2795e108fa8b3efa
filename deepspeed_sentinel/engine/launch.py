"""Ways in: attach to an engine, initialize in place of DeepSpeed's, or install for code that stays as it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed

from deepspeed_sentinel.config import SentinelConfig, load_block
from deepspeed_sentinel.engine.sentinel import Sentinel

_deepspeed_initialize = deepspeed.initialize


def attach(engine: Any, config: SentinelConfig | Mapping[str, Any] | None = None) -> Sentinel:
    """Watch an engine that ``deepspeed.initialize`` returned. To be called on every rank.

    Args:
        engine: a PipelineEngine.
        config: settings; by default the ``"sentinel"`` block of the engine's DeepSpeed config. Given here, the
            settings count as enabled.

    Returns:
        The handle; ``handle.detach()`` gives the engine back as it was.

    Raises:
        ValueError: invalid settings, an engine that is not supported, or no settings at all.
    """
    if config is None:
        config = load_block(engine.config)
        if config is None:
            raise ValueError(
                'no settings: pass config, or put "sentinel": {"enabled": true} into the DeepSpeed config.'
            )
    return Sentinel(engine, SentinelConfig.parse(config))


@functools.wraps(_deepspeed_initialize)
def initialize(*args: Any, **kwargs: Any) -> Any:
    """``deepspeed.initialize``, with a Sentinel attached if the DeepSpeed config's ``"sentinel"`` block says so."""
    block = _block_of_call(args, kwargs)
    config = SentinelConfig.parse(block) if block is not None else None
    result = _deepspeed_initialize(*args, **kwargs)
    if config is not None and config.enabled:
        Sentinel(result[0], config)
    return result


def install() -> Callable[[], None]:
    """Make ``deepspeed.initialize`` attach Sentinels from now on; returns a function that undoes it."""
    deepspeed.initialize = initialize

    def uninstall() -> None:
        deepspeed.initialize = _deepspeed_initialize

    return uninstall


def _block_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The block in the config of a call, found before any engine is built so that mistakes end at once."""
    call = inspect.signature(_deepspeed_initialize).bind(*args, **kwargs).arguments
    config = call.get("config")
    if config is None:
        config = call.get("config_params")
    if config is None:
        config = getattr(call.get("args"), "deepspeed_config", None)
    return load_block(config)
