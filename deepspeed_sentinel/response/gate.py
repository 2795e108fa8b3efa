"""The gate: an excluded column's contribution is zero, the others weigh accordingly more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Share:
    """What one column contributes to this step.

    Attributes:
        included: the column takes part.
        factor: replicas / included replicas, by which the others' average over all replicas must be raised; 1.0
            when nobody is excluded.
    """

    included: bool
    factor: float

    @classmethod
    def of(cls, excluded: np.ndarray, column: int) -> Share:
        """``excluded`` is bool [columns]; with every column excluded the factor is 1.0 and the step is skipped."""
        left = int(np.count_nonzero(~excluded))
        return cls(included=not bool(excluded[column]), factor=len(excluded) / left if left else 1.0)

    @property
    def changes_nothing(self) -> bool:
        return self.included and self.factor == 1.0

    def apply_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Mask or rescale in place. Masking, because zero times NaN is NaN."""
        if self.changes_nothing:
            return
        for tensor in tensors:
            if self.included:
                tensor.mul_(self.factor)
            else:
                tensor.zero_()
