"""The reduction of gradients in a twin step, whose outcome is known beforehand: the mean of equal gradients is each.

Who feeds the all-reduce something else than it accumulated and reported is seen by every replica of its stage: what
comes out is not what went in, by more than the rounding of a sum of R numbers. The step is then not applied.

Who it was, the outcome does not tell. So each replica shows a digest of all that it handed over, and who shows another
one than most is named, where most are more than can be bad. Memory that fails before the reduction shows itself so.
What lies in the reduction alone, and shows the right digest afterwards, is seen and stays without a name. So does a
replica that says of a right outcome that it is wrong: a twin step is lost by it, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.engine import access
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.weights import divisions, tensors_digest
from deepspeed_sentinel.mesh import Worker


@dataclass(frozen=True)
class Poisoned:
    """A reduction that does not give the mean of what was reported.

    Attributes:
        step: the engine's global step, which was not applied.
        said_by: who found its outcome wrong, by its own word.
        named: workers that handed over something else than most of their stage.
    """

    step: int
    said_by: tuple[Worker, ...]
    named: tuple[Worker, ...]

    @property
    def stages(self) -> tuple[int, ...]:
        """Whose reduction."""
        return tuple(sorted({worker.stage for worker in self.said_by}))

    def __str__(self) -> str:
        who = (
            f"{', '.join(map(str, self.named))} handed over something else than the others"
            if self.named
            else "nobody is shown to have handed over anything else, so one of the stage alters it in the reduction "
            "itself, or says what is not so"
        )
        return (
            f"the reduction of the gradients of stage {', '.join(map(str, self.stages))} does not give the mean of "
            f"what its replicas have accumulated, which were equal, as {', '.join(map(str, self.said_by))} found: "
            f"{who}. The step is not applied"
        )


class Reduction:
    """Watches the reductions of twin steps on one rank.

    Args:
        engine: whose gradients.
        worker, ranks: this worker, and int [S, R], the global rank of each.
        control: gathers of all ranks.
    """

    def __init__(self, engine: PipelineEngine, worker: Worker, ranks: np.ndarray, control: Control) -> None:
        self._engine, self._worker, self._ranks, self._control = engine, worker, ranks, control

    @torch.no_grad()
    def watch(self, reduce: Callable[[], None], included_SR: np.ndarray, factor: float) -> Poisoned | None:
        """Reduce, and hold the outcome against what this worker handed over. Collective over all ranks.

        Gradients are kept twice until it is done, when activations have long been freed.

        Args:
            reduce: DeepSpeed's own reduction.
            included_SR: bool [S, R], who takes part with the gradients that all included replicas of its stage have.
            factor: by which they were raised before, see ``response/gate.py``.
        """
        included = bool(included_SR[self._worker])
        before = access.gradients_by_parameter(self._engine) if included else ()
        handed_over = [(parameter, gradient.clone()) for parameter, gradient in before]
        reduce()
        found = access.reduced_gradients(self._engine, handed_over) if included else ()
        wrong = any(self._differs(*pair, factor) for pair in found)
        wrong_SR = (self._gathered(int(wrong)) != 0) & included_SR
        if not wrong_SR.any():
            return None
        copies = [copy for _, copy in handed_over]
        shown_SR = self._gathered(int(tensors_digest(copies, torch.device(self._engine.device))))
        said_by = tuple(Worker(*place) for place in np.argwhere(wrong_SR).tolist())
        # More than can be bad where fewer than half of a stage's workers are: the others may have been left out.
        quorum = max(2, (self._ranks.shape[1] - 1) // 2 + 1)
        named = []
        for stage in sorted({worker.stage for worker in said_by}):
            able = np.flatnonzero(included_SR[stage])
            for one in divisions(shown_SR[stage, able][None]):
                if len(one.majority) >= quorum:
                    named += [Worker(stage, int(able[replica])) for replica in one.minority]
        return Poisoned(self._engine.global_steps, said_by, tuple(named))

    def _gathered(self, word: int) -> np.ndarray:
        """What every worker says, int64 [S, R]."""
        return self._control.all_gather(torch.tensor([word])).numpy()[:, 0][self._ranks]

    def _differs(self, handed_over: torch.Tensor, outcome: torch.Tensor, factor: float) -> bool:
        """Whether an outcome is further from what it must be than R roundings; NaN is."""
        replicas = self._ranks.shape[1]
        types = [handed_over.dtype, outcome.dtype, self._engine.communication_data_type]
        coarsest = max((torch.finfo(one) for one in types), key=lambda info: info.eps)
        fed, found = _elements(handed_over.float(), outcome.float())
        expected = fed / factor
        room = 2 * replicas * (coarsest.eps * expected.abs() + coarsest.tiny)
        fine = ((found - expected).abs() <= room) | ~expected.isfinite()
        if self._engine.fp16_enabled():  # a sum may leave the range, and the scaler skips the step
            fine |= ~found.isfinite()
        return not bool(fine.all())


def _elements(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two tensors of one shape, so that equal places are compared; of sparse ones only what either holds.

    Example: of ``{1: 5}`` and ``{1: 6, 4: 7}``, ``[5, 0]`` and ``[6, 7]``.
    """
    if not (one.is_sparse and other.is_sparse):
        return one.to_dense(), other.to_dense()
    zeros = [torch.sparse_coo_tensor(x._indices(), torch.zeros_like(x._values()), x.shape) for x in (other, one)]
    first, second = ((x + zero).coalesce().values() for x, zero in zip((one, other), zeros, strict=True))
    return first, second
