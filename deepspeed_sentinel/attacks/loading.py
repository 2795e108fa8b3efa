"""Attacks from a user's own file, and their arguments from the command line."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

_SUFFIX = ".py"


def is_path(name: str) -> bool:
    """Whether ``name`` means a class in a file rather than a registered attack."""
    return name.rpartition(":")[0].endswith(_SUFFIX) or name.endswith(_SUFFIX)


def files_named(settings: Any) -> list[str]:
    """Every name of a class in a file in some settings, such as an attack's name and arguments, however deep."""
    if isinstance(settings, str):
        return [settings] if is_path(settings) else []
    if isinstance(settings, Mapping):
        settings = settings.values()
    elif not isinstance(settings, (list, tuple)):
        return []
    return [name for entry in settings for name in files_named(entry)]


def check_path(name: str) -> tuple[Path, str]:
    """File and class that ``path/to/file.py:ClassName`` names. Nothing of the file is run.

    Raises:
        ValueError: no such file, or no class.
    """
    path, _, class_name = name.rpartition(":")
    if not path.endswith(_SUFFIX) or not class_name:
        raise ValueError(f"attack {name!r}: say which class of the file, as in path/to/file.py:ClassName")
    if not Path(path).is_file():
        raise ValueError(f"attack {name!r}: there is no file {path!r}")
    return Path(path), class_name


def load_class(name: str) -> type:
    """The class that ``path/to/file.py:ClassName`` names; runs the file.

    Raises:
        ValueError: no such file, it does not run, or it has no such class.
    """
    path, class_name = check_path(name)
    module = _module(path, name)
    cls = getattr(module, class_name, None)
    if not inspect.isclass(cls):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise ValueError(f"attack {name!r}: {path} has no class {class_name!r}; it has: {', '.join(classes) or 'none'}")
    return cls


def _module(path: Path, name: str) -> ModuleType:
    # One module a file, whatever its name: two users' attacks.py must not be taken for each other.
    module_name = f"_deepspeed_sentinel_attack_{zlib.crc32(str(path.resolve()).encode()):08x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ValueError(f"attack {name!r}: {path} does not run: {type(error).__name__}: {error}") from error
    return module


def parse_arguments(texts: Iterable[str]) -> dict[str, Any]:
    """``["factor=-1", "inner=scaling"]`` to ``{"factor": -1, "inner": "scaling"}``: JSON where it is JSON, else text.

    Raises:
        ValueError: not of the form name=value.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"--attack-arg must be NAME=VALUE, got {text!r}")
        try:
            arguments[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name.strip()] = value
    return arguments
