"""Which workers serve which column, on one rank: the wiring that messages go by, and the one that comes next.

The gate deals the next one from each step's verdict, all ranks alike. It takes effect when the next schedule begins, of
a training step or of an evaluation, and so on all ranks between the same two.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine import access
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.engine.wiring import column_ranks, neighbours, reopen_links
from deepspeed_sentinel.evidence.collector import Collector
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.mesh import columns_of, identity
from deepspeed_sentinel.response.dealing import Dealer


class Columns:
    """Puts wirings into effect.

    Attributes:
        wiring: int64 [S, C], what messages went by last.

    Args:
        engine: whose messages.
        config: the effective settings.
        collector: of this engine.
        telling: says who moves.
    """

    def __init__(self, engine: PipelineEngine, config: SentinelConfig, collector: Collector, telling: Telling) -> None:
        self._engine, self._config, self._collector, self._telling = engine, config, collector, telling
        self._mesh, self._worker = access.mesh_of(engine), access.worker_of(engine)
        self._ranks = access.ranks_of(engine)
        self._dealer = Dealer.of(config, self._mesh)
        self._next = self.wiring = identity(self._mesh)
        self._last_step = -1

    @property
    def next(self) -> np.ndarray:
        """int64 [S, C], what the next schedule goes by, or the one that runs."""
        return self._next

    @property
    def own(self) -> int:
        """The column that this worker serves."""
        return int(columns_of(self.wiring)[self._worker])

    def of(self, step: int) -> np.ndarray:
        """The wiring of the last judged step, int64 [S, C], or of the one after it."""
        return self.wiring if step <= self._last_step else self._next

    def deal(self, step: int, doubts: Doubts) -> np.ndarray:
        """Draw the wiring that follows a step, int64 [S, C], from what is known after it."""
        self._last_step, self._next = step, self._dealer.next(step, doubts)
        return self._next

    def in_effect(self) -> AbstractContextManager[None]:
        """For a schedule: inside, messages go by what was dealt last."""
        before = self.wiring
        if self._go_by(self._next):
            self._telling.wiring(self._engine.global_steps, before, self.wiring)
        return neighbours(self._engine, column_ranks(self.wiring, self._ranks, self._worker))

    def go_by(self, config: SentinelConfig) -> None:
        """Deal by other settings from the next schedule on; where nobody is moved, DeepSpeed's own wiring holds."""
        before, self._config = self._dealer.state_dict(), config
        self._dealer = Dealer.of(config, self._mesh)
        if config.wiring != "static":
            self._dealer.load_state_dict(before)
        self._next = self._dealer.wiring

    def give_back(self) -> None:
        """Go by DeepSpeed's own wiring, for good."""
        self._go_by(identity(self._mesh))

    def state_dict(self) -> dict[str, np.ndarray]:
        return self._dealer.state_dict()

    def problem(self, state: object) -> str | None:
        """Why a state cannot be taken up, in words that follow "checkpoint ..."; None if it can."""
        if not isinstance(state, dict):
            return "has no wiring"
        try:
            Dealer.of(self._config, self._mesh).load_state_dict(state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"has a wiring that cannot be: {error}"
        return None

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Go on from a saved state; where nobody is moved, DeepSpeed's own wiring holds all the same."""
        if self._config.wiring != "static":
            self._dealer.load_state_dict(state)
        elif (state["wiring"] != identity(self._mesh)).any():
            self._telling.own_wiring()
        self._next = self._dealer.wiring

    def _go_by(self, wiring: np.ndarray) -> bool:
        """Whether anybody has moved."""
        before, self.wiring, self._next = self.wiring, wiring, wiring
        if (before == wiring).all():
            return False
        reopen_links(self._engine, before, wiring, self._worker)
        self._collector.wire(wiring)
        return True
