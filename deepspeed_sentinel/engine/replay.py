"""A step twice in time, for meshes that have too few replicas for twins: what differs is a transient fault.

One step in ``"replay"`` at random begins with a rehearsal: the schedule runs on the step's micro-batches up to where
gradients would be reduced, digests of all messages and gradients are kept, and everything is put back to what it was:
gradients, buffers, losses, random numbers. Then the step runs as ever. At the gate the two are compared
(``judgement/replay.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.engine import access
from deepspeed_sentinel.engine.randomness import RandomState
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.probe import ENDS, End, Probe
from deepspeed_sentinel.evidence.table import SENT
from deepspeed_sentinel.evidence.weights import tensors_digest
from deepspeed_sentinel.judgement.replay import Replayed, Replays
from deepspeed_sentinel.mesh import FORWARD, Mesh

_BITS = 32  # micro-batches told in one word


@dataclass(frozen=True)
class _Rehearsed:
    digests: dict[End, torch.Tensor]
    keyed: dict[End, torch.Tensor]
    gradients: torch.Tensor


class Replay:
    """Runs steps twice on one rank.

    Args:
        engine: whose steps.
        mesh, ranks: the mesh and int [S, R], the global rank of each worker.
        control: gathers of all ranks.
        probe: reads the messages.
        every: one step in so many; 0 is none.
        seed: of the draw, which all ranks make alike.
    """

    def __init__(
        self,
        engine: PipelineEngine,
        mesh: Mesh,
        ranks: np.ndarray,
        control: Control,
        probe: Probe,
        *,
        every: int,
        seed: int,
    ) -> None:
        self._engine, self._mesh, self._ranks, self._control, self._probe = engine, mesh, ranks, control, probe
        self._every, self._seed = every, seed
        self._replays = Replays(mesh)
        self._rehearsed: _Rehearsed | None = None

    def due(self, step: int) -> bool:
        """Whether this step is replayed, as all ranks draw alike."""
        return self._every > 0 and bool(np.random.default_rng((self._seed, step, 4)).integers(self._every) == 0)

    def rehearse(self, run: Callable[[], None], put_back: Callable[[], None]) -> None:
        """Run the step's schedule once for nothing.

        Args:
            run: the schedule, with every message read by the probe.
            put_back: what of the step Sentinel itself keeps.
        """
        engine, randomness = self._engine, RandomState.now()
        instructions = engine._INSTRUCTION_MAP
        engine._INSTRUCTION_MAP = {**instructions, **dict.fromkeys(_LEFT_OUT, _nothing)}
        try:
            run()
        except BaseException:  # who goes on after it goes on with the numbers that come next
            randomness.put_back()
            raise
        finally:
            engine._INSTRUCTION_MAP = instructions
        self._rehearsed = _Rehearsed(
            {end: self._probe.digests(end).clone() for end in self._probe.ends},
            {end: self._probe.keyed(end) for end in self._probe.ends},
            self._of_gradients(),
        )
        access.clear_gradients(engine)
        engine.total_loss = engine.total_additional_losses = None
        put_back()
        randomness.put_back()

    @torch.no_grad()
    def compare(self, wiring: np.ndarray) -> Replayed | None:
        """What the rehearsal and the step itself differ in, before gradients are reduced. Collective after a rehearsal.

        None in a step that was not rehearsed.

        Args:
            wiring: int64 [S, C], of this step.
        """
        before, self._rehearsed = self._rehearsed, None
        if before is None:
            return None
        count = self._probe.micro_batches
        differs = np.zeros((len(ENDS), count), bool)
        for end, digests in before.digests.items():
            other_M = (digests != self._probe.digests(end)).flatten(1).any(1)
            # Two versions of a message that were made up to have one digest are told apart by who receives them.
            other_M |= before.keyed[end] != self._probe.keyed(end)
            differs[ENDS.index(end)] = other_M.cpu().numpy()
        gradients = int((before.gradients != self._of_gradients()).any())
        padded = np.pad(differs, ((0, 0), (0, -count % _BITS))).reshape(len(ENDS), -1, _BITS)
        words = (padded * (1 << np.arange(_BITS, dtype=np.int64))).sum(-1)
        said = self._control.gather_words(gradients, *words.ravel().tolist()).numpy()[self._ranks]
        serving = np.take_along_axis(said[..., 1:], wiring[..., None], axis=1)
        bits = (serving.reshape(*wiring.shape, len(ENDS), -1, 1) >> np.arange(_BITS)) & 1
        told_SCEM = bits.reshape(*wiring.shape, len(ENDS), -1)[..., :count].astype(bool)
        links, columns = self._mesh.links, self._mesh.replicas
        by_ends = np.zeros((2, 2, links, columns, count), bool)
        for index, (direction, role) in enumerate(ENDS):
            below = (direction == FORWARD) == (role == SENT)
            by_ends[role, direction] = told_SCEM[:-1, :, index] if below else told_SCEM[1:, :, index]
        return self._replays.step(by_ends, said[..., 0] != 0, wiring)

    def _of_gradients(self) -> torch.Tensor:
        gradients = list(access.gradients(self._engine))
        device = torch.device(self._engine.device)
        return tensors_digest(gradients, device) if gradients else torch.zeros((), dtype=torch.int64, device=device)


_LEFT_OUT = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)


def _nothing(engine: PipelineEngine, **kwargs: Any) -> None:
    """In place of an instruction that a rehearsal leaves out."""
