"""What a simulated run has come to: the contents of ``result.json``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed_sentinel.simulation.run import Simulation


def result_of(simulation: Simulation) -> dict[str, Any]:
    """Of the steps until now; of the losses only this run's own is set."""
    loss, seconds = simulation.held_out_loss(), simulation.seconds["step"]
    options = simulation.options
    unguarded = "clean" if simulation.attackers is None else "attacked"
    kind = "guarded" if simulation.guarded else unguarded
    tally, steps = simulation.tally, max(simulation.step_index, 1)
    return {
        "mesh": {"stages": simulation.mesh.stages, "replicas": simulation.mesh.replicas},
        "attack": {
            "name": options.attack,
            "arguments": options.attack_arguments,
            "direction": options.direction,
            "malicious_share": options.malicious,
            "start": options.start,
        },
        **tally.result(simulation.acted_first()),
        "loss": {"clean": None, "attacked": None, "guarded": None, kind: _finite(loss)},
        "seconds": seconds,
        "details": {
            "steps": simulation.step_index,
            "seed": options.seed,
            "model": options.model,
            "moe": options.moe,
            "parameters": sum(weight.numel() for stage in simulation.stages for weight in stage.parameters()),
            "tokens_per_message": options.micro_batch_size * options.sequence,
            "micro_batches": options.micro_batches,
            "verifier": options.verifier,
            "evidence": options.evidence,
            "procedure": options.procedure,
            "guard": options.guard,
            "messages": tally.messages(),
            "wiring": simulation.config.wiring,
            "change": options.change,
            "change_at": options.change_at,
            "skipped_steps": tally.skipped_steps,
            "excluded_columns": tally.excluded_columns,
            "until_healed": tally.until_healed,
            "disputes": tally.disputes,
            "twin_steps": tally.twin_steps,
            "proofs": tally.proofs,
            "cleared": tally.cleared,
            "seconds_a_step": simulation.seconds["step"] / steps,
            "judge_seconds_a_step": simulation.seconds["judge"] / steps,
        },
    }


def _finite(value: float) -> float | None:
    """``value``, or None where it is not finite: JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
