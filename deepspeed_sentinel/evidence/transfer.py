"""Transfer and prediction statistics of the stages beside a worker, and what they are measured against.

A stage that adds to what it is given (a residual path) leaves its mark on the pair (what entered, what left), which
no single message carries: a flipped, stale or replayed gradient looks like any other gradient. The statistics are
those of ``kernels.transfer_statistics``; this file keeps the EMA of the cross moments and the map W that predicts the
change a stage makes:

    W = (A + RIDGE tr(A)/K I)^-1 B        A, B: EMA over clean steps of the replicas' mean normal equations
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from deepspeed_sentinel.evidence.probe import ENDS, End
from deepspeed_sentinel.evidence.table import OF_PAIR
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS
from deepspeed_sentinel.kernels.transfer_statistics import TRANSFER, TransferStatistics, transfer_statistics
from deepspeed_sentinel.mesh import FORWARD

RIDGE = 1e-2
_SQUARE = DIMENSIONS * DIMENSIONS
PAIR_ROWS = int(np.count_nonzero(OF_PAIR))
assert TRANSFER == ("cosine", "gain", "step", "cka", "correlation", "slope")


@dataclass(frozen=True)
class Sketches:
    """Sketches of one direction's messages at one end, sampled and projected as at the other.

    Attributes:
        sketch_XmK: float32 [..., m, K].
        norms_Xm: float32 [..., m], full norms of the sampled tokens.
        tokens_X: float32 [...], how many tokens each message had; None where all have equally many.
    """

    sketch_XmK: torch.Tensor
    norms_Xm: torch.Tensor
    tokens_X: torch.Tensor | None = None

    def part(self, part: int, micro_batches: int) -> Sketches:
        """Those of one part, [M, m, ...] of [P * M, m, ...]."""
        chosen = slice(part * micro_batches, (part + 1) * micro_batches)
        tokens_M = None if self.tokens_X is None else self.tokens_X[chosen]
        return Sketches(self.sketch_XmK[chosen], self.norms_Xm[chosen], tokens_M)

    def first(self, rows: int) -> Sketches:
        """Without the rows that no token fills."""
        return Sketches(self.sketch_XmK[..., :rows, :], self.norms_Xm[..., :rows])

    def of(self, micro_batch: int) -> Sketches:
        """One message's, [1, m, ...]."""
        chosen = slice(micro_batch, micro_batch + 1)
        return Sketches(self.sketch_XmK[chosen], self.norms_Xm[chosen])


@dataclass(frozen=True)
class Known:
    """What a stage's messages are measured against.

    Attributes:
        expected_K: float32, usual correlation of what enters and leaves, per sketch dimension.
        w_KK: float32, the map that predicts the change.
    """

    expected_K: torch.Tensor
    w_KK: torch.Tensor


def pair_rows(entering: Sketches, leaving: Sketches, known: Known | None) -> tuple[torch.Tensor, TransferStatistics]:
    """Statistics of messages [...] that passed one stage.

    Returns:
        float32 [M, PAIR_ROWS] in the order of the table, M over all leading dimensions, NaN where it takes what is
        not known yet; and all that was computed on the way.
    """
    found: TransferStatistics = transfer_statistics(
        entering.sketch_XmK.flatten(0, -3),
        leaving.sketch_XmK.flatten(0, -3),
        entering.norms_Xm.flatten(0, -2),
        leaving.norms_Xm.flatten(0, -2),
        known.w_KK if known else entering.sketch_XmK.new_zeros(DIMENSIONS, DIMENSIONS),
    )
    cosine, gain, step, gram, correlation, slope = found.scalars_M6.unbind(1)
    cross = (found.cross_MK - known.expected_K).abs().mean(1) if known else torch.full_like(cosine, float("nan"))
    return torch.stack([cosine, gain, step, cross, gram, correlation, slope], dim=1), found


@dataclass(frozen=True)
class _Learnt:
    """EMAs without bias correction: cross moments [K], normal equations [K, K] each, and the map from them."""

    cross_K: torch.Tensor
    a_KK: torch.Tensor
    b_KK: torch.Tensor
    w_KK: torch.Tensor
    steps: int


