"""Transfer and prediction statistics of the stages beside a worker, and what they are measured against.

A stage that adds to what it is given (a residual path) leaves its mark on the pair (what entered, what left), which
no single message carries: a flipped, stale or replayed gradient looks like any other gradient. The statistics are
those of ``kernels.transfer_statistics``. Those that need no memory are taken in a projection that is drawn anew in
every step (FRESH). The others are measured against what was learnt, which takes a projection that stays for a while
(LASTING): this file keeps the EMA of its cross moments and the map W that predicts the change a stage makes:

    W = (A + RIDGE tr(A)/K I)^-1 B        A, B: EMA of the normal equations of clean steps

Each pair of neighbours learns from its own column alone, so that no other worker's number enters. Before the lasting
projection is renewed (``evidence.renewal``) the NEXT one is learnt beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from deepspeed_sentinel.evidence.probe import End
from deepspeed_sentinel.evidence.table import OF_PAIR
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS
from deepspeed_sentinel.kernels.transfer_statistics import TRANSFER, TransferStatistics, transfer_statistics
from deepspeed_sentinel.mesh import FORWARD

FRESH, LASTING, NEXT = 0, 1, 2  # which of the secret sketches
RIDGE = 1e-2
PAIR_ROWS = int(np.count_nonzero(OF_PAIR))
LESSON = DIMENSIONS + 2 * DIMENSIONS * DIMENSIONS
_SECTIONS = (DIMENSIONS, DIMENSIONS * DIMENSIONS, DIMENSIONS * DIMENSIONS)
assert TRANSFER == ("cosine", "gain", "step", "cka", "correlation", "slope")


@dataclass(frozen=True)
class Sketches:
    """Sketches of one direction's messages at one end, sampled and projected as at the other.

    Attributes:
        sketch_JXmK: float32 [J, ..., m, K], of the same tokens in J projections: FRESH, LASTING, and NEXT where there
            is one.
        norms_Xm: float32 [..., m], full norms of the sampled tokens.
        tokens_X: float32 [...], how many tokens each message had; None where all have equally many.
    """

    sketch_JXmK: torch.Tensor
    norms_Xm: torch.Tensor
    tokens_X: torch.Tensor | None = None

    def part(self, part: int, micro_batches: int) -> Sketches:
        """Those of one part, [J, M, m, ...] of [J, P * M, m, ...]."""
        return self._rows(slice(part * micro_batches, (part + 1) * micro_batches))

    def of(self, message: int) -> Sketches:
        """One message's, [J, 1, m, ...] of [J, M, m, ...]."""
        return self._rows(slice(message, message + 1))

    def first(self, rows: int) -> Sketches:
        """Without the rows that no token fills."""
        return Sketches(self.sketch_JXmK[..., :rows, :], self.norms_Xm[..., :rows], self.tokens_X)

    def _rows(self, chosen: slice) -> Sketches:
        tokens_M = None if self.tokens_X is None else self.tokens_X[chosen]
        return Sketches(self.sketch_JXmK[:, chosen], self.norms_Xm[chosen], tokens_M)


@dataclass(frozen=True)
class Known:
    """What a stage's messages are measured against in the lasting projection.

    Attributes:
        expected_K: float32, usual correlation of what enters and leaves, per sketch dimension; NaN: not known yet.
        w_KK: float32, the map that predicts the change; zeros: not known yet. Both may be of groups, [X, ...].
    """

    expected_K: torch.Tensor
    w_KK: torch.Tensor


