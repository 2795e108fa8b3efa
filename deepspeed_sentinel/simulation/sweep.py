"""Sweeps over attacks, strengths, seeds and whatever else a run takes: parallel, resumable, one table.

Runs that differ in the attack alone have their steps before ``start`` in common, and train them once (``branching``).

A sweep file:

    out = "sweep.jsonl"          # or .parquet; beside the sweep file
    clean = true                 # also the clean run of each seed, once for all attacks

    [base]                       # options that all runs share, by the names of the command line
    stages = 8
    steps = 200

    [grid]                       # options that are varied, each a list
    seed = [0, 1, 2]
    direction = ["forward", "backward"]

    [[attack]]
    name = "scaling"
    arguments = {}               # as they are
    vary = {factor = [-1, 2]}    # strengths, each a list
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed_sentinel.compat import tomllib
from deepspeed_sentinel.simulation.options import SimulationOptions, trunk_of
from deepspeed_sentinel.simulation.processes import grow_trunk, one_thread_pool, run_alone

_KEYS = {"out", "clean", "base", "grid", "attack"}


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep file and where their results go.

    Attributes:
        runs: options of every run.
        out: the table; ``.jsonl`` is appended to run by run, ``.parquet`` is written from it at the end.
        processes: how many run at the same time.
        clean: also run the training of each seed without attack and guard, for ``loss.clean``.
    """

    runs: tuple[SimulationOptions, ...]
    out: Path
    processes: int
    clean: bool

    @classmethod
    def read(cls, path: Path, out: Path | None = None, processes: int = 0) -> Sweep:
        """The sweep of a TOML file.

        Raises:
            ValueError: unknown key, a value that a run does not take, or no run at all.
        """
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: {error}") from None
        if set(document) - _KEYS:
            unknown = ", ".join(sorted(set(document) - _KEYS))
            raise ValueError(f"{path}: unknown {unknown}; allowed: {', '.join(sorted(_KEYS))}")
        table = out or path.parent / document.get("out", f"{path.stem}.jsonl")
        if table.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"{path}: out must end in .jsonl or .parquet, got {table.name!r}")
        if table.suffix == ".parquet":
            _parquet()
        try:
            runs = tuple(_runs(document))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if len({run.key() for run in runs}) < len(runs):
            raise ValueError(f"{path}: two runs of it are the same; remove what is listed twice")
        return cls(runs, table, processes or os.cpu_count() or 1, bool(document.get("clean", True)))

    def run(self) -> int:
        """Run what the table does not have yet; the exit status, 1 if any run failed."""
        from rich.progress import MofNCompleteColumn, Progress

        lines = self.out.with_suffix(".jsonl")
        lines.parent.mkdir(parents=True, exist_ok=True)
        clean_lines = lines.with_name(f"{lines.stem}_clean.jsonl")
        failures: list[str] = []
        wanted = {run.honest().key(): run.honest() for run in self.runs} if self.clean else {}
        with (
            one_thread_pool(self.processes) as pool,
            Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress,
        ):
            for title, runs, table in (("clean runs", tuple(wanted.values()), clean_lines), ("runs", self.runs, lines)):
                clean = {key: row["loss"]["clean"] for key, row in read_table(clean_lines).items()}
                todo = [run for run in runs if run.key() not in read_table(table)]
                task = progress.add_task(title, total=len(runs), completed=len(runs) - len(todo))
                self._do(pool, partial(progress.advance, task), todo, table, clean, failures)
        for failure in failures:
            print(f"simulate: {failure}")
        if self.out.suffix == ".parquet":
            write_parquet(self.out, list(read_table(lines).values()))
        print(f"{len(read_table(lines))} results in {self.out}")
        return 1 if failures else 0

    def _do(
        self,
        pool: ProcessPoolExecutor,
        advance: Callable[[], None],
        todo: list[SimulationOptions],
        table: Path,
        clean: Mapping[str, float | None],
        failures: list[str],
    ) -> None:
        def done(run: SimulationOptions, future: Future[dict[str, Any]]) -> None:
            advance()
            error = future.exception()
            if error is not None:
                failures.append(f"{run.attack} {run.attack_arguments}, seed {run.seed}: {error}")
                return
            row = future.result()
            if run != run.honest():
                row["loss"]["clean"] = clean.get(run.honest().key())
            with table.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": run.key(), **row}, allow_nan=False) + "\n")

        with tempfile.TemporaryDirectory() as folder:
            _run_all(pool, todo, Path(folder), done)


def _run_all(
    pool: ProcessPoolExecutor,
    todo: list[SimulationOptions],
    folder: Path,
    done: Callable[[SimulationOptions, Future[dict[str, Any]]], None],
) -> None:
    """Run all, those with the same honest steps from one trunk that is kept in ``folder``."""
    families: dict[str, list[SimulationOptions]] = {}
    for run in todo:
        families.setdefault(trunk_of(run).key(), []).append(run)
    waiting: dict[Future[Any], tuple[Path, list[SimulationOptions]] | SimulationOptions] = {}
    for number, family in enumerate(families.values()):
        path = folder / f"{number}.pickle"
        if len(family) > 1 and family[0].start > 0:
            waiting[pool.submit(grow_trunk, path, family)] = path, family
        else:
            waiting.update({pool.submit(run_alone, run): run for run in family})
    while waiting:
        finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in finished:
            what = waiting.pop(future)
            if isinstance(what, SimulationOptions):
                done(what, future)
                continue
            path, family = what
            for run in family:
                if future.exception() is not None:
                    done(run, future)
                else:
                    waiting[pool.submit(run_alone, run, path)] = run


def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """Results by key of their options. A last line cut short by a crash is left out, and run again."""
    rows: dict[str, dict[str, Any]] = {}
    if path.exists():
        whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
        if rest:
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        for line in whole.splitlines():
            row = json.loads(line)
            rows[row["key"]] = row
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """The table as Parquet: nested objects become columns such as ``loss.clean``, lists and arguments JSON text."""
    pyarrow, parquet = _parquet()
    parquet.write_table(pyarrow.Table.from_pylist([dict(_flat(row)) for row in rows]), path)


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping) and name != "arguments":
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, (list, Mapping)) else value


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError('Parquet needs pyarrow: pip install ".[sweep]" in a clone, or use .jsonl') from None
    return pyarrow, pyarrow.parquet


def _runs(document: Mapping[str, Any]) -> Iterator[SimulationOptions]:
    known = {field.name for field in fields(SimulationOptions)} - {"attack", "attack_arguments"}
    base, grid = document.get("base", {}), document.get("grid", {})
    for part, options in (("base", base), ("grid", grid)):
        unknown = set(options) - known
        if unknown:
            raise ValueError(f"{part}: unknown {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(known))}")
    attacks = document.get("attack", [{}])
    for attack in attacks:
        unknown = set(attack) - {"name", "arguments", "vary"}
        if unknown:
            raise ValueError(f"attack: unknown {', '.join(sorted(unknown))}; allowed: name, arguments, vary")
        for strength in _product("vary", attack.get("vary", {})):
            for varied in _product("grid", grid):
                who = {} if "name" in attack else {"malicious": 0.0}
                arguments = {**attack.get("arguments", {}), **strength}
                yield SimulationOptions(
                    attack=attack.get("name"), attack_arguments=arguments, **{**base, **varied, **who}
                )


def _product(name: str, varied: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key, values in varied.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{name}: {key} must be a list of values to try, got {values!r}")
    for values in itertools.product(*varied.values()):
        yield dict(zip(varied, values, strict=True))
