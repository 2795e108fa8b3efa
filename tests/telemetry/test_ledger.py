import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import CULPRIT, World, blamed

from deepspeed_sentinel.judgement.verdict import Dispute
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.devices import NOBODY, Device
from deepspeed_sentinel.telemetry.ledger import Ledger, step_counts

DAY = 86400


class Clock:
    def __init__(self):
        self.now = 1_700_000_000

    def __call__(self):
        return self.now


def gpus(stages=2, replicas=4, host="node"):
    return [
        [
            Device(f"{host}{stage}", replica, f"uuid-{stage}{replica}", f"0000:0{replica}:00")
            for replica in range(replicas)
        ]
        for stage in range(stages)
    ]


def counts(shape=(2, 4), **cells):
    """Of a step: 8 messages judged of each worker, and ``name={(stage, replica): number}``."""
    step = {name: np.zeros(shape, np.int64) for name in ("alarms", "disputes", "proofs", "unequal_weights")}
    for name, some in cells.items():
        for place, number in some.items():
            step[name][place] = number
    return {"judged": np.full(shape, 8), **step}


def standing(ledger, key):
    (one,) = [one for one in ledger.standings() if one.key == key]
    return one


def test_what_is_counted_of_a_device(tmp_path):
    clock = Clock()
    ledger = Ledger(tmp_path / "ledger.json", gpus(), clock)
    ledger.record(**counts())
    clock.now += 60
    ledger.record(**counts(alarms={(1, 2): 3}, disputes={(1, 2): 1}))
    clock.now += 60
    ledger.record(**counts(proofs={(1, 2): 1}, unequal_weights={(0, 0): 1}))
    clock.now += 60
    ledger.record(**counts())
    one = standing(ledger, "gpu:uuid-12")
    assert (one.steps, one.judged, one.alarmed_steps, one.alarms) == (4, 32, 1, 3)
    assert (one.disputes, one.proofs, one.unequal_weights) == (1, 1, 0)
    assert [one.first - clock.now, one.last - clock.now, one.trouble - clock.now] == [-180, 0, -60]
    assert one.workers == (Worker(1, 2),) and one.place == "node1 slot 2, PCI 0000:02:00"
    assert standing(ledger, "gpu:uuid-00").unequal_weights == 1
    assert [named.key for named in ledger.named()] == ["gpu:uuid-12"]
    assert "proofs 1, " in str(ledger.named()[0]) and "now worker (stage 1, replica 2)" in str(ledger.named()[0])
    assert not ledger.report() and not ledger.told()


def test_a_device_is_known_again_after_a_restart_elsewhere(tmp_path):
    first = Ledger(tmp_path / "ledger.json", gpus())
    first.record(**counts(proofs={(1, 2): 1}, alarms={(1, 2): 2}))
    assert first.write()
    devices = gpus()
    # The card is in another host now and serves another stage.
    devices[0][1], devices[1][2] = Device("spare", 7, "uuid-12", "0000:81:00"), Device("node1", 2, "uuid-new")
    second = Ledger(tmp_path / "ledger.json", devices)
    (named,) = second.named()
    assert named.key == "gpu:uuid-12" and named.workers == (Worker(0, 1),) and named.proofs == 1
    second.record(**counts(alarms={(0, 1): 1}))
    assert standing(second, "gpu:uuid-12").alarms == 3
    assert standing(second, "gpu:uuid-12").place == "spare slot 7, PCI 0000:81:00 and 1 other places"
    assert standing(second, "gpu:uuid-01").workers == ()
    assert not Ledger(tmp_path / "ledger.json", gpus(host="other")[:1]).told()


def test_file_and_checkpoint_of_the_same_steps_count_once(tmp_path):
    first = Ledger(tmp_path / "ledger.json", gpus())
    for _ in range(5):
        first.record(**counts(alarms={(0, 0): 1}))
    checkpoint = first.state_dict()
    for _ in range(2):
        first.record(**counts(alarms={(0, 0): 1}))
    first.write()
    second = Ledger(tmp_path / "ledger.json", gpus())
    second.load_state_dict(checkpoint)
    assert standing(second, "gpu:uuid-00").alarms == 7
    second.record(**counts(alarms={(0, 0): 1}))
    second.load_state_dict(checkpoint)
    second.load_state_dict(second.state_dict())
    second.write()
    second.write()
    assert standing(second, "gpu:uuid-00").alarms == 8
    third = Ledger(tmp_path / "ledger.json", gpus())
    third.load_state_dict(checkpoint)
    assert standing(third, "gpu:uuid-00").alarms == 8 and standing(third, "gpu:uuid-00").steps == 8
    moved = Ledger(tmp_path / "elsewhere" / "ledger.json", gpus())
    moved.load_state_dict(checkpoint)
    assert standing(moved, "gpu:uuid-00").alarms == 5


def test_a_step_back_in_the_same_run_forgets_nothing():
    ledger = Ledger(None, gpus())
    ledger.record(**counts(alarms={(0, 0): 1}))
    checkpoint = ledger.state_dict()
    ledger.record(**counts(alarms={(0, 0): 1}))
    ledger.load_state_dict(checkpoint)
    assert standing(ledger, "gpu:uuid-00").alarms == 2 and not ledger.write()


