"""``python -m deepspeed_sentinel simulate``: one run, or a sweep over many."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspeed_sentinel.attacks.loading import parse_arguments
from deepspeed_sentinel.config_file import load_block
from deepspeed_sentinel.simulation.options import SimulationOptions
from deepspeed_sentinel.simulation.processes import one_thread_pool, run_alone
from deepspeed_sentinel.simulation.sizes import SIZES
from deepspeed_sentinel.telemetry.report.words import many

if TYPE_CHECKING:
    from deepspeed_sentinel.judgement.verdict import Verdict
    from deepspeed_sentinel.simulation.run import Simulation

_NEEDED = ("rich", "transformers", "tokenizers")
_RESULT = "result.json"
_WORTH_A_PROCESS = 50  # steps; starting a process takes as long as a few dozen of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a simulation on ``parser``."""
    _mesh(_Group(parser, "mesh", "how many workers, and who serves which column"))
    _attack(_Group(parser, "attack", "what is done to it, and by whom"))
    _training(_Group(parser, "model and data", "what is trained, and how long"))
    _judgement(_Group(parser, "judgement", "how it is judged"))
    _output(_Group(parser, "output and sweeps", "what is written, and many runs at once"))


class _Group:
    """Options under one heading of the help; their defaults are those of ``SimulationOptions``."""

    def __init__(self, parser: argparse.ArgumentParser, title: str, about: str) -> None:
        self.add = parser.add_argument_group(title, about).add_argument
        self._default = {field.name: field.default for field in fields(SimulationOptions)}

    def number(self, name: str, kind: type, text: str) -> None:
        option, default = f"--{name.replace('_', '-')}", self._default[name]
        shown = "N" if kind is int else "SHARE"
        self.add(option, type=kind, default=default, metavar=shown, help=f"{text} (default %(default)s)")

    def choice(self, name: str, allowed: tuple[str, ...], text: str) -> None:
        self.add(f"--{name}", choices=allowed, default=self._default[name], help=f"{text} (default %(default)s)")


def _mesh(group: _Group) -> None:
    group.number("stages", int, "pipeline stages")
    group.number("replicas", int, "replicas of each stage")
    group.add(
        "--wiring", choices=("heal", "static", "shuffle"), help="how columns are dealt (default: as --config says)"
    )


def _attack(group: _Group) -> None:
    add = group.add
    add("--attack", metavar="NAME", help="an attack (see: attacks), or path/to/file.py:ClassName; without it, nobody")
    add("--attack-arg", action="append", default=[], metavar="NAME=VALUE", help="argument of the attack, repeatable")
    group.number("malicious", float, "share of each middle stage's workers that tamper")
    add("--attacker", action="append", default=[], metavar="STAGE,REPLICA", help="in place of that share, repeatable")
    add("--majority", action="store_true", help="allow half of a stage's workers or more to be malicious")
    group.choice("direction", ("forward", "backward", "both"), "which messages are tampered with")
    group.number("start", int, "first step in which the attack may act")


def _training(group: _Group) -> None:
    add = group.add
    group.choice("model", tuple(SIZES), "size of the Llama; tiny is for a quick look, see docs/simulator.md")
    add("--moe", action="store_true", help="a mixture of experts in place of each MLP")
    group.number("steps", int, "training steps")
    group.number("seed", int, "of weights, data, wirings, attackers and attack")
    sizes = {
        "--micro-batches": "micro-batches of a column",
        "--micro-batch-size": "sequences of a micro-batch",
        "--sequence": "tokens of a sequence",
    }
    for option, what in sizes.items():
        add(option, type=int, default=0, metavar="N", help=f"{what} (default: by the model's size)")
    changes = ("none", "kinds", "crossing", "spells", "turn", "spike", "spikes", "rate", "sequence")
    group.choice("change", changes, "an honest change that training goes through")
    group.number("change_at", int, "its first step")
    group.choice("dtype", ("float32", "bfloat16"), "what to compute in")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default %(default)s)")
    add("--threads", type=int, default=0, metavar="N",
        help="of the CPU; 0 is 1 for tiny, which leaves a core to its clean run")  # fmt: skip
    group.number("chunk", int, "micro-batches computed at once, 0 for all; fewer need less memory")


