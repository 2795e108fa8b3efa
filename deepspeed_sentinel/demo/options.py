"""Everything that describes one demo: what the parent process decides and the workers read from a file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNS = ("clean", "attacked", "guarded")


@dataclass(frozen=True)
class DemoOptions:
    """Settings of a demo; all runs of it share them.

    Sizes are counts; ``sequence`` is in tokens, ``device`` is "cpu" or "cuda" (never "auto" here), ``out``
    is the folder that everything is written to. ``attackers`` are (stage, replica) each.
    """

    stages: int = 4
    replicas: int = 3
    steps: int = 60
    seed: int = 0
    device: str = "cpu"
    out: str = "demo_out"
    tokenizer: str = "byte"
    attack: str = "constant"
    attack_arguments: dict[str, Any] = field(default_factory=lambda: {"value": 0.0})
    attackers: tuple[tuple[int, int], ...] = ((1, 2), (2, 0))
    direction: str = "forward"
    start_step: int = 30
    layers: int = 8
    hidden: int = 192
    intermediate: int = 512
    heads: int = 6
    key_value_heads: int = 2
    sequence: int = 128
    micro_batch_size: int = 2
    micro_batches: int = 2
    learning_rate: float = 3e-3
    learning_rate_warmup: int = 10
    eval_micro_batches: int = 16
    overhead_rounds: int = 2
    overhead_block: int = 4

    def __post_init__(self) -> None:
        if self.stages < 2 or self.stages > self.layers:
            raise ValueError(
                f"--stages must be from 2 to {self.layers} (the model's decoder layers), got {self.stages}."
            )
        if self.replicas < 1:
            raise ValueError(f"--replicas must be at least 1, got {self.replicas}.")
        if len(set(self.attackers)) < len(self.attackers):
            raise ValueError(f"--attacker must name each worker once, got {self.attackers}.")
        if self.tokenizer not in ("byte", "bpe"):
            raise ValueError(f"--tokenizer must be byte or bpe, got {self.tokenizer!r}.")
        if not 0 <= self.start_step < self.steps:
            raise ValueError(
                f"--start-step must be from 0 to {self.steps - 1}, so that some of the --steps {self.steps} "
                f"are attacked, got {self.start_step}."
            )

    @property
    def workers(self) -> int:
        """Number of processes: one a worker."""
        return self.stages * self.replicas

    @property
    def vocabulary(self) -> int:
        """Number of distinct tokens."""
        return 256 if self.tokenizer == "byte" else 1024

    @property
    def corpus_folder(self) -> Path:
        """Where the tokens lie that the workers map into memory."""
        return Path(self.out) / "corpus"

    @property
    def progress_file(self) -> Path:
        """JSON lines that rank 0 of the job appends to and the parent reads."""
        return Path(self.out) / "progress.jsonl"

    @property
    def job_log(self) -> Path:
        """Standard output and error of the whole job."""
        return Path(self.out) / "job.log"

    def sentinel_folder(self, run: str) -> Path:
        """Where Sentinel writes its events in ``run``."""
        return Path(self.out) / f"sentinel_{run}"

    def fault(self) -> dict[str, Any]:
        """What each attacker does, in the words of the config's ``inject`` list."""
        return {
            "direction": self.direction,
            "where": "compute",
            "attack": self.attack,
            **self.attack_arguments,
            "start_step": self.start_step,
            "stop_step": None,
            "probability": 1.0,
        }

    def injections(self) -> list[dict[str, Any]]:
        """The config's ``inject`` list: the same fault for each attacker."""
        return [{"stage": stage, "replica": replica, **self.fault()} for stage, replica in self.attackers]

    def sentinel_block(self, run: str) -> dict[str, Any]:
        """The ``"sentinel"`` block of ``run``: defaults, apart from where and how much it writes.

        "attacked" injects and only observes, so nothing protects the weights; "guarded" injects the same and
        leaves Sentinel its default action; "overhead" has no attack and otherwise what "guarded" has.
        """
        block: dict[str, Any] = {
            "enabled": True,
            "output_dir": str(self.sentinel_folder(run)),
            "events": "steps",
        }
        if run == "attacked":
            block |= {"action": "observe", "events": "none", "inject": self.injections()}
        elif run == "guarded":
            block |= {"inject": self.injections()}
        elif run != "overhead":
            raise ValueError(f"run must be attacked, guarded or overhead, got {run!r}.")
        return block

    def save(self, path: Path) -> None:
        """Write all settings to ``path`` as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> DemoOptions:
        """The settings that ``save`` wrote to ``path``."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["attackers"] = tuple(map(tuple, values["attackers"]))
        return cls(**values)
