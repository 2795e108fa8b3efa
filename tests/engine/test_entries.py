import pytest
from deepspeed.runtime.pipe import schedule

from deepspeed_sentinel.engine.entries import Entries
from deepspeed_sentinel.errors import SentinelError

SCHEDULE = schedule.TrainSchedule(micro_batches=3, stages=3, stage_id=1)
OURS = (schedule.SendGrad, schedule.OptimizerStep)


def run(entries, other=()):
    entries.begin()
    for instructions in SCHEDULE.steps():
        for instruction in instructions:
            if type(instruction) in OURS and type(instruction) not in other:
                entries.instructions[type(instruction)]()


def test_entries_that_are_called_are_in_place():
    entries, called = Entries({kind: lambda kind=kind: called.append(kind) for kind in OURS}), []
    for _ in range(2):
        run(entries)
        entries.check(SCHEDULE, lenient=False)
    assert called.count(schedule.SendGrad) == 6 and called.count(schedule.OptimizerStep) == 2


@pytest.mark.parametrize("taken", OURS)
def test_an_entry_that_is_passed_by_ends_a_guarded_run_and_is_told_once_of_an_observed_one(taken, monkeypatch):
    said = []
    monkeypatch.setattr("deepspeed_sentinel.telemetry.console.say", said.append)
    entries = Entries(dict.fromkeys(OURS, lambda: None))
    run(entries)
    run(entries, other=(taken,))
    with pytest.raises(SentinelError, match=f"its own entry for {taken.__name__} into"):
        entries.check(SCHEDULE, lenient=False)
    for _ in range(3):
        entries.check(SCHEDULE, lenient=True)
    assert len(said) == 1 and "deepspeed_sentinel.attach(engine, {...}) last" in said[0]
