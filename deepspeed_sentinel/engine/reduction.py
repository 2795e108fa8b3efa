"""The reduction of gradients in a twin step, whose outcome is known beforehand: the mean of equal gradients is each.

Who feeds the all-reduce something else than it accumulated and reported is seen by every replica of its stage: what
comes out is not what went in, by more than the rounding of a sum of R numbers. The step is then not applied.

Who it was, the outcome does not tell. So each replica shows what it handed over, in a chunk that is drawn only then,
and who shows something else than most is named. Memory that fails before the reduction shows itself so. What lies in
the reduction alone, and shows the right chunk afterwards, is seen and stays without a name.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.engine import access
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.weights import divisions, tensors_digest
from deepspeed_sentinel.mesh import Worker

_CHUNK = 4096
_BITS = 62
_FINE, _WRONG = 0, 1


@dataclass(frozen=True)
class Poisoned:
    """A reduction that does not give the mean of what was reported.

    Attributes:
        step: the engine's global step, which was not applied.
        stages: whose.
        named: workers that handed over something else than most of their stage.
    """

    step: int
    stages: tuple[int, ...]
    named: tuple[Worker, ...]

    def __str__(self) -> str:
        who = (
            f"{', '.join(map(str, self.named))} handed over something else than the others"
            if self.named
            else "nobody shows anything else than the others, so one of them alters it in the reduction itself"
        )
        return (
            f"the reduction of the gradients of stage {', '.join(map(str, self.stages))} does not give the mean of "
            f"what its replicas have accumulated, which were equal: {who}. The step is not applied"
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
    def watch(self, reduce: Callable[[], None], included: bool, factor: float) -> Poisoned | None:
        """Reduce, and hold the outcome against what this worker handed over. Collective over all ranks.

        Gradients are kept twice until it is done, when activations have long been freed.

        Args:
            reduce: DeepSpeed's own reduction.
            included: this column takes part, and its gradients are those that all included replicas have.
            factor: by which they were raised before, see ``response/gate.py``.
        """
        before = access.gradients_by_parameter(self._engine) if included else ()
        handed_over = [(parameter, gradient.clone()) for parameter, gradient in before]
        reduce()
        wrong = _FINE
        if included:
            found = access.reduced_gradients(self._engine, handed_over)
            wrong = _WRONG if any(self._differs(*pair, factor) for pair in found) else _FINE
        drawn = secrets.randbits(_BITS)
        said_SR = self._control.all_gather(torch.tensor([wrong, int(included), drawn])).numpy()[self._ranks]
        stages = tuple(np.flatnonzero((said_SR[..., 0] == _WRONG).any(-1)).tolist())
        if not stages:
            return None
        # Nobody could know the chunk while anybody could still choose what to hand over.
        shown = _shown(
            [copy for _, copy in handed_over],
            int(np.bitwise_xor.reduce(said_SR[..., 2], axis=None)),
            self._engine.device,
        )
        shown_SR = self._control.all_gather(torch.tensor([shown])).numpy()[:, 0][self._ranks]
        named = []
        for stage in stages:
            able = np.flatnonzero(said_SR[stage, :, 1])
            for one in divisions(shown_SR[stage, able][None]):
                named += [Worker(stage, int(able[replica])) for replica in one.minority]
        return Poisoned(self._engine.global_steps, stages, tuple(named))

    def _differs(self, handed_over: torch.Tensor, outcome: torch.Tensor, factor: float) -> bool:
        """Whether an outcome is further from what it must be than R roundings; NaN is."""
        replicas = self._ranks.shape[1]
        types = [handed_over.dtype, outcome.dtype, self._engine.communication_data_type]
        coarsest = max((torch.finfo(one) for one in types), key=lambda info: info.eps)
        expected = handed_over.float() / factor
        room = 2 * replicas * (coarsest.eps * expected.abs() + coarsest.tiny)
        fine = ((outcome.float() - expected).abs() <= room) | ~expected.isfinite()
        if self._engine.fp16_enabled():  # a sum may leave the range, and the scaler skips the step
            fine |= ~outcome.isfinite()
        return not bool(fine.all())


def _shown(handed_over: list[torch.Tensor], seed: int, device: str | torch.device) -> int:
    """A digest of a chunk of each tensor; 0 where nothing was handed over."""
    if not handed_over:
        return 0
    generator = np.random.default_rng(seed)
    chunks = []
    for tensor in handed_over:
        start = int(generator.integers(max(tensor.numel() - _CHUNK, 0) + 1))
        chunks.append(tensor.reshape(-1)[start : start + _CHUNK])
    return int(tensors_digest(chunks, torch.device(device)))