class Transfers:
    """Per end of a link: what is known of the stage beyond it in that direction.

    Both neighbours of a stage hold the same sketches, so what they learn agrees without being compared.

    Args:
        activation_decay, gradient_decay: EMA decays of the two directions.
    """

    def __init__(self, activation_decay: float, gradient_decay: float) -> None:
        self._decays = (activation_decay, gradient_decay)
        self._learnt: dict[End, _Learnt] = {}

    def known(self, end: End) -> Known | None:
        """What was learnt up to now, or None."""
        learnt = self._learnt.get(end)
        if learnt is None:
            return None
        return Known(learnt.cross_K / (1.0 - self._decay(end) ** learnt.steps), learnt.w_KK)

    def statistics(self, end: End, entering: Sketches, leaving: Sketches) -> tuple[torch.Tensor, torch.Tensor]:
        """Statistics of messages [...] that passed the stage, and what they teach.

        Returns:
            float32 [..., PAIR_ROWS] in the order of the table, NaN where nothing was learnt yet; and float32
            [..., V], to be averaged over a replica's micro-batches and handed to ``learn``.
        """
        leading = entering.sketch_XmK.shape[:-2]
        rows_MS, found = pair_rows(entering, leaving, self.known(end))
        return rows_MS.unflatten(0, leading), self._lesson(found).unflatten(0, leading)

    @staticmethod
    def _lesson(found: TransferStatistics) -> torch.Tensor:
        """float32 [M, V]: each message weighs the same, however large its values are."""
        trace_M11 = found.a_MKK.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        weight_M11 = torch.where(trace_M11 > 0, 1.0 / trace_M11, 0.0)
        weight_M11 = torch.where(weight_M11.isfinite(), weight_M11, 0.0)
        return torch.cat(
            [found.cross_MK, (found.a_MKK * weight_M11).flatten(1), (found.b_MKK * weight_M11).flatten(1)], dim=1
        )

    def learn(self, end: End, lessons_RV: torch.Tensor, clean_R: np.ndarray) -> None:
        """Add one step: the mean over the clean replicas.

        Args:
            end: which stage and direction.
            lessons_RV: float32 [replicas, V], every replica's mean over its micro-batches.
            clean_R: bool [replicas], whose to learn from; with none nothing is learnt.
        """
        rows = np.flatnonzero(clean_R).tolist()
        if not rows:
            return
        lesson_V = lessons_RV[rows].mean(0)
        cross_K, a_KK, b_KK = lesson_V.split([DIMENSIONS, _SQUARE, _SQUARE])
        a_KK, b_KK = a_KK.view(DIMENSIONS, DIMENSIONS), b_KK.view(DIMENSIONS, DIMENSIONS)
        decay, old, steps = self._decay(end), self._learnt.get(end), 0
        if old:
            cross_K, a_KK, b_KK = (
                decay * before + (1.0 - decay) * now
                for before, now in ((old.cross_K, cross_K), (old.a_KK, a_KK), (old.b_KK, b_KK))
            )
            steps = old.steps
        else:
            cross_K, a_KK, b_KK = ((1.0 - decay) * now for now in (cross_K, a_KK, b_KK))
        self._learnt[end] = _Learnt(cross_K, a_KK, b_KK, _ridge(a_KK, b_KK), steps + 1)

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        state: dict[str, torch.Tensor | int] = {}
        for end, learnt in self._learnt.items():
            packed = torch.cat([learnt.cross_K, learnt.a_KK.flatten(), learnt.b_KK.flatten()])
            state[f"average_{end[0]}_{end[1]}"] = packed.cpu()
            state[f"steps_{end[0]}_{end[1]}"] = learnt.steps
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor | int], device: torch.device) -> None:
        self._learnt = {}
        for end in ENDS:
            packed = state.get(f"average_{end[0]}_{end[1]}")
            if isinstance(packed, torch.Tensor):
                cross_K, a_V, b_V = packed.to(device).split([DIMENSIONS, _SQUARE, _SQUARE])
                a_KK, b_KK = a_V.view(DIMENSIONS, DIMENSIONS), b_V.view(DIMENSIONS, DIMENSIONS)
                steps = int(state[f"steps_{end[0]}_{end[1]}"])
                self._learnt[end] = _Learnt(cross_K, a_KK, b_KK, _ridge(a_KK, b_KK), steps)

    def _decay(self, end: End) -> float:
        return self._decays[0] if end[0] == FORWARD else self._decays[1]


def _ridge(a_KK: torch.Tensor, b_KK: torch.Tensor) -> torch.Tensor:
    """W; zeros where the equations have no solution, so that predictions are not available."""
    penalty = RIDGE * a_KK.diagonal().mean()
    identity_KK = torch.eye(DIMENSIONS, dtype=a_KK.dtype, device=a_KK.device)
    w_KK, _ = torch.linalg.solve_ex(a_KK + penalty * identity_KK, b_KK)
    return w_KK.nan_to_num(0.0, 0.0, 0.0)
