"""A run's folder as rank 0 leaves it: made-up evidence through the real judge, event log, ledger and exclusions."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import CULPRIT, World, tamper

from deepspeed_sentinel.mesh import identity
from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.eventlog import EventLog
from deepspeed_sentinel.telemetry.events import End, Start
from deepspeed_sentinel.telemetry.exclusion import FILE, Convict, exclusions, proved, reason, write_exclusions
from deepspeed_sentinel.telemetry.findings import verdict_events, wiring_event
from deepspeed_sentinel.telemetry.ledger import Ledger, step_counts
from deepspeed_sentinel.telemetry.who import Who

WARM_UP, ATTACKED = 30, 4
UUID = "1a2b3c4d-64d7-4f0a-a1c9-b2570c9d8e44"


@pytest.fixture
def recorded(tmp_path):
    """Writes a run of 4 x 3 workers, of which (1, 2) tampers from step 30 on and is convicted in 32; its folder."""

    def write(name="logs", every_step=True, run_id="run-1", action="quarantine", injecting=False):
        folder, world = tmp_path / name, World()
        devices = [[Device(f"node-{stage}", replica, name="cpu") for replica in range(3)] for stage in range(4)]
        devices[1][2] = Device("node-03", 3, UUID, "00000000:1b:00", "cuda:3")
        who, seconds = Who(np.arange(12).reshape(4, 3), devices), iter(range(1_700_000_000, 1_800_000_000))
        log = EventLog(str(folder), run_id, who, clock=lambda: next(seconds))
        ledger = Ledger(folder / "ledger.json", devices)
        log.write(0, Start({"stages": 4, "replicas": 3}, {"enabled": True, "action": action}, injecting))
        suspects, lost = np.zeros((4, 3), bool), 0

        for step in range(WARM_UP + ATTACKED):
            verdict = world.step(tamper if step >= WARM_UP else None)
            for event in verdict_events(verdict, every_step, suspects, who):
                log.write(verdict.step, event)
            none = np.zeros((4, 3), np.int64)
            ledger.record(**step_counts(verdict, identity(world.mesh)), proofs=none, unequal_weights=none)
            suspects, lost = verdict.suspects.copy(), lost + int(verdict.excluded.sum())
            for worker in verdict.newly_convicted:
                why = who.fill(reason(verdict, worker))
                shown = proved(verdict, worker)
                convict = Convict(who(worker), who.device(worker), verdict.step, why, shown, action == "observe")
                write_exclusions(folder / FILE, exclusions([convict], devices, verdict.step, (), injecting))
        moved = identity(world.mesh).copy()
        moved[1] = [2, 1, 0]
        log.write(WARM_UP + ATTACKED - 1, wiring_event(identity(world.mesh), moved))
        counts = {"steps": 34, "judged_messages": 1200, "alarms": 4, "disputes": 0, "skipped_steps": 0}
        log.write(34, End({**counts, "excluded_column_steps": lost}, (CULPRIT,), []))
        log.close()
        ledger.write()
        return folder

    return write
