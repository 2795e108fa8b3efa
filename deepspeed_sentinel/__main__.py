"""The command line: ``python -m deepspeed_sentinel run | check | demo | attacks | simulate``."""

from __future__ import annotations

import argparse
import runpy
import sys

from deepspeed_sentinel.config import SentinelConfig, load_block

_NO_BLOCK = 'no "sentinel" block: sentinel stays off. Add "sentinel": {"enabled": true} to switch it on.'


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status. ``argv`` defaults to the process's arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher puts its own argument in front; it is meant for the script.
    from_launcher = []
    while arguments and arguments[0].startswith("--local_rank"):
        from_launcher.append(arguments.pop(0))
    if arguments[:1] == ["run"]:
        return _run(arguments[1:], from_launcher)
    parser = argparse.ArgumentParser(prog="python -m deepspeed_sentinel", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run a training script; the DeepSpeed config decides whether it is watched")
    check = commands.add_parser("check", help="validate a DeepSpeed config file and print the effective settings")
    check.add_argument("config", help="path of a DeepSpeed config (JSON)")
    demo = commands.add_parser("demo", help="train a small Llama three times: clean, attacked, attacked and guarded")
    commands.add_parser("attacks", help="list the attacks of the red team with their arguments")
    simulation = commands.add_parser("simulate", help="a whole mesh in one process: attack it, judge it, measure")
    # Both modules are cheap to import; what they need beyond that they load when they run.
    from deepspeed_sentinel.demo import cli as demo_cli
    from deepspeed_sentinel.simulation import cli as simulation_cli

    demo_cli.add_arguments(demo)
    simulation_cli.add_arguments(simulation)
    parsed = parser.parse_args(arguments)
    if parsed.command == "check":
        return _check(parsed.config)
    if parsed.command == "attacks":
        from deepspeed_sentinel.attacks.cli import run as list_attacks

        return list_attacks()
    return simulation_cli.run(parsed) if parsed.command == "simulate" else demo_cli.run(parsed)


def _run(arguments: list[str], from_launcher: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m deepspeed_sentinel run")
    parser.add_argument("script", help="training script that calls deepspeed.initialize")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    parsed = parser.parse_args(arguments)

    from deepspeed_sentinel.engine.launch import install

    install()
    sys.argv = [parsed.script, *from_launcher, *parsed.arguments]
    sys.path.insert(0, parsed.script.rpartition("/")[0] or ".")
    runpy.run_path(parsed.script, run_name="__main__")
    return 0


def _check(path: str) -> int:
    try:
        block = load_block(path)
        config = SentinelConfig.parse(block if block is not None else {})
    except (OSError, ValueError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    if block is None:
        print(f"{path}: {_NO_BLOCK}")
        return 0
    print(f"{path}: valid. Effective settings (* given, others default):")
    for name in SentinelConfig.model_fields:
        value = getattr(config, name)
        shown = [entry.model_dump() for entry in value] if name == "inject" else value
        print(f" {'*' if name in block else ' '} {name} = {shown!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
