"""What the terminal shows while the job runs: a live picture, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from deepspeed_sentinel.demo.options import RUNS, DemoOptions
from deepspeed_sentinel.demo.progress import DemoState, RunState

if TYPE_CHECKING:
    from rich.console import Console

TITLES = {
    "clean": "1 clean, plain DeepSpeed",
    "attacked": "2 attacked, no guard",
    "guarded": "3 attacked, guarded",
}
# What the job says of itself, in no more than fits below the picture on a narrow terminal.
MESSAGES = {
    "clean": "Run 1: plain DeepSpeed, nobody tampers",
    "overhead": "Run 1: timing more steps, with and without Sentinel in turn",
    "attacked": "Run 2: tampering from step {start} on, nobody guards (first step is 0)",
    "guarded": "Run 3: tampering from step {start} on, Sentinel guards (first step is 0)",
}
_WIDE = 130  # columns of a terminal from which on all has room side by side
_COLOURS = {"clean": "green", "attacked": "red", "guarded": "blue"}
_BLOCKS = " ▁▂▃▄▅▆▇█"


def sparkline(losses: list[float | None], width: int) -> str:
    """Losses as a row of blocks, oldest left; steps that share a place are averaged, "!" is not finite."""
    if not losses:
        return ""
    width = min(width, len(losses))
    known = [loss for loss in losses if loss is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    marks = []
    for place in range(width):
        part = losses[place * len(losses) // width : (place + 1) * len(losses) // width]
        values = [loss for loss in part if loss is not None]
        if not values:
            marks.append("!")
            continue
        height = (sum(values) / len(values) - low) / ((high - low) or 1.0)
        marks.append(_BLOCKS[1 + round(height * (len(_BLOCKS) - 2))])
    return "".join(marks)


def guard_totals(run: RunState) -> dict[str, Any]:
    """Totals of the guarded run: who is convicted, and how many columns go on.

    "found_in" and "convicted_in" hold the first step for each worker, "skipped" those in which no weight changed.
    """
    guards = [guard for guard in run.step_guard if guard]
    found, convicted = (
        {tuple(worker): guard["step"] for guard in reversed(guards) for worker in guard[what]}
        for what in ("blamed", "convicted")
    )
    return {
        "skipped": [guard["step"] for guard in guards if guard["skip"]],
        "convicted": guards[-1]["convicted"] if guards else [],
        "found_in": found,
        "convicted_in": convicted,
        "going_on": len(columns_without(guards[-1]["convicted"], guards[-1]["wiring"])) if guards else None,
        "last": guards[-1] if guards else None,
    }


def columns_without(workers: list[list[int]], wiring: list[list[int]]) -> list[int]:
    """The columns of a wiring [stage][column] that none of ``workers`` [stage, replica] serves."""
    return [
        column
        for column in range(len(wiring[0]))
        if not any([stage, row[column]] in workers for stage, row in enumerate(wiring))
    ]


class _Told:
    """Reads the story of the guarded run (``story.py``) on."""

    def __init__(self) -> None:
        self._steps = 0

    def new(self, state: DemoState) -> list[tuple[int, str]]:
        """Steps and lines that were not read yet."""
        guards = state.runs["guarded"].step_guard
        new, self._steps = guards[self._steps :], len(guards)
        return [(guard["step"], line) for guard in new if guard for line in guard["told"]]


class PlainView:
    """One line whenever something worth reading happened; for logs and pipes. Steps are counted from 0."""

    def __init__(self, options: DemoOptions, every: int = 10) -> None:
        self.options, self.every = options, every
        self._message, self._shown, self._ended, self._told = "", dict.fromkeys(RUNS, 0), set[str](), _Told()

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, state: DemoState) -> None:
        """Print what is new in ``state``."""
        if state.message != self._message:
            self._message = state.message
            print(self._message, flush=True)
        for step, line in self._told.new(state):
            print(f"  step {step}: {line}", flush=True)
        for name, run in state.runs.items():
            while self._shown[name] + self.every <= len(run.losses):
                self._shown[name] += self.every
                loss = run.losses[self._shown[name] - 1]
                shown = "not finite" if loss is None else f"{loss:.3f}"
                done = f"{self._shown[name]} of {self.options.steps} steps done"
                print(f"{TITLES[name]}: {done}, training loss {shown}", flush=True)
            if run.ended and name not in self._ended:
                self._ended.add(name)
                shown = "not finite" if run.final_loss is None else f"{run.final_loss:.3f}"
                print(f"{TITLES[name]}: held-out loss {shown}", flush=True)


class LiveView:
    """The picture: a progress bar and loss curve for each run, the mesh as Sentinel sees it, and totals.

    Above it stands the story of the guarded run.
    """

    def __init__(self, options: DemoOptions, console: Console) -> None:
        from rich.live import Live

        self.options, self._console = options, console
        self._begin = time.monotonic()
        self._state, self._told = DemoState(), _Told()
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=5)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def update(self, state: DemoState) -> None:
        """Show ``state`` from the next refresh on, and above the picture what is new of the story."""
        from rich.table import Table
        from rich.text import Text

        self._state = state
        for step, line in self._told.new(state):
            row = Table.grid(padding=(0, 1))
            row.add_row(Text(f"step {step}:"), Text(line))
            self._console.print(row)

    def render(self) -> Any:
        """The whole picture."""
        from rich.console import Group
        from rich.panel import Panel

        seconds = int(time.monotonic() - self._begin)
        options = self.options
        head = f"{options.stages} stages x {options.replicas} replicas = {options.workers} processes ({options.device})"
        return Panel(
            Group(self._runs(), "", self._guard()),
            title=f"[bold]deepspeed-sentinel demo[/]  {head}",
            subtitle=f"{self._state.message}   {seconds // 60}:{seconds % 60:02d}",
            padding=(0, 2),
        )

    @property
    def _wide(self) -> bool:
        return self._console.width >= _WIDE

    def _runs(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for column in ("run", "progress", "step", "loss", "loss so far", "held-out"):
            table.add_column(
                column, no_wrap=True, justify="right" if column in ("step", "loss", "held-out") else "left"
            )
        for name, run in self._state.runs.items():
            colour = _COLOURS[name] if run.started else "dim"
            done = len(run.losses)
            loss = "" if not done else "NaN" if run.losses[-1] is None else f"{run.losses[-1]:.3f}"
            final = "" if not run.ended else "NaN" if run.final_loss is None else f"{run.final_loss:.3f}"
            table.add_row(
                f"[{colour}]{TITLES[name]}[/]",
                ProgressBar(total=self.options.steps, completed=done, width=20 if self._wide else 8,
                            complete_style=_COLOURS[name], finished_style=_COLOURS[name]),
                f"{done}/{self.options.steps}", loss,
                f"[{colour}]{sparkline(run.losses, 24 if self._wide else 11)}[/]",
                f"[bold]{final}[/]",
            )  # fmt: skip
        return table

    def _guard(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        totals = guard_totals(self._state.runs["guarded"])
        mesh, facts = self._mesh(totals["last"], totals["convicted"]), self._facts(totals)
        if not self._wide:
            return Group(mesh, facts)
        grid = Table(box=None, pad_edge=False, padding=(0, 4, 0, 0), show_header=False)
        grid.add_row(mesh, facts)
        return grid

    def _mesh(self, guard: dict[str, Any] | None, convicted: list[list[int]]) -> Any:
        from rich.table import Table

        mesh = Table(title="replica by column, with its worst score (1: fence)",
                     title_style="dim", title_justify="left", box=None, header_style="dim", pad_edge=False)  # fmt: skip
        columns = range(self.options.replicas)
        wiring = guard["wiring"] if guard else [list(columns)] * self.options.stages
        going_on = columns_without(convicted, wiring)
        mesh.add_column("")
        for column in columns:
            mesh.add_column(f"column {column}" + (" OUT" if column not in going_on else ""), min_width=14)
        for stage in range(self.options.stages):
            mesh.add_row(f"[dim]stage {stage}[/]", *(_cell(guard, convicted, stage, column) for column in columns))
        return mesh

    def _facts(self, totals: dict[str, Any]) -> Any:
        from rich.table import Table

        options, guard = self.options, totals["last"]
        arguments = " ".join(f"{key}={value}" for key, value in options.attack_arguments.items())
        attackers = " and ".join(f"stage {stage} replica {replica}" for stage, replica in options.attackers)
        fault = f"{options.attack} {arguments}, {options.direction}, from step {options.start_step}"
        facts = Table(box=None, show_header=False, pad_edge=False)
        facts.add_row("[dim]attack (unknown to the guard)[/]", f"{attackers}\n{fault}")
        if guard is None:
            facts.add_row("[dim]guard[/]", "starts with run 3")
            return facts
        doing = "[yellow]warming up[/]" if guard["warming_up"] else "[green]watching[/]"
        facts.add_row("[dim]guard[/]", "[cyan]twin step: same data for all[/]" if guard["twins"] else doing)
        facts.add_row("[dim]columns out of this step[/]", ", ".join(map(str, guard["excluded"])) or "none")
        facts.add_row("[dim]steps skipped, all out[/]", ", ".join(map(str, totals["skipped"])) or "none")
        convicted = "\n".join(
            f"stage {stage} replica {replica}, step {totals['convicted_in'][stage, replica]}"
            f" (alarm: {totals['found_in'].get((stage, replica), 'none')})"
            for stage, replica in totals["convicted"]
        )
        facts.add_row("[dim]convicted[/]", f"[bold red]{convicted}[/]" if convicted else "nobody")
        facts.add_row("[dim]columns that go on[/]", f"[bold]{totals['going_on']} of {options.replicas}[/]")
        return facts


def _cell(guard: dict[str, Any] | None, convicted: list[list[int]], stage: int, column: int) -> str:
    if guard is None:
        return f"[dim]r{column} ·[/]"
    replica = guard["wiring"][stage][column]
    score = guard["scores"][stage][replica]
    shown = f"r{replica} " + ("!" if score is None else "·" if score == 0 else f"{min(score, 99.9):.1f}")
    if [stage, replica] in convicted:
        return f"[bold white on red] {shown} CONV. [/]"
    if score == 0:
        return f"[dim]{shown}[/]"
    if [stage, replica] in [list(worker) for worker in guard["blamed"]]:
        return f"[bold black on yellow] {shown} ALARM [/]"
    if column in guard["excluded"]:
        return f"[dim]{shown} out[/]"
    return f"[green]{shown}[/]"


def view(options: DemoOptions) -> LiveView | PlainView:
    """The live picture on a terminal, else plain lines."""
    from rich.console import Console

    console = Console()
    return LiveView(options, console) if console.is_terminal else PlainView(options)