def _judgement(group: _Group) -> None:
    add = group.add
    add(
        "--config", type=Path, metavar="FILE", help='JSON with a "sentinel" block: how to judge (default: its defaults)'
    )
    group.choice("guard", ("on", "off"), "off lets the attack through")
    group.number("twins_every", int, "one step in so many is a twin step, 0 on suspicion alone")
    group.choice("verifier", ("trusted", "receiver"), "who computes the statistics; a malicious receiver may lie")
    group.choice("evidence", ("paper", "all"), "the four distances of the paper alone, or every statistic")
    group.choice(
        "procedure", ("ours", "paper"), "how to judge; paper: as arXiv 2603.03592, messages of --direction alone"
    )
    group.number("honest_steps", int, "steps that --procedure paper takes for honest; --start must not be below")
    group.number("stop_after", int, "end so many steps after all who tamper are convicted, 0 never")


def _output(group: _Group) -> None:
    add = group.add
    add("--out", type=Path, metavar="FILE", help=f"where the result goes (default: {_RESULT}, or as the sweep says)")
    add("--events", type=Path, metavar="FOLDER", help="write there what a live run writes, for: report FOLDER")
    add("--no-clean", action="store_true", help="leave out the clean run of the same seed, and so loss.clean")
    add("--sweep", type=Path, metavar="TOML", help="run all of a sweep file; what its table already has is kept")
    add("--processes", type=int, default=0, metavar="N", help="of a sweep; 0 is one a core (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run; returns the exit status: 0 done, 1 failed, 2 bad options, 130 interrupted."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f'simulate needs {", ".join(missing)}: pip install ".[transformers,report]" in a clone',
            file=sys.stderr,
        )
        return 2
    try:
        if args.sweep is not None:
            from deepspeed_sentinel.simulation.sweep import Sweep

            sweep = Sweep.read(args.sweep, args.out, args.processes)
        else:
            options = options_from(args)
            if args.events and (options.guard == "off" or options.procedure == "paper"):
                raise ValueError("--events writes what our guard found: not with --guard off or --procedure paper")
        if args.sweep is not None and args.events:
            raise ValueError("--events is of one run: not with --sweep")
    except (ValueError, OSError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        if args.sweep is not None:
            return sweep.run()
        _set_threads(args.threads, options)
        document = simulate(options, not args.no_clean, args.events)
    except (ValueError, OSError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what a sweep has finished stays in its table.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    out = args.out or Path(_RESULT)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(summary(document))
    elsewhere = "" if args.out else "; --out FILE writes it elsewhere"
    print(f"Result written to {out.absolute()}{elsewhere}")
    if args.events:
        folder = args.events.absolute()
        print(f"Events written to {folder}: deepspeed-sentinel report {folder} shows them")
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def options_from(args: argparse.Namespace) -> SimulationOptions:
    """The options that the command line asks for.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    names = {field.name for field in fields(SimulationOptions)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given["attack_arguments"] = parse_arguments(args.attack_arg)
    given["attackers"] = tuple(parse_worker(text) for text in args.attacker)
    given["device"] = device(args.device)
    if args.attack is None:
        if args.attack_arg or args.attacker:
            raise ValueError("--attack-arg or --attacker without --attack: say which attack")
        given["malicious"] = 0.0
    if args.config is not None:
        block = load_block(args.config)
        if block is None:
            raise ValueError(f'--config {args.config}: it has no "sentinel" block')
        given["sentinel"] = block
    return SimulationOptions(**given)


def parse_worker(text: str) -> tuple[int, int]:
    """``"1,2"`` to (1, 2).

    Raises:
        ValueError: anything else.
    """
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--attacker must be STAGE,REPLICA such as 1,2, got {text!r}")
    return int(parts[0]), int(parts[1])


def device(wanted: str) -> str:
    """ "cpu" or "cuda".

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if wanted == "cpu":
        return "cpu"
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU found; use --device cpu")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _set_threads(wanted: int, options: SimulationOptions) -> None:
    import torch

    if wanted or options.model == "tiny":
        torch.set_num_threads(wanted or 1)


def simulate(options: SimulationOptions, with_clean: bool, events: Path | None = None) -> dict[str, Any]:
    """One run with a progress bar, and the clean run of the same seed that it is compared with.

    A tiny model computes on one core, so its clean run goes to another at the same time.
    """
    from deepspeed_sentinel.simulation.run import Simulation

    compare = with_clean and options != options.honest()
    aside = options.model == "tiny" and options.device == "cpu" and options.steps >= _WORTH_A_PROCESS
    with one_thread_pool(1) as pool:
        clean = pool.submit(run_alone, options.honest()) if compare and aside else None
        with _bar(options.attack or "no attack", options.steps) as step:
            document = _recorded(Simulation(options), events, step) if events else Simulation(options).run(step)
        if clean is not None:
            document["loss"]["clean"] = clean.result()["loss"]["clean"]
    if compare and clean is None:
        with _bar("clean run", options.steps) as step:
            document["loss"]["clean"] = Simulation(options.honest()).run(step)["loss"]["clean"]
    return document


def _recorded(simulation: Simulation, folder: Path, step: Callable[[Verdict | None], None]) -> dict[str, Any]:
    from deepspeed_sentinel.simulation.recording import Recorder

    recorder = Recorder(simulation, folder)

    def each_step(verdict: Verdict | None) -> None:
        assert verdict is not None, "what records is guarded"
        recorder.step(verdict)
        step(verdict)

    document = simulation.run(each_step)
    recorder.end()
    return document


@contextmanager
def _bar(name: str, steps: int) -> Iterator[Callable[[Verdict | None], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=steps, said="")

        def advance(verdict: Verdict | None) -> None:
            said = "" if verdict is None else f"{int(verdict.convicted.sum())} convicted"
            progress.update(task, advance=1, said=said)

        yield advance


def summary(document: dict[str, Any]) -> str:
    """A result in a few lines."""

    def shown(value: float | None, form: str = ".3f", missing: str = "undefined") -> str:
        return missing if value is None else format(value, form)

    malicious, convicted = len(document["malicious"]), len(document["convicted"])
    who = many(malicious, "malicious worker") if malicious else "nobody tampered"
    lines = [f"{who}, {convicted} convicted"]
    if document["details"]["guard"] == "off":
        lines = [f"{who}; not judged, since the guard is off"]
    elif malicious:
        lines[0] += (
            f", {document['false_convictions']} of them wrongly: F1 {shown(document['f1'])}, precision "
            f"{shown(document['precision'])}, recall {shown(document['recall'])}"
        )
        first, most = document["detection_steps_mean"], document["detection_steps_max"]
        took = "none" if first is None else f"{first:.1f} steps after it began on average, at most {most}"
        lines.append(f"first alarm of a malicious worker: {took}")
    rate = document["false_alarm_rate"]
    if document["details"]["guard"] != "off":
        alarms = "" if rate is None else f", {many(document['false_alarms'], 'false alarm')} ({rate:.2%})"
        lines.append(f"{many(document['judged_messages'], 'message')} judged{alarms}")
    names = {"attacked": "attacked (no guard)"}
    losses = (f"{names.get(name, name)} {shown(value, missing='not run')}" for name, value in document["loss"].items())
    lines += [
        f"held-out loss: {', '.join(losses)}",
        f"{document['seconds']:.0f} s, {document['details']['seconds_a_step']:.3f} s a step",
    ]
    return "\n".join(lines)
