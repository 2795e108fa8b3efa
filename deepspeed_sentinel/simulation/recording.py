"""Writes what a live run writes, of a simulated one: events, the ledger and ``exclude.json``, for reports and tests.

Workers run on made-up hosts, eight a host, named ``simulated-0`` and on; nothing is known of their GPUs.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np

from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.simulation.run import Simulation
from deepspeed_sentinel.telemetry import events
from deepspeed_sentinel.telemetry.book import DRILL_FILE
from deepspeed_sentinel.telemetry.book import FILE as LEDGER_FILE
from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.eventlog import EventLog
from deepspeed_sentinel.telemetry.exclusion import FILE, Convict, exclusions, proved, reason, write_exclusions
from deepspeed_sentinel.telemetry.findings import verdict_events, wiring_event
from deepspeed_sentinel.telemetry.ledger import Ledger, step_counts
from deepspeed_sentinel.telemetry.who import Who

_SLOTS = 8


class Recorder:
    """Follows a guarded simulation.

    Args:
        simulation: before its first step.
        folder: where to write.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(self, simulation: Simulation, folder: Path) -> None:
        mesh = self._mesh = simulation.mesh
        self._folder = folder
        self._wiring = simulation.dealer.wiring
        self._suspects = self._isolated = np.zeros((mesh.stages, mesh.replicas), bool)
        ranks = np.arange(mesh.stages * mesh.replicas).reshape(mesh.stages, mesh.replicas)
        self._devices = [
            [Device(f"simulated-{rank // _SLOTS}", rank % _SLOTS, name="cpu") for rank in row] for row in ranks.tolist()
        ]
        self._who = Who(ranks, self._devices)
        self._log = EventLog(str(folder), secrets.token_hex(8), self._who)
        self._injected = simulation.attackers is not None
        self._ledger = Ledger(folder / (DRILL_FILE if self._injected else LEDGER_FILE), self._devices)
        self._convicts: dict[Worker, Convict] = {}
        self._counts = dict.fromkeys(
            ("judged_messages", "alarms", "disputes", "excluded_column_steps", "skipped_steps"), 0
        )
        self._steps = 0
        shape = {"stages": mesh.stages, "replicas": mesh.replicas}
        config = simulation.config.model_dump(mode="json")
        self._log.write(0, events.Start(shape, config, self._injected))

    def step(self, verdict: Verdict) -> None:
        """Write what one step came to."""
        for event in verdict_events(verdict, True, self._suspects, self._who, self._isolated):
            self._log.write(verdict.step, event)
        counts = step_counts(verdict, self._wiring)
        proofs = np.zeros_like(counts["judged"])
        for proof in verdict.proofs:
            proofs[proof.worker] += 1
        self._ledger.record(**counts, proofs=proofs, unequal_weights=np.zeros_like(proofs))
        for worker in verdict.newly_convicted:
            why = self._who.fill(reason(verdict, worker))
            place, device = self._who(worker), self._who.device(worker)
            self._convicts[worker] = Convict(place, device, verdict.step, why, proved(verdict, worker))
        for worker in verdict.released:
            self._convicts.pop(worker, None)
        self._suspects, self._isolated = verdict.suspects.copy(), verdict.isolated.copy()
        self._steps += 1
        for name, more in (
            ("judged_messages", int(counts["judged"].sum())),
            ("alarms", sum(len(finding.micro_batches) for finding in verdict.findings)),
            ("disputes", len(verdict.disputed)),
            ("excluded_column_steps", int(verdict.excluded.sum())),
            ("skipped_steps", int(verdict.skip)),
        ):
            self._counts[name] += more
        if verdict.wiring is not None and (verdict.wiring != self._wiring).any():
            self._log.write(verdict.step + 1, wiring_event(self._wiring, verdict.wiring))
            self._wiring = verdict.wiring

    def end(self) -> None:
        """Write what the run came to, and who is to be left out of the next."""
        self._log.write(self._steps, events.End({"steps": self._steps, **self._counts}, tuple(self._convicts), []))
        self._log.close()
        self._ledger.write()
        if self._convicts:
            convicts = tuple(self._convicts.values())
            what = exclusions(convicts, self._devices, self._steps, injected=self._injected)
            write_exclusions(self._folder / FILE, what)
