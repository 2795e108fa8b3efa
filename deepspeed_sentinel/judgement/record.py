"""The record of every worker: strikes, convictions, probation; and of every link: disputes."""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.mesh import Mesh


class Record:
    """Strikes within a sliding window convict; a conviction is lifted after ``probation`` steps without a strike.

    A released worker stays on probation for as long again: one strike then convicts it at once. First and last
    stage are trusted: they collect strikes, so that events can tell, but are never convicted.
    """

    def __init__(self, mesh: Mesh, strikes: int, window: int, probation: int) -> None:
        self.mesh = mesh
        self.strikes_needed = strikes
        self.probation = probation
        shape = (mesh.stages, mesh.replicas)
        self._struck = np.zeros((window, *shape), bool)
        self._disputed = np.zeros((window, mesh.links, mesh.replicas), bool)
        self.convicted = np.zeros(shape, bool)
        self.on_probation = np.zeros(shape, bool)
        self._quiet_steps = np.zeros(shape, np.int64)
        self._position = 0
        self._before: dict[str, np.ndarray] | None = None
        self._trusted = np.zeros(shape, bool)
        self._trusted[[0, -1]] = True

    @property
    def strikes(self) -> np.ndarray:
        """Strikes within the window, int [S, R]."""
        return np.count_nonzero(self._struck, axis=0)

    @property
    def lasting_disputes(self) -> np.ndarray:
        """Links disputed as often as it takes strikes to convict, bool [L, C]."""
        return np.count_nonzero(self._disputed, axis=0) >= self.strikes_needed

    def update(self, struck: np.ndarray, disputed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Enter one step.

        Args:
            struck: bool [S, R], workers blamed in this step.
            disputed: bool [L, C], links in dispute in this step.

        Returns:
            bool [S, R] twice: newly convicted, released.
        """
        self._before = self.state_dict()
        slot = self._position % len(self._struck)
        self._struck[slot], self._disputed[slot] = struck, disputed
        self._position += 1
        self._quiet_steps = np.where(struck, 0, self._quiet_steps + 1)
        guilty = (self.strikes >= self.strikes_needed) | (self.on_probation & struck)
        newly = guilty & ~self.convicted & ~self._trusted
        self.convicted = self.convicted | newly
        self.on_probation = self.on_probation & ~newly
        quiet = self._quiet_steps >= self.probation
        released = self.convicted & quiet
        served = self.on_probation & quiet
        self.convicted = self.convicted & ~released
        self.on_probation = (self.on_probation & ~served) | released
        self._quiet_steps = np.where(released, 0, self._quiet_steps)
        self._struck[:, released] = False
        return newly, released

    def update_again(self, struck: np.ndarray, disputed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Enter the last step anew, in place of what was entered: strikes were taken back, links found in dispute.

        Args and returns as of ``update``.
        """
        assert self._before is not None, "no step was entered yet"
        self.load_state_dict(self._before)
        return self.update(struck, disputed)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "struck": self._struck.copy(),
            "disputed": self._disputed.copy(),
            "convicted": self.convicted.copy(),
            "on_probation": self.on_probation.copy(),
            "quiet_steps": self._quiet_steps.copy(),
            "position": np.array(self._position),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._struck = np.array(state["struck"])
        self._disputed = np.array(state["disputed"])
        self.convicted = np.array(state["convicted"])
        self.on_probation = np.array(state["on_probation"])
        self._quiet_steps = np.array(state["quiet_steps"])
        self._position = int(state["position"])
