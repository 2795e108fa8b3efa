"""``python -m deepspeed_sentinel demo``: prepares, starts the job, shows it live, writes the results."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspeed_sentinel.demo.options import DemoOptions

if TYPE_CHECKING:
    from deepspeed_sentinel.demo.live import LiveView, PlainView
    from deepspeed_sentinel.demo.progress import DemoState

_NEEDED = ("rich", "matplotlib", "transformers", "tokenizers")
# Arguments not given are the attack's own defaults; these are shown in titles, so they are spelt out.
_DEFAULT_ARGUMENTS: dict[str, dict[str, Any]] = {"constant": {"value": 0.0}, "scaling": {"factor": -1}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demo on ``parser``."""
    default = DemoOptions()
    add = parser.add_argument
    add("--stages", type=int, default=default.stages, help="pipeline stages (default %(default)s)")
    add("--replicas", type=int, default=default.replicas, help="replicas of each stage (default %(default)s)")
    add("--steps", type=int, default=default.steps, help="training steps of each run (default %(default)s)")
    add("--attack", default=default.attack, help="constant, random_value, scaling, ... (default %(default)s)")
    add(
        "--attack-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the attack, repeatable",
    )
    add(
        "--attacker",
        action="append",
        metavar="STAGE,REPLICA",
        help=f"a worker that tampers, repeatable (default {' and '.join(f'{s},{r}' for s, r in default.attackers)})",
    )
    add("--direction", choices=("forward", "backward"), default=default.direction,
        help="forward: activations; backward: their gradients (default %(default)s)")  # fmt: skip
    add("--start-step", type=int, default=default.start_step, help="first attacked step (default %(default)s)")
    add("--out", default=default.out, help="folder for all output (default %(default)s)")
    add(
        "--seed",
        type=int,
        default=default.seed,
        help="seed of weights, data and attack (default %(default)s)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: one GPU a process where there are enough, else CPU")  # fmt: skip
    add("--tokenizer", choices=("byte", "bpe"), default=default.tokenizer,
        help="bpe trains a tokenizer on the text first (default %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status: 0 done, 1 failed, 2 bad options, 130 interrupted."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f'The demo needs {", ".join(missing)}: pip install ".[transformers,report]" in a clone',
            file=sys.stderr,
        )
        return 2
    try:
        options = options_from(args)
        _validate(options)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("Interrupted; all processes of the demo were ended.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def options_from(args: argparse.Namespace) -> DemoOptions:
    """The options that the command line asks for.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    given = dict(_parse_argument(text) for text in args.attack_arg)
    return DemoOptions(
        stages=args.stages,
        replicas=args.replicas,
        steps=args.steps,
        seed=args.seed,
        device=_device(args.device, args.stages * args.replicas),
        out=args.out,
        tokenizer=args.tokenizer,
        attack=args.attack,
        attack_arguments=given or _DEFAULT_ARGUMENTS.get(args.attack, {}),
        attackers=tuple(map(_parse_worker, args.attacker)) if args.attacker else DemoOptions.attackers,
        direction=args.direction,
        start_step=args.start_step,
    )


def _parse_argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        return name.strip() if equals else "", json.loads(value)
    except json.JSONDecodeError:
        raise ValueError(f"--attack-arg must be NAME=VALUE with a number, true or false, got {text!r}.") from None


def _parse_worker(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--attacker must be STAGE,REPLICA such as 1,2, got {text!r}.")
    return int(parts[0]), int(parts[1])


def _device(wanted: str, workers: int) -> str:
    if wanted == "cpu":
        return "cpu"
    import torch

    count = torch.cuda.device_count()
    if count >= workers:
        return "cuda"
    if wanted == "cuda":
        raise ValueError(
            f"--device cuda needs one GPU a process: {workers} (stages x replicas), found {count}. Use fewer "
            "--stages or --replicas, or --device cpu."
        )
    return "cpu"


def _validate(options: DemoOptions) -> None:
    """Refuse an impossible attack now, not after all processes have started."""
    from deepspeed_sentinel.config import SentinelConfig
    from deepspeed_sentinel.mesh import Mesh

    for injection in SentinelConfig.parse(options.sentinel_block("guarded")).inject:
        injection.check_attack()
        injection.check_mesh(Mesh(options.stages, options.replicas))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _prepare(options: DemoOptions) -> Path:
    """Clear what an earlier demo left in the folder, tokenise the text, write the options for the workers."""
    from deepspeed_sentinel import corpus

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("progress.jsonl", "summary.json", "loss.png", "evidence.png", "events.jsonl", "job.log"):
        (out / name).unlink(missing_ok=True)
    for name in ("attacked", "guarded", "overhead"):
        shutil.rmtree(options.sentinel_folder(name), ignore_errors=True)
    facts = corpus.prepare(options.corpus_folder, options.tokenizer, options.vocabulary)
    print(
        f"Text: {facts['files']} source files of Python's standard library, {facts['train_tokens']:,} tokens "
        f"to learn and {facts['held_out_tokens']:,} held out."
    )
    options_file = out / "options.json"
    options.save(options_file)
    return options_file


def follow(lines: Iterable[Mapping[str, Any]], state: DemoState, shown: LiveView | PlainView) -> None:
    """Take in new lines. Each is shown by itself, so that all is told in the order in which it happened."""
    for line in lines:
        state.apply(line)
        shown.update(state)


def _run(options: DemoOptions) -> int:
    from deepspeed_sentinel.demo import report
    from deepspeed_sentinel.demo.launch import error_tail, job
    from deepspeed_sentinel.demo.live import view
    from deepspeed_sentinel.demo.progress import DemoState, Reader

    try:
        options_file = _prepare(options)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    state, read = DemoState(), Reader(options.progress_file)
    state.message = f"Starting {options.workers} processes (some seconds)"
    with view(options) as shown, job(options, options_file) as process:
        running = True
        while running:
            running = process.poll() is None
            follow(read(), state, shown)
            if running:
                time.sleep(0.2)
    if process.returncode != 0 or not state.done:
        print(error_tail(options.job_log), file=sys.stderr)
        status = f"exit status {process.returncode}"
        print(f"demo: the job failed ({status}); all of its output: {options.job_log}", file=sys.stderr)
        return 1
    report.write(options, state)
    return 0
