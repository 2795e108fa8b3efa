"""Weights compared between replicas, now and then: who holds other ones than most is named and given theirs.

``Sentinel`` asks at the beginning of every training step whether a comparison is due. ``compare`` may be called at any
time between two optimizer steps, on all ranks at once, such as in a twin step, which proves nothing of a worker that
computes with other weights than the rest.
"""

from __future__ import annotations

import numpy as np
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.engine.replicated import replicated
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.errors import WeightsDiffer
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.weights import Comparison, Division, divisions, layout, tensors_digest
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.response.healing import heal


class WeightComparison:
    """Compares the weights of one engine's stage with those of the other replicas.

    Attributes:
        last: the latest comparison, or None.
        lenient: only tell, neither heal nor stop.

    Args:
        engine: whose weights.
        worker, ranks: this worker, and int [S, R], the global rank of each.
        control: gathers of all ranks.
        telling: says what was found.
        every: steps from one comparison to the next; 0 for none but those that are asked for.
        lenient: see above.
    """

    def __init__(
        self,
        engine: PipelineEngine,
        worker: Worker,
        ranks: np.ndarray,
        control: Control,
        telling: Telling,
        *,
        every: int,
        lenient: bool,
    ) -> None:
        self._engine, self._worker, self._ranks = engine, worker, ranks
        self._control, self._telling = control, telling
        self._every, self.lenient = every, lenient
        self._device = torch.device(engine.device)
        self._loaded = engine.global_steps > 0
        self.last: Comparison | None = None
        self._unequal: tuple[int, frozenset[Worker]] = (-1, frozenset())

    def after_load(self) -> None:
        """A checkpoint was loaded: the next step begins with a comparison."""
        self._loaded = True
        self._unequal = (-1, frozenset())  # the step may come again, with other weights

    def unequal_in(self, step: int) -> tuple[Worker, ...]:
        """Who held other weights than most before a step, by any of its comparisons: the first may have healed them."""
        of_step, workers = self._unequal
        return tuple(sorted(workers)) if of_step == step else ()

    def begin_step(self) -> None:
        """Compare if it is due: every so many steps, and at the first step after a load. Collective.

        Raises:
            WeightsDiffer: see ``compare``.
        """
        step = self._engine.global_steps
        due = self._loaded or (step > 0 and self._every > 0 and step % self._every == 0)
        self._loaded = False
        if due and self._every and self._ranks.shape[1] > 1:
            self.compare()

    @torch.no_grad()
    def compare(self) -> Comparison:
        """Compare now: each tensor is read once, one number copied to the host, one small gather. Collective.

        A minority is given the majority's tensors before it returns. Who holds other ones after that too, whoever of
        the majority sent them, cannot keep them or lies: it is not healed, and training goes on.

        Raises:
            WeightsDiffer: on all ranks, where a stage has no strict majority, unless lenient.
        """
        step = self._engine.global_steps
        if self._ranks.shape[1] == 1:
            self.last = Comparison(step, (), healed=False)
            return self.last
        tensors = replicated(self._engine)
        digests_SR, layouts_SR = self._gather(tensors)
        found = divisions(digests_SR)
        unequal = tuple(Worker(one.stage, replica) for one in found for replica in one.minority)
        undecided = tuple(one.stage for one in found if not one.majority)
        stops = bool(undecided) and not self.lenient
        healed = bool(unequal) and not stops and not self.lenient and self._heal(tensors, found, layouts_SR)
        self.last = Comparison(step, unequal, healed, undecided)
        self._unequal = (step, frozenset((*self.unequal_in(step), *unequal)))
        if found:
            action = "stopped" if stops else "reported" if self.lenient else "healed" if healed else "unhealed"
            self._telling.weights(self.last, found, action)
        if stops:
            raise WeightsDiffer(_without_majority(step, [one for one in found if not one.majority]))
        return self.last

    def _gather(self, tensors: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Digests and layouts of all workers, int64 [S, R] each."""
        words = torch.tensor([int(tensors_digest(tensors, self._device)), layout(tensors)])
        said = self._control.all_gather(words).numpy()
        return said[:, 0][self._ranks], said[:, 1][self._ranks]

    def _heal(self, tensors: list[torch.Tensor], found: tuple[Division, ...], layouts_SR: np.ndarray) -> bool:
        """Whether every minority holds the majority's tensors now. All ranks take part equally often."""
        ill = {one.stage: one.minority for one in found}
        for attempt in range(max(len(one.majority) for one in found)):
            # Only tensors of the source's own shapes can take what it sends, as both tell of theirs.
            receivers = {
                one.stage: [
                    replica
                    for source in one.majority[attempt : attempt + 1]
                    for replica in ill[one.stage]
                    if layouts_SR[one.stage, replica] == layouts_SR[one.stage, source]
                ]
                for one in found
            }
            if not any(receivers.values()):
                continue
            for one in found:
                if one.stage == self._worker.stage and receivers[one.stage]:
                    source, *others = self._ranks[one.stage, [one.majority[attempt], *receivers[one.stage]]].tolist()
                    heal(tensors, source, others, self._engine.mpu.get_data_parallel_group(), self._device)
            digests_SR, _ = self._gather(tensors)
            for one in found:
                held = digests_SR[one.stage]
                ill[one.stage] = tuple(replica for replica in ill[one.stage] if held[replica] != one.digests[0])
        return not any(ill.values())


def _without_majority(step: int, found: list[Division]) -> str:
    return (
        f"weights differ between replicas at step {step}. In {'. In '.join(map(str, found))}. No more than half of a "
        "stage's replicas hold the same, so nobody can tell which are right: nothing was healed, and no checkpoint was "
        "written. Resume from the last checkpoint; a worker that differs from the others again has unsound memory. If "
        "your replicas hold different weights by intent (unlike devices that round differently, an optimizer that "
        'draws its roundings), set "weights_every": 0.'
    )
