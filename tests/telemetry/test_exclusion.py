import json

import numpy as np
from deepspeed.launcher.runner import _parse_hostfile, parse_resource_filter

from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.devices import NOBODY, Device
from deepspeed_sentinel.telemetry.exclusion import FILE, Convict, exclusions, write_exclusions
from deepspeed_sentinel.telemetry.who import Who

# 3 stages x 4 replicas on three nodes of four slots; worker (stage, replica) = slot ``replica`` of node ``stage``.
DEVICES = tuple(tuple(Device(f"node-{stage}", slot, f"uuid-{stage}{slot}") for slot in range(4)) for stage in range(3))


def convict(stage, replica, device=None):
    where = DEVICES[stage][replica] if device is None else device
    who = Who(np.arange(12).reshape(3, 4), [[where] * 4] * 3)
    return Convict(who(Worker(stage, replica)), where, 31, "PROVED")


def test_every_convicted_worker_is_named_with_its_machine(tmp_path):
    what = exclusions([convict(1, 0), convict(1, 3)], DEVICES, step=60)
    write_exclusions(tmp_path / "new" / FILE, what)
    assert json.loads((tmp_path / "new" / FILE).read_text()) == what and what["step"] == 60
    assert what["workers"][1] == {
        "stage": 1,
        "replica": 3,
        "rank": 7,
        "host": "node-1",
        "slot": 3,
        "device": "gpu:uuid-13",
        "step": 31,
        "why": "PROVED",
    }
    assert what["replicas_left"] == 3, "ten processes of twelve"
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE]


def test_a_machine_that_several_claim_is_marked():
    """What a convicted worker says of itself may be its neighbour's name."""
    devices = [list(of_stage) for of_stage in DEVICES]
    devices[1][0] = Device("node-2", 1, "uuid-made-up")
    honest, liar = exclusions([convict(1, 3), convict(1, 0, devices[1][0])], devices, step=60)["workers"]
    assert "claimed_by_several" not in honest
    assert liar["claimed_by_several"] == [[1, 0], [2, 1]]


def test_deepspeeds_launcher_reads_the_lines_so():
    what = exclusions([convict(1, 0), convict(1, 3), convict(2, 1)], DEVICES, step=60)
    everything = {f"node-{stage}": [0, 1, 2, 3] for stage in range(3)}
    option, excluded = what["deepspeed"].split("=")
    assert option == "--exclude"
    left = parse_resource_filter(everything, exclude_str=excluded)
    assert left == {"node-0": [0, 1, 2, 3], "node-1": [1, 2], "node-2": [0, 2, 3]}
    assert _parse_hostfile(what["hostfile"]) == {"node-0": 4}
    assert what["hosts"] == ["node-1", "node-2"] and what["slurm"] == "--exclude=node-1,node-2"


def test_what_slurm_takes_out_beside_the_bad_is_told():
    note = exclusions([convict(1, 0), convict(1, 3), convict(2, 1)], DEVICES, step=60)["slurm_note"]
    assert "whole hosts" in note and note.endswith(
        "with node-1 also 2 slots that nothing is known against; with node-2 also 3 slots that nothing is known against"
    )
    all_of_one = exclusions([convict(1, slot) for slot in range(4)], DEVICES, step=60)
    assert all_of_one["slurm"] == "--exclude=node-1" and all_of_one["slurm_note"] == ""
    elsewhere = {"host": "node-9", "slot": 1, "device": "gpu:uuid-91"}
    assert exclusions([], DEVICES, step=60, earlier=[elsewhere])["slurm_note"].endswith("with node-9 all it has")


def test_who_names_no_host_is_told_of_and_excludes_none():
    what = exclusions([convict(1, 0, NOBODY)], DEVICES, step=60)
    assert what["workers"][0]["host"] == "" and what["workers"][0]["device"] == "unnamed"
    assert what["deepspeed"] == what["slurm"] == what["slurm_note"] == "" and what["hosts"] == []
