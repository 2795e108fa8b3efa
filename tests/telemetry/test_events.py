import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import World

from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.evidence.weights import Comparison, divisions
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.events import EventLog, device_event, verdict_events, weights_events, wiring_event
from deepspeed_sentinel.telemetry.standing import Above, Standing


def attacked():
    world = World()
    world.warm_up()

    def change(values):
        values[:, 0, 1, 2, :, NAMES.index("energy")] *= 50

    return [world.step(change) for _ in range(3)]


def test_events_tell_the_story_and_are_json(tmp_path):
    log = EventLog(str(tmp_path / "new" / "folder"))
    for verdict in attacked():
        for event in verdict_events(verdict, every_step=True):
            log.write(verdict.step, event)
    log.close()
    events = [json.loads(line) for line in (tmp_path / "new" / "folder" / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["step", "alarm", "excluded"] * 3 + ["conviction"]
    assert events[1]["stage"] == 1 and events[1]["replica"] == 2 and events[1]["statistic"] == "energy"
    assert np.argmax(np.max(events[0]["scores"], axis=0)) == 2
    assert events[-1] == {**events[-1], "stage": 1, "replica": 2, "step": 32}


def test_alarms_only():
    kinds = [event["kind"] for event in verdict_events(attacked()[0], every_step=False)]
    assert kinds == ["alarm", "excluded"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        EventLog(str(tmp_path / "file" / "below"))


def test_replicas_that_differ_are_told_one_by_one():
    found = divisions(np.array([[1, 1, 2], [3, 4, 5]]))
    unequal = Comparison(9, (Worker(0, 2),), healed=True)
    assert list(weights_events(unequal, found[:1], "healed")) == [
        {"kind": "weights", "stage": 0, "replica": 2, "action": "healed"}
    ]
    undecided = Comparison(9, (), healed=False, undecided=(1,))
    assert list(weights_events(undecided, found[1:], "stopped")) == [
        {"kind": "weights", "stage": 1, "replica": None, "groups": [[0], [1], [2]], "action": "stopped"}
    ]


@pytest.mark.parametrize("why", ["proof", "rate"])
def test_a_device_is_told_with_its_counts(why):
    one = Standing("gpu:a", "node slot 0", (Worker(1, 2),), 9, 72, 4, 8, 0, 1, 0, 10, 20, 20)
    event = device_event(one if why == "proof" else Above(one, 0.1, 1e-9))
    rate = {"peers": 0.1, "chance": 1e-9} if why == "rate" else {}
    assert event == {**event, "kind": "device", "why": why, "device": "gpu:a", "workers": [[1, 2]], "proofs": 1, **rate}
    assert "chance" in event or why == "proof"
    json.dumps(event, allow_nan=False)


def test_who_moves_is_told_with_the_column_before_and_the_one_now():
    before, wiring = np.tile(np.arange(3), (4, 1)), np.tile(np.arange(3), (4, 1))
    wiring[1] = [2, 1, 0]
    wiring[2] = [1, 2, 0]
    event = wiring_event(before, wiring)
    assert event == {"kind": "wiring", "moved": [[1, 0, 0, 2], [1, 2, 2, 0], [2, 0, 0, 2], [2, 1, 1, 0], [2, 2, 2, 1]]}
    assert json.loads(json.dumps(event)) == event
