"""What stands on the links of a simulated run in one pass: attackers before, verifiers behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deepspeed_sentinel.mesh import FORWARD
from deepspeed_sentinel.simulation.attackers import Part
from deepspeed_sentinel.simulation.weights import backward_from

if TYPE_CHECKING:
    from deepspeed_sentinel.simulation.run import Simulation


class WatchedLinks:
    """What stands on the links in one pass: attackers before, verifiers behind."""

    def __init__(self, simulation: Simulation, part: Part) -> None:
        self._simulation = simulation
        self._part = part
        # Only attackers that compute again need what entered their stage forward.
        self._keeps = simulation.attackers is not None and simulation.attackers.needs.simulator_only
        self._entered_forward: dict[int, torch.Tensor] = {}

    def cross(
        self, direction: int, link: int, sent_CMBTD: torch.Tensor, entered_CMBTD: torch.Tensor | None
    ) -> torch.Tensor:
        simulation, part = self._simulation, self._part
        sender = simulation.mesh.sender_stage(direction, link)
        if self._keeps and direction == FORWARD and entered_CMBTD is not None:
            self._entered_forward[sender] = entered_CMBTD
        crossed = sent_CMBTD
        for rider in simulation.riders:
            rider.tamper(
                direction, sender, simulation.step_index, part, simulation.served, sent_CMBTD, entered_CMBTD, None
            )
        if simulation.attackers is not None and entered_CMBTD is not None:
            crossed = simulation.attackers.tamper(
                direction, sender, simulation.step_index, part, simulation.served, sent_CMBTD, entered_CMBTD,
                _Anew(simulation, self._entered_forward, entered_CMBTD),
            )  # fmt: skip
        if simulation.guarded and not part.again:
            simulation.verifiers.observe(direction, link, *self._reported(direction, link, sent_CMBTD, crossed))
        return crossed

    def _reported(
        self, direction: int, link: int, honest: torch.Tensor, crossed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """On what senders and receivers report: what crossed, unless receivers are asked and lie."""
        simulation, part = self._simulation, self._part
        attackers = simulation.attackers
        if attackers is None or simulation.options.verifier == "trusted":
            return crossed, crossed
        step, served = simulation.step_index, simulation.served
        sender = simulation.mesh.sender_stage(direction, link)
        receiver = simulation.mesh.receiver_stage(direction, link)
        claimed = attackers.false_reports(direction, receiver, step, part, served, crossed)
        vouched_CM = attackers.vouched(sender, receiver, direction, step, part, served).to(crossed.device)
        if not vouched_CM.any():
            return crossed, claimed
        vouched = vouched_CM[:, :, None, None, None]
        return torch.where(vouched, honest, crossed), torch.where(vouched, honest, claimed)


@dataclass(frozen=True)
class _Anew:
    """What attackers on one link may have computed anew; see ``attackers.Anew``."""

    simulation: Simulation
    entered_forward: dict[int, torch.Tensor]
    entered_CMBTD: torch.Tensor

    def with_old_weights(self, direction: int, stage: int, at: tuple[int, int], k: int) -> torch.Tensor | None:
        gradient = None if direction == FORWARD else self.entered_CMBTD[at]
        return self.simulation.history.recompute(direction, stage, self.stored(stage, at), gradient, k)

    def stored(self, stage: int, at: tuple[int, int]) -> torch.Tensor:
        return self.entered_forward[stage][at]

    def backward_from(self, stage: int, at: tuple[int, int], stored_BTD: torch.Tensor) -> torch.Tensor:
        return backward_from(self.simulation.stages[stage], stored_BTD, self.entered_CMBTD[at])
