"""Runs that have their honest steps in common: trained once, then continued for each attack.

Until ``start`` nobody tampers, so runs that differ in nothing but who does what from then on are the same run. The
trunk is that run up to ``start``; a branch goes on from it and gives, bit for bit, what it would give alone. Attackers
that watch before they act ride along in the trunk.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepspeed_sentinel.simulation.attackers import Attackers
from deepspeed_sentinel.simulation.options import SimulationOptions, trunk_of
from deepspeed_sentinel.simulation.paper import PaperJudge
from deepspeed_sentinel.simulation.run import Simulation

_PARTS = ("judge", "dealer", "verifiers", "tally", "step_index", "seconds", "losses", "served")


@dataclass(frozen=True)
class Trunk:
    """A run at ``start``, as bytes that another process can take up.

    Attributes:
        options: of the trunk.
        state: everything that has changed since step 0.
        watchers: what attackers saw, by the key of their run; None where it cannot be put into bytes.
    """

    options: SimulationOptions
    state: bytes
    watchers: dict[str, bytes | None]

    @classmethod
    def grow(cls, runs: Sequence[SimulationOptions]) -> Trunk:
        """Train the steps before ``start`` once for all ``runs``, whose trunks are equal."""
        options = trunk_of(runs[0])
        riders = {}
        for run in runs:
            assert trunk_of(run) == options, run
            attackers = Simulation.attackers_of(run)
            if attackers is not None and (attackers.watches or attackers.needs.recompute_steps):
                riders[run.key()] = attackers
        simulation = Simulation(options, tuple(riders.values()))
        while simulation.step_index < options.start:
            simulation.step()
        return cls.of(simulation, options, {key: _bytes_of(one) for key, one in riders.items()})

    @classmethod
    def of(cls, simulation: Simulation, options: SimulationOptions, watchers: dict[str, bytes | None]) -> Trunk:
        """A simulation as it stands between two steps."""
        state = {name: getattr(simulation, name) for name in _PARTS}
        state["weights"] = [stage.state_dict() for stage in simulation.stages]
        state["optimizer"], state["schedule"] = simulation.optimizer.state_dict(), simulation.schedule.state_dict()
        state["past"] = simulation.history.past
        return cls(options, pickle.dumps(state), watchers)

    def branch(self, options: SimulationOptions) -> Simulation:
        """The simulation of ``options`` at ``start``; at its first step if its attackers could not be copied."""
        assert trunk_of(options) == self.options, options
        simulation = Simulation(options)  # first, since it loads the classes of users' own attacks
        seen = self.watchers.get(options.key(), b"")
        if seen is None:
            return simulation
        state = pickle.loads(self.state)
        for name in _PARTS:
            setattr(simulation, name, state[name])
        if isinstance(simulation.judge, PaperJudge):
            simulation.judge.judged = np.array(options.directions)
        for stage, weights in zip(simulation.stages, state["weights"], strict=True):
            stage.load_state_dict(weights)
        simulation.optimizer.load_state_dict(state["optimizer"])
        simulation.schedule.load_state_dict(state["schedule"])
        simulation.history.past.extend(state["past"])
        simulation.skip_text(simulation.step_index)
        if seen:
            simulation.attackers = pickle.loads(seen)
        return simulation

    def write(self, path: Path) -> None:
        path.write_bytes(pickle.dumps(self))

    @staticmethod
    def read(path: Path) -> Trunk:
        """A trunk that ``write`` wrote."""
        trunk = pickle.loads(path.read_bytes())
        assert isinstance(trunk, Trunk)
        return trunk


def _bytes_of(attackers: Attackers) -> bytes | None:
    try:
        return pickle.dumps(attackers)
    except (pickle.PicklingError, AttributeError, TypeError):
        # An attack of a user's own may keep what cannot be copied; its run is made alone.
        return None
