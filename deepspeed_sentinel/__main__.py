"""The command line: ``python -m deepspeed_sentinel run | check | report | demo | attacks | simulate``.

The script ``deepspeed-sentinel`` is the same; help shows the name that was called.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.config_file import load_block, read_config
from deepspeed_sentinel.flag import meant, mistyped

_NO_PIPELINE = (
    "zero_optimization.stage: got {}, and nothing is guarded then: sentinel watches DeepSpeed's pipeline engine, which "
    'takes ZeRO stages 0 and 1. Set one of these, or "sentinel": {{"enabled": false}}.'
)
_NO_BLOCK = 'no "sentinel" block: sentinel stays off. Add "sentinel": {"enabled": true} to switch it on.'

_ABOUT = "Guard a training run of DeepSpeed's pipeline engine, report on one, or attack one on purpose."
_RUN = "run a training script; the DeepSpeed config decides whether it is watched"
_RUN_EXAMPLE = "train.py --deepspeed_config ds_config.json"


def _program() -> str:
    """The name by which this was called."""
    script = "deepspeed-sentinel"
    return script if Path(sys.argv[0]).stem == script else "python -m deepspeed_sentinel"


def _example(arguments: str) -> dict[str, Any]:
    """What makes an argument parser show an example below its help, as it is."""
    return {
        "epilog": f"example:\n  {_program()} {arguments}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


class _Version(argparse.Action):
    """Looked up only when asked for: reading metadata takes a while."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        for package in ("deepspeed-sentinel", "deepspeed", "torch", "transformers"):
            try:
                print(package, version(package))
            except PackageNotFoundError:
                print(package, "is not installed")
        parser.exit()


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status. ``argv`` defaults to the process's arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher puts its own argument in front; it is meant for the script.
    from_launcher = []
    while arguments and arguments[0].startswith("--local_rank"):
        from_launcher.append(arguments.pop(0))
    if arguments[:1] == ["run"]:
        return _run(arguments[1:], from_launcher)
    parser = argparse.ArgumentParser(prog=_program(), description=_ABOUT, **_example("check ds_config.json"))
    parser.add_argument("--version", action=_Version, help="the installed versions, of torch and DeepSpeed too")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about, **_example(f"{name} {example}".rstrip()))

    command("run", _RUN, _RUN_EXAMPLE)
    check = command("check", "validate a DeepSpeed config file and print the effective settings", "ds_config.json")
    check.add_argument("config", help="path of a DeepSpeed config (JSON)")
    report = command(
        "report",
        "what happened in a run: a table, JSON, or one page for the browser",
        "sentinel_logs --html report.html",
    )
    demo = command(
        "demo",
        "train a small Llama three times: clean, attacked, attacked and guarded",
        "--attack scaling --attack-arg factor=-1 --attacker 1,2",
    )
    command("attacks", "list the attacks of the red team with their arguments", "")
    simulation = command(
        "simulate",
        "a whole mesh in one process: attack it, judge it, measure",
        "--stages 4 --replicas 4 --attack scaling --attack-arg factor=-1 --steps 60 --start 30",
    )
    # What a command needs is loaded when it is asked for: ``check`` is to answer at once.
    if arguments[:1] == ["demo"]:
        from deepspeed_sentinel.demo import cli as demo_cli

        demo_cli.add_arguments(demo)
    if arguments[:1] == ["simulate"]:
        from deepspeed_sentinel.simulation import cli as simulation_cli

        simulation_cli.add_arguments(simulation)
    if arguments[:1] == ["report"]:
        from deepspeed_sentinel.telemetry.report import cli as report_cli

        report_cli.add_arguments(report)
    parsed = parser.parse_args(arguments)
    if parsed.command == "check":
        return _check(parsed.config)
    if parsed.command == "attacks":
        from deepspeed_sentinel.attacks.cli import run as list_attacks

        return list_attacks()
    if parsed.command == "report":
        return report_cli.run(parsed)
    return simulation_cli.run(parsed) if parsed.command == "simulate" else demo_cli.run(parsed)


def _run(arguments: list[str], from_launcher: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"{_program()} run", description=_RUN, **_example(f"run {_RUN_EXAMPLE}"))
    parser.add_argument("script", help="training script that calls deepspeed.initialize")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    parsed = parser.parse_args(arguments)
    script = Path(parsed.script)
    if not (script.is_file() or (script / "__main__.py").is_file()):
        print(f"run: {parsed.script}: there is no such file", file=sys.stderr)
        return 2

    from deepspeed_sentinel.engine.launch import install

    install()
    sys.argv = [parsed.script, *from_launcher, *parsed.arguments]
    sys.path.insert(0, parsed.script.rpartition("/")[0] or ".")
    runpy.run_path(parsed.script, run_name="__main__")
    return 0


def _check(path: str) -> int:
    try:
        whole = read_config(path)
        block = load_block(whole)
        config = SentinelConfig.parse(block if block is not None else {})
    except OSError as error:
        print(f"{path}: {error.strerror or error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    if block is None:
        wrong = next(filter(mistyped, whole), None)
        print(
            f"{path}: {_NO_BLOCK if wrong is None else meant(wrong)}", file=sys.stdout if wrong is None else sys.stderr
        )
        return 0 if wrong is None else 1
    zero = whole.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if config.enabled and str(stage) in ("2", "3"):  # DeepSpeed takes a number in quotes too
        print(f"{path}: {_NO_PIPELINE.format(json.dumps(stage))}", file=sys.stderr)
        return 1
    how = 'set "enabled" to true' if "enabled" in block else 'add "enabled": true to the block'
    off = "" if config.enabled else f", but switched off: {how}, or sentinel stays off"
    print(f"{path}: valid{off}. Settings (* given, others default; null follows from the mesh):")
    for name, value in config.model_dump(mode="json").items():
        print(f" {'*' if name in block else ' '} {name} = {json.dumps(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
