"""``python -m deepspeed_sentinel attacks``: every built-in attack, its arguments and what it does."""

from __future__ import annotations

import inspect

from deepspeed_sentinel.attacks.base import attack_class, attack_names


def describe(name: str) -> tuple[str, str]:
    """(arguments with their defaults, first line of the documentation) of a registered attack."""
    cls = attack_class(name)
    parameters = inspect.signature(cls).parameters.values()
    arguments = ", ".join(
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}={_shown(parameter.default)}"
        for parameter in parameters
    )
    return arguments, (inspect.getdoc(cls) or "").split("\n", 1)[0]


def _shown(default: object) -> str:
    return repr(list(default)) if isinstance(default, tuple) else repr(default)


def run() -> int:
    """Print the list; returns the exit status."""
    for name in attack_names():
        arguments, line = describe(name)
        quoted = line.replace("``", "'")  # names of arguments
        print(f"{name}({arguments})\n    {quoted}")
    return 0
