"""The EMA baselines of one worker's link ends, shared by the replicas of its stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch

from deepspeed_sentinel.evidence.buffers import EndStatistics
from deepspeed_sentinel.evidence.probe import ENDS, End
from deepspeed_sentinel.kernels.baseline_distances import DISTANCES, baseline_distances, baseline_update
from deepspeed_sentinel.kernels.sliced_wasserstein import DIRECTIONS, QUANTILES
from deepspeed_sentinel.mesh import FORWARD

# An average that is so many times as large as anything that the replicas send now is a fault: a flipped bit, or what is
# left of a step that was one. It would keep the copies of a baseline apart for hundreds of steps.
LARGER = 16.0
_LARGEST = float(torch.finfo(torch.float32).max)
_MOST_TOKENS = float(1 << 24)  # of a message, whose sum over them is a float32
_MOST_STEPS = 1 << 53  # what no count of steps comes to, and a float still holds


class Baselines:
    """Per end of a link: EMA of the token mean and of the projected quantiles, bias-corrected.

    Each step adds the median over the clean replicas of their mean over micro-batches, so that an attacker not
    yet found cannot move it beyond what honest replicas sent. Both ends of a link see the same clean messages, so
    their baselines agree without being compared.

    Args:
        activation_decay, gradient_decay: EMA decays of the two directions.
    """

    def __init__(self, activation_decay: float, gradient_decay: float) -> None:
        self._decays = (activation_decay, gradient_decay)
        self._averages: dict[End, torch.Tensor] = {}
        self._counts: dict[End, int] = {}

    def distances(self, end: End, statistics: EndStatistics) -> torch.Tensor:
        """float32 [M, 4], see ``baseline_distances``; NaN before the first clean step."""
        hidden = statistics.means_MD.shape[1]
        if self._counts.get(end, 0) == 0 or self._averages[end].numel() != hidden + statistics.quantiles_MQ.shape[1]:
            return statistics.means_MD.new_full((len(statistics.means_MD), len(DISTANCES)), float("nan"))
        correction = 1.0 - self._decay(end) ** self._counts[end]
        return baseline_distances(statistics.means_MD, statistics.quantiles_MQ, self._averages[end], correction)

    def summary(self, end: End, statistics: EndStatistics) -> torch.Tensor:
        """What one replica contributes: float32 [D + Q], mean over its messages that are not zero or missing.

        Without any it is the average as it stands, which changes nothing.
        """
        values_MV = torch.cat([statistics.means_MD, statistics.quantiles_MQ], dim=1)
        carries_M1 = statistics.scalars_M3[:, 1:2] > 0
        count_1 = carries_M1.sum(0)
        mean_V = torch.where(carries_M1, values_MV, 0.0).sum(0) / count_1.clamp_min(1)
        average_V = self._averages.get(end)
        if average_V is None or average_V.numel() != mean_V.numel():
            return mean_V
        correction = 1.0 - self._decay(end) ** max(self._counts[end], 1)
        return torch.where(count_1 > 0, mean_V, average_V / correction)

    def learn(
        self, end: End, summaries_RV: torch.Tensor, clean_R: np.ndarray, largest_R: np.ndarray | None = None
    ) -> torch.Tensor:
        """Add one step.

        Args:
            end: which baseline.
            summaries_RV: float32 [replicas, D + Q], every replica's ``summary``.
            clean_R: bool [replicas], whose to learn from; with none nothing is learnt.
            largest_R: float64 [replicas], largest magnitude in a replica's messages at this end, as reported in the
                evidence; what its summary says must fit it. Zero says nothing, and so does None.

        Returns:
            bool [replicas] on the device: clean replicas whose summary cannot be one of their messages. It counts
            for nothing. Nor does that of messages so large that their sums overflow, a mask of the least float32 say.
        """
        clean = torch.from_numpy(clean_R).to(summaries_RV.device, non_blocking=True)
        sound = self._fits(summaries_RV, largest_R)
        if clean_R.any():
            average_V = self._averages.get(end)
            if average_V is None or average_V.numel() != summaries_RV.shape[1]:
                average_V = self._averages[end] = summaries_RV.new_zeros(summaries_RV.shape[1])
                self._counts[end] = 0
            decay, faulty_V = self._decay(end), ~(average_V.abs() <= self._limits(summaries_RV, clean & sound))
            average_V.masked_fill_(faulty_V, 0.0)
            baseline_update(average_V, summaries_RV, clean & sound, decay)
            self._counts[end] += 1
            # There it starts anew, as an average of this step alone.
            alone = (1.0 - decay ** self._counts[end]) / (1.0 - decay)
            average_V.copy_(torch.where(faulty_V, average_V * alone, average_V))
        return clean & ~sound & ~self._overflows(summaries_RV, largest_R)

    @staticmethod
    def _overflows(summaries_RV: torch.Tensor, largest_R: np.ndarray | None) -> torch.Tensor:
        """bool [R]: what is not finite, of messages of which it must be expected."""
        if largest_R is None:
            return torch.zeros(len(summaries_RV), dtype=torch.bool, device=summaries_RV.device)
        huge_R = torch.from_numpy(largest_R * _MOST_TOKENS > _LARGEST).to(summaries_RV.device, non_blocking=True)
        return huge_R & ~summaries_RV.isfinite().all(1)

    @staticmethod
    def _limits(summaries_RV: torch.Tensor, counted_R: torch.Tensor) -> torch.Tensor:
        """float32 [V], how large an average may be; means and quantiles differ in size."""
        sizes_RV = torch.where(counted_R[:, None], summaries_RV.abs(), 0.0)
        parts = sizes_RV.tensor_split([summaries_RV.shape[1] - DIRECTIONS * QUANTILES], dim=1)
        limits = [
            torch.where((most := part.amax()) > 0, LARGER * most, _LARGEST).expand(part.shape[1]) for part in parts
        ]
        return torch.cat(limits).clamp_max(_LARGEST)

    @staticmethod
    def _fits(summaries_RV: torch.Tensor, largest_R: np.ndarray | None) -> torch.Tensor:
        """bool [R]: a mean is at most the largest magnitude, a projection on a unit direction sqrt(D) times that."""
        finite = summaries_RV.isfinite().all(1)
        if largest_R is None:
            return finite
        hidden = summaries_RV.shape[1] - DIRECTIONS * QUANTILES
        limits_R2 = 2.0 * np.outer(largest_R, [1.0, hidden**0.5])  # twice, for what is rounded on the way
        limits_R2 = np.minimum(limits_R2, _LARGEST)
        limits_R2[limits_R2 == 0.0] = np.inf
        limits = torch.from_numpy(limits_R2.astype(np.float32)).to(summaries_RV.device, non_blocking=True)
        of_means, of_quantiles = (part.abs().amax(1) for part in summaries_RV.tensor_split([hidden], dim=1))
        return finite & (of_means <= limits[:, 0]) & (of_quantiles <= limits[:, 1])

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        state: dict[str, torch.Tensor | int] = {}
        for end, average in self._averages.items():
            state[f"average_{end[0]}_{end[1]}"] = average.cpu().clone()
            state[f"count_{end[0]}_{end[1]}"] = self._counts[end]
        return state

    def load_state_dict(
        self, state: Mapping[str, torch.Tensor | int], device: torch.device, without: Collection[End] = ()
    ) -> None:
        """Take a state over, but for the ends ``without``, which start anew."""
        self._averages, self._counts = {}, {}
        for end in ENDS:
            average = state.get(f"average_{end[0]}_{end[1]}")
            if isinstance(average, torch.Tensor) and end not in without:
                self._averages[end] = average.to(device)
                self._counts[end] = int(state[f"count_{end[0]}_{end[1]}"])

    @staticmethod
    def holds(state: object) -> bool:
        """Whether that is a state: of each end an average, float32 [V], and how many steps it is of, or neither."""
        if not isinstance(state, Mapping):
            return False
        ends = [(state.get(f"average_{end[0]}_{end[1]}"), state.get(f"count_{end[0]}_{end[1]}")) for end in ENDS]
        return all(
            (average is None and count is None)
            or (
                isinstance(average, torch.Tensor)
                and average.dtype == torch.float32
                and average.dim() == 1
                and type(count) is int
                and 0 <= count <= _MOST_STEPS
            )
            for average, count in ends
        )

    @staticmethod
    def spoilt(state: Mapping[str, torch.Tensor | int]) -> tuple[End, ...]:
        """The ends of which a state holds values that are not finite."""
        averages = {end: state.get(f"average_{end[0]}_{end[1]}") for end in ENDS}
        return tuple(
            end
            for end, average in averages.items()
            if isinstance(average, torch.Tensor) and not average.isfinite().all()
        )

    def _decay(self, end: End) -> float:
        return self._decays[0] if end[0] == FORWARD else self._decays[1]