def pair_rows(entering: Sketches, leaving: Sketches, known: Known | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics of messages that passed one stage, and what they teach.

    Args:
        entering, leaving: sketches [J >= 2, X, M, m, K] of M messages of each group X; X may be no dimension.
        known: of each group, or None before anything is known.

    Returns:
        float32 [X, M, PAIR_ROWS] in the order of the table, NaN where it takes what is not known yet; and lessons
        float32 [J - 1, X, M, LESSON] of the projections from LASTING on.
    """
    found = _statistics(entering, leaving, known)
    cosine, gain, step, gram = found.scalars_M6[FRESH, ..., :4].unbind(-1)
    correlation, slope = found.scalars_M6[LASTING, ..., 4:].unbind(-1)
    if known is None:
        cross = torch.full_like(cosine, torch.nan)
    else:
        cross = (found.cross_MK[LASTING] - known.expected_K[..., None, :]).abs().mean(-1)
    rows = torch.stack([cosine, gain, step, cross, gram, correlation, slope], dim=-1)
    return rows, _lessons(TransferStatistics(*(part[LASTING:] for part in found)))


def lessons(entering: Sketches, leaving: Sketches) -> torch.Tensor:
    """What messages teach, float32 [J, X, M, LESSON], of all J projections."""
    return _lessons(_statistics(entering, leaving, None))


def _statistics(entering: Sketches, leaving: Sketches, known: Known | None) -> TransferStatistics:
    """Of [J, X, M] messages in one launch. The map of LASTING serves all projections: its rows alone are used."""
    leading = entering.sketch_JXmK.shape[:-2]
    if known is None:
        w_KK = entering.sketch_JXmK.new_zeros(DIMENSIONS, DIMENSIONS)
    else:
        w_KK = known.w_KK
    if w_KK.dim() > 2:
        w_KK = w_KK[..., None, :, :].expand(*leading, -1, -1).flatten(0, -3)
    found = transfer_statistics(
        entering.sketch_JXmK.flatten(0, -3),
        leaving.sketch_JXmK.flatten(0, -3),
        entering.norms_Xm.expand(*leading, -1).flatten(0, -2),
        leaving.norms_Xm.expand(*leading, -1).flatten(0, -2),
        w_KK,
    )
    return TransferStatistics(*(part.unflatten(0, leading) for part in found))


def _lessons(found: TransferStatistics) -> torch.Tensor:
    """float32 [..., LESSON]: cross moments and normal equations, weighed so that none of its numbers exceeds one.

    So each message weighs about the same, however large its values are, and one absurd message weighs no more.
    """
    a_X, b_X = (part.abs().amax((-2, -1)) for part in (found.a_MKK, found.b_MKK))
    weight_X11 = (1.0 / (a_X + b_X)).nan_to_num(0.0, 0.0, 0.0)[..., None, None]
    equations = [(part * weight_X11).flatten(-2) for part in (found.a_MKK, found.b_MKK)]
    return torch.cat([found.cross_MK, *equations], dim=-1)


class Transfers:
    """Per end of a link: what a pair of neighbours knows of the stage between, in that direction.

    Both hold the same sketches, so what they learn agrees without being compared. It is kept for each group X of
    messages that have a lasting projection of their own; a worker has one group, and X is no dimension.

    Args:
        activation_decay, gradient_decay: EMA decays of the two directions.
    """

    def __init__(self, activation_decay: float, gradient_decay: float) -> None:
        self._decays = (activation_decay, gradient_decay)
        # EMAs without bias correction, [X, LESSON + 1]: of the lessons, and of whether there was one.
        self._learnt: dict[tuple[End, int], torch.Tensor] = {}
        self._known: dict[End, Known] = {}

    def known(self, end: End) -> Known | None:
        """What was learnt up to now in the lasting projection, or None."""
        if end not in self._known and (end, LASTING) in self._learnt:
            self._known[end] = _known(self._learnt[end, LASTING])
        return self._known.get(end)

    def learn(self, end: End, lesson_XV: torch.Tensor, clean_X: np.ndarray, which: int = LASTING) -> None:
        """Add one step; of a lesson that is not finite nothing is learnt.

        Args:
            end: which stage and direction.
            lesson_XV: float32 [X, LESSON], mean over a group's messages of the step.
            clean_X: bool, which groups to learn from.
            which: LASTING or NEXT.
        """
        self._known.pop(end, None)
        one_X1 = torch.ones_like(lesson_XV[..., :1])
        lesson_XV = torch.cat([lesson_XV, one_X1], dim=-1)
        before_XV = self._learnt.get((end, which), torch.zeros_like(lesson_XV))
        decay = self._decays[0] if end[0] == FORWARD else self._decays[1]
        sound_X1 = _mask(clean_X, lesson_XV) & lesson_XV.isfinite().all(-1, keepdim=True)
        # What was learnt ages with the stage, also in steps that teach nothing.
        self._learnt[end, which] = decay * before_XV + (1.0 - decay) * torch.where(sound_X1, lesson_XV, 0.0)

    def renew(self, end: End, renewed_X: np.ndarray, stale_X: np.ndarray) -> None:
        """Take over the next projection, with what was learnt in it, or start anew with nothing (``Renewal.learn``)."""
        lasting_XV = self._learnt.get((end, LASTING))
        if lasting_XV is None or not (renewed_X | stale_X).any():
            return
        self._known.pop(end, None)
        next_XV = self._learnt.pop((end, NEXT), torch.zeros_like(lasting_XV))
        renewed_X1, stale_X1 = _mask(renewed_X, lasting_XV), _mask(stale_X, lasting_XV)
        self._learnt[end, LASTING] = torch.where(renewed_X1, next_XV, lasting_XV).masked_fill(stale_X1, 0.0)
        self._learnt[end, NEXT] = next_XV.masked_fill(renewed_X1 | stale_X1, 0.0)


def _mask(chosen_X: np.ndarray, like_XV: torch.Tensor) -> torch.Tensor:
    """bool [X, 1] on the device."""
    return torch.from_numpy(np.asarray(chosen_X)[..., None]).to(like_XV.device, non_blocking=True)


def _known(average_XV: torch.Tensor) -> Known:
    cross_XK, a_XV, b_XV, weight_X1 = average_XV.split([*_SECTIONS, 1], dim=-1)
    a_XKK, b_XKK = (part.unflatten(-1, (DIMENSIONS, DIMENSIONS)) for part in (a_XV, b_XV))
    expected_K = torch.where(weight_X1 > 0, cross_XK / weight_X1, torch.nan)
    return Known(expected_K, _ridge(a_XKK, b_XKK))


def _ridge(a_XKK: torch.Tensor, b_XKK: torch.Tensor) -> torch.Tensor:
    """W; zeros where the equations have no solution, so that predictions are not available."""
    penalty_X1 = RIDGE * a_XKK.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    w_KK, _ = torch.linalg.solve_ex(a_XKK + torch.diag_embed(penalty_X1.expand(*a_XKK.shape[:-1])), b_XKK)
    return w_KK.nan_to_num(0.0, 0.0, 0.0)
