"""Why training must stop after a step, if it must."""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence import exact
from deepspeed_sentinel.judgement.record import Record
from deepspeed_sentinel.judgement.settings import JudgeSettings
from deepspeed_sentinel.mesh import Mesh, workers_of


def halt_reason(
    mesh: Mesh, settings: JudgeSettings, record: Record, skipped_in_a_row: int, newly: np.ndarray
) -> str | None:
    """In words, or None.

    Args:
        mesh: the mesh judged.
        settings: how.
        record: after the step.
        skipped_in_a_row: steps that were, without anything found.
        newly: bool [S, R], who is convicted in this step.
    """
    if skipped_in_a_row >= settings.max_skipped_steps:
        return (
            f"{skipped_in_a_row} steps in a row were skipped because every column was excluded "
            f'and nothing new was found ("max_skipped_steps": {settings.max_skipped_steps})'
        )
    if settings.action == "quarantine":
        clean = mesh.replicas - int(exact.count(record.convicted).max())
        if clean < settings.min_clean_columns:
            return (
                f"only {clean} columns can be formed without the convicted workers "
                f"{', '.join(map(str, workers_of(record.convicted)))} "
                f'("min_clean_columns": {settings.min_clean_columns})'
            )
    if settings.action != "halt":
        return None
    if newly.any():
        return f'{", ".join(map(str, workers_of(newly)))} convicted ("action": "halt")'
    if record.lasting_disputes.any():
        links = [f"link {link}, column {column}" for link, column in np.argwhere(record.lasting_disputes)]
        return f'lasting dispute over {"; ".join(links)} ("action": "halt")'
    return None
