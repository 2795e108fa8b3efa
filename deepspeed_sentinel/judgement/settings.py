"""How to judge: the part of the configuration that the judge and whoever builds one need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class JudgeSettings:
    """How to judge; the fields are those of the config block with the same names."""

    action: Literal["observe", "exclude", "quarantine", "halt"]
    warmup_steps: int
    fence_window: int
    fence_multiplier: float
    target_false_positive_rate: float
    strikes: int
    strike_window: int
    conviction: Literal["proof", "statistics"]
    probation_steps: int
    max_skipped_steps: int
    seed: int
    min_clean_columns: int = 1
    wiring: Literal["heal", "static", "shuffle"] = "heal"
