"""What columns without data cost in loss: clean training that goes without some of its columns from one step on.

    python benchmarks/columns_out.py --stages 16 --columns 6,7 --columns 5,6,7 --nudges 1

Nobody tampers and nothing is judged. A run that healed in that step at no price at all would end with the loss of this
one, so it is what the guarded runs of benchmarks/wiring.toml are to be held against beside their clean run. With
--nudges each is repeated with one weight moved by its last bit in that step: how far apart two runs end that differ in
rounding alone, as those of two machines do. Each loss is added to the list in --out; the steps before --start are
trained once.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from rich.progress import MofNCompleteColumn, Progress
from support import find_package, machine

find_package()

from deepspeed_sentinel.simulation.branching import Trunk  # noqa: E402
from deepspeed_sentinel.simulation.options import SimulationOptions  # noqa: E402
from deepspeed_sentinel.simulation.run import Simulation  # noqa: E402
from deepspeed_sentinel.simulation.sizes import SIZES  # noqa: E402


def columns(text: str) -> tuple[int, ...]:
    """``"6,7"`` as columns; an empty text is none."""
    return tuple(int(column) for column in text.split(",") if column.strip())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SIZES), default="small")
    parser.add_argument("--stages", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--start", type=int, default=100, help="the first step that goes without the columns")
    parser.add_argument("--seed", type=int, default=61)
    parser.add_argument(
        "--columns", type=columns, action="append", required=True, help="which, as 6,7; once for each run"
    )
    parser.add_argument(
        "--nudges", type=int, default=0, help="repetitions of each run, each with another weight nudged"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/columns_out.json"))
    arguments = parser.parse_args(argv)
    for left_out in arguments.columns:
        if not set(left_out) < set(range(arguments.replicas)):
            parser.error(f"--columns must be some but not all of 0 to {arguments.replicas - 1}, got {left_out}")
    return arguments


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    options = SimulationOptions(
        stages=arguments.stages, replicas=arguments.replicas, model=arguments.model, seed=arguments.seed,
        micro_batches=arguments.micro_batches, steps=arguments.steps, start=arguments.start,
        malicious=0.0, guard="off",
    )  # fmt: skip
    after = options.steps - options.start
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        task = progress.add_task("steps", total=options.start + after * len(arguments.columns) * (1 + arguments.nudges))
        simulation = Simulation(options)
        while simulation.step_index < options.start:
            simulation.step()
            progress.advance(task)
        trunk = Trunk.of(simulation, options, {})
        for left_out, nudge in itertools.product(arguments.columns, range(1 + arguments.nudges)):
            branch = trunk.branch(options)
            branch.left_out = left_out
            if nudge:
                move_last_bit(branch, nudge)
            result = branch.run(lambda verdict: progress.advance(task))
            row = {
                "model": options.model, "stages": options.stages, "replicas": options.replicas, "seed": options.seed,
                "micro_batches": options.micro_batches, "steps": options.steps, "start": options.start,
                "columns_out": left_out, "nudge": nudge, "loss": result["loss"]["clean"],
            }  # fmt: skip
            nudged = f", nudge {nudge}" if nudge else ""
            progress.print(f"without columns {list(left_out)} from step {options.start} on{nudged}: {row['loss']:.4f}")
            add(arguments.out, row)


@torch.no_grad()
def move_last_bit(simulation: Simulation, nudge: int) -> None:
    """Move one weight of the first layer by one unit in its last place, another one for each ``nudge``."""
    weight = next(simulation.stages[0].layers.parameters()).view(-1)
    weight[nudge] = torch.nextafter(weight[nudge], torch.tensor(torch.inf))


def add(path: Path, row: dict[str, object]) -> None:
    """Write ``row`` behind those that are there."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"what": __doc__, "machine": machine(), "runs": [*runs, row]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse())