def test_the_state_travels_as_a_plain_tensor(tmp_path):
    ledger = Ledger(None, gpus())
    ledger.record(**counts(proofs={(0, 3): 2}))
    state = {name: torch.from_numpy(array) for name, array in ledger.state_dict().items()}
    torch.save(state, tmp_path / "state.pt")
    other = Ledger(None, gpus())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [one.key for one in other.named()] == ["gpu:uuid-03"] and not other.told()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"json": np.zeros(3, np.float32)},
        {"json": np.frombuffer(b'{"schema": 1', np.uint8)},
        {"json": np.frombuffer(b'{"schema": 7}', np.uint8)},
    ],
    ids=["empty", "floats", "torn", "later"],
)
def test_a_checkpoint_that_cannot_be_used_is_told_and_ends_nothing(state):
    ledger = Ledger(None, gpus())
    ledger.record(**counts())
    ledger.load_state_dict(state)
    (told,) = ledger.told()
    assert "checkpoint's ledger of devices is left out" in told and not ledger.told()
    assert standing(ledger, "gpu:uuid-00").steps == 1


def test_a_device_above_its_peers_is_reported_once_there_is_enough():
    ledger = Ledger(None, gpus())
    for step in range(400):
        ledger.record(**counts(alarms={(0, 1): int(step % 20 == 0), (1, 1): 8 * int(step % 100 == 99)}))
        if step == 40:
            assert not ledger.report()
    (above,) = ledger.report()
    assert above.standing.key == "gpu:uuid-01" and above.standing.workers == (Worker(0, 1),)
    assert above.peers == pytest.approx(4 / 2800) and above.chance < 1e-4 / 8
    assert "its peers are in alarm in 0.00143 of their steps" in str(above)


def test_a_run_that_was_silent_until_others_folded_it_loses_nothing(tmp_path):
    clock = Clock()
    slow = Ledger(tmp_path / "ledger.json", gpus(), clock)
    slow.record(**counts(alarms={(0, 0): 4}))
    slow.write()
    slow.record(**counts(alarms={(0, 0): 1}))
    for _ in range(60):
        clock.now += DAY
        other = Ledger(tmp_path / "ledger.json", gpus(), clock)
        other.record(**counts(alarms={(0, 0): 1}))
        other.write()
    for _ in range(3):
        slow.record(**counts(alarms={(0, 0): 1}))
        assert slow.write()
    assert standing(slow, "gpu:uuid-00").alarms == 4 + 1 + 60 + 3
    assert standing(Ledger(tmp_path / "ledger.json", gpus(), clock), "gpu:uuid-00").alarms == 68


def test_two_workers_on_one_device_are_counted_together_and_told():
    devices = gpus()
    devices[0][1] = devices[0][0]
    ledger = Ledger(None, devices)
    (told,) = ledger.told()
    assert "gpu:uuid-00" in told and "replica 0" in told and "replica 1" in told
    ledger.record(**counts(alarms={(0, 0): 1, (0, 1): 2}))
    one = standing(ledger, "gpu:uuid-00")
    assert one.alarms == 3 and one.judged == 16 and one.workers == (Worker(0, 0), Worker(0, 1))


def test_a_worker_that_takes_another_ones_name_does_not_get_it_into_trouble():
    devices = gpus()
    devices[1][0] = Device("node1", 0, "uuid-00")
    ledger = Ledger(None, devices)
    assert "not all can be right" in ledger.told()[0]
    ledger.record(**counts(proofs={(1, 0): 1}))
    assert [one.key for one in ledger.named()] == ["gpu:uuid-00@node1"]
    assert standing(ledger, "gpu:uuid-00@node0").proofs == 0


def test_a_device_without_a_name_is_counted_but_not_accused():
    devices = gpus()
    devices[1][0] = devices[1][3] = NOBODY
    ledger = Ledger(None, devices)
    for _ in range(100):
        ledger.record(**counts(alarms={(1, 0): 1}, proofs={(1, 0): 1}))
    assert not ledger.named() and not ledger.report() and not ledger.told()
    assert standing(ledger, "unnamed").alarms == 100


@pytest.mark.parametrize(
    "array", [np.zeros((4, 2), np.int64), np.zeros((2, 4)), np.full((2, 4), -1), np.zeros((2, 4), bool)]
)
def test_counts_are_whole_numbers_of_each_worker(array):
    with pytest.raises(ValueError, match=r"disputes is .*allowed are whole numbers from 0, \[2, 4\]"):
        Ledger(None, gpus()).record(**{**counts(), "disputes": array})


@pytest.mark.parametrize("devices", [[], [[]], [[NOBODY], [NOBODY, NOBODY]]])
def test_devices_are_of_a_mesh(devices):
    with pytest.raises(ValueError, match=r"give \[S\]\[R\]"):
        Ledger(None, devices)


def test_what_a_verdict_says_of_each_worker():
    verdict = blamed()
    stages, replicas = verdict.convicted.shape
    served = np.tile(np.arange(replicas), (stages, 1))
    step = step_counts(verdict, served)
    messages = verdict.alarms.shape[3]
    middle = np.array([1, *[2] * (stages - 2), 1])[:, None] * messages
    np.testing.assert_array_equal(step["judged"], np.broadcast_to(middle, (stages, replicas)))
    assert step["judged"].sum() == verdict.judged
    assert step["alarms"][CULPRIT] == sum(len(one.striking) for one in verdict.findings) > 0
    assert np.count_nonzero(step["alarms"]) == 1 and not step["disputes"].any()


def test_a_dispute_counts_on_both_sides_or_on_the_one_at_fault():
    world = World()
    world.warm_up()
    verdict = world.step(lambda values: None)
    stages, replicas = verdict.convicted.shape
    sides = Worker(0, 1), Worker(1, 1)
    open_, settled = (
        Dispute(0, 0, 1, *sides, None, (0, 2)),
        Dispute(0, 0, 1, *sides, Worker(1, 0), (1,), audit="false", at_fault=sides[1]),
    )
    object.__setattr__(verdict, "disputed", (open_, settled))
    disputes = step_counts(verdict, np.tile(np.arange(replicas), (stages, 1)))["disputes"]
    assert disputes[0, 1] == 2 and disputes[1, 1] == 3 and disputes.sum() == 5
