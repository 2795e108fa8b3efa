"""DeepSpeed config files, and the block in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed_sentinel.config import BLOCK


def load_block(config: Any) -> dict[str, Any] | None:
    """The ``"sentinel"`` block of a DeepSpeed config given as a dict or as a path; None if absent."""
    if config is None:
        return None
    return (read_config(config) if isinstance(config, (str, Path)) else config).get(BLOCK)


def read_config(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed config as DeepSpeed reads it: JSON that may have comments and trailing commas.

    Raises:
        OSError: there is no such file.
        ValueError: it is not JSON, or no object.
    """
    import hjson  # comes with DeepSpeed

    try:
        config = hjson.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=dict)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"a DeepSpeed config is a JSON object, not a {type(config).__name__}")
    return config
