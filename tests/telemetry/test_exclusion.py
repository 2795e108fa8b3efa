import json
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from deepspeed.launcher.runner import _parse_hostfile, apply_num_nodes_and_gpus, parse_args, parse_inclusion_exclusion

from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.devices import NOBODY, Device
from deepspeed_sentinel.telemetry.exclusion import FILE, Convict, exclusions, read_earlier, write_exclusions
from deepspeed_sentinel.telemetry.who import Who

# 3 stages x 4 replicas on three nodes of four slots; worker (stage, replica) = slot ``replica`` of node ``stage``.
DEVICES = tuple(tuple(Device(f"node-{stage}", slot, f"uuid-{stage}{slot}") for slot in range(4)) for stage in range(3))


def convict(stage, replica, device=None, devices=DEVICES, **more):
    where = devices[stage][replica] if device is None else device
    replicas = len(devices[0])
    who = Who(np.arange(len(devices) * replicas).reshape(-1, replicas), [[where] * replicas] * len(devices))
    return Convict(who(Worker(stage, replica)), where, 31, "PROVED", **{"proved": True, **more})


def on_one_host(stages, replicas, **more):
    slots = np.arange(stages * replicas).reshape(stages, replicas).tolist()
    return [[Device("vm", slot, **more) for slot in row] for row in slots]


def launched(what, pool=None):
    """{host: slots} that DeepSpeed's launcher starts a process on; ``pool``: its hostfile's, or its own without one."""
    args = parse_args([what["deepspeed"], "train.py"])
    assert args.num_gpus < 0 or not (args.include or args.exclude), "the launcher refuses both"
    active = parse_inclusion_exclusion(OrderedDict(pool), args.include, args.exclude)
    return dict(apply_num_nodes_and_gpus(active, args.num_nodes, args.num_gpus))


def processes_of(left):
    return sum(map(len, left.values()))


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
        "proved": True,
        "injected": False,
        "in_lines": True,
    }
    assert what["replicas_left"] == 3 and what["processes"] == 9, "of ten that are left"
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE]


def test_a_machine_that_several_claim_is_marked():
    """What a convicted worker says of itself may be its neighbour's name."""
    devices = [list(of_stage) for of_stage in DEVICES]
    devices[1][0] = Device("node-2", 1, "uuid-made-up")
    honest, liar = exclusions([convict(1, 3), convict(1, 0, devices[1][0])], devices, step=60)["workers"]
    assert "claimed_by_several" not in honest
    assert liar["claimed_by_several"] == [[1, 0], [2, 1]]


def test_deepspeeds_launcher_starts_whole_replicas_without_the_bad():
    what = exclusions([convict(1, 0), convict(1, 3), convict(2, 1)], DEVICES, step=60)
    assert what["hosts"] == ["node-1", "node-2"] and what["slurm"] == "--exclude=node-1,node-2"
    everything = {f"node-{stage}": 4 for stage in range(3)}
    left = launched(what, everything)
    assert left == {"node-0": [0, 1, 2, 3], "node-1": [1, 2], "node-2": [0, 2, 3]}
    assert what["processes"] == processes_of(left) == 9 and what["idle"] == []
    assert left == launched(what, _parse_hostfile(what["hostfile"])), "its own hostfile does as well"
    assert left == launched(what, {**everything, "node-1": 8, "spare": 8}), "more than the run has used stays unused"


@pytest.mark.parametrize(
    ("stages", "replicas", "bad"),
    [(3, 3, [(1, 2)]), (4, 3, [(1, 2), (2, 0)]), (4, 4, [(1, 1), (1, 2), (2, 1), (3, 0), (3, 3)]), (2, 2, [(0, 1)])],
)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_number_of_processes_is_one_that_the_stages_divide(stages, replicas, bad, hosts):
    slots = iter(range(stages * replicas))
    devices = [[Device(f"n-{slot % hosts}", slot // hosts, f"u{slot}") for slot in _some(slots, replicas)]
               for _ in range(stages)]  # fmt: skip
    what = exclusions([convict(*one, devices=devices) for one in bad], devices, step=60)
    pool = {f"n-{host}": len(range(host, stages * replicas, hosts)) for host in range(hosts)}
    alone = "localhost" in what["deepspeed"]
    left = launched(what, {"localhost": pool["n-0"]} if alone else pool)
    assert processes_of(left) == what["processes"] == stages * what["replicas_left"]
    assert what["replicas_left"] == (stages * replicas - len(bad)) // stages
    used = {("n-0" if alone else host, slot) for host, of_host in left.items() for slot in of_host}
    taken = {(devices[stage][replica].host, devices[stage][replica].slot) for stage, replica in bad}
    idle = {(one["host"], one["slot"]) for one in what["idle"]}
    assert not used & taken and not idle & (used | taken), "nothing is known against who stays idle"
    assert len(used | taken | idle) == stages * replicas
    start = f"Start {what['processes']} processes ({stages} stages x {what['replicas_left']} replica"
    assert what["note"].startswith(start)
    assert ("stay idle" in what["note"] or "stays idle" in what["note"]) == bool(idle)
    assert exclusions([convict(*one, devices=devices) for one in bad], devices, step=60) == what


def _some(slots, count):
    return [next(slots) for _ in range(count)]


def test_who_stays_idle_shares_a_host_with_the_bad_where_that_can_be():
    """So that a whole host is free to be tested."""
    what = exclusions([convict(1, 0), convict(1, 3)], DEVICES, step=60)
    assert [(one["host"], one["slot"], one["device"]) for one in what["idle"]] == [("node-1", 2, "gpu:uuid-12")]
    assert "node-1 slot 2 stays idle" in what["note"]


def test_on_one_host_deepspeed_has_no_hostfile_and_calls_it_localhost():
    devices = on_one_host(3, 3, name="cuda:0")
    what = exclusions([convict(1, 2, devices=devices)], devices, step=60)
    assert what["workers"][0]["host"] == "vm" and what["hosts"] == ["vm"]
    left = launched(what, {"localhost": 9})
    assert left == {"localhost": [0, 1, 2, 3, 4, 6]} == launched(what, _parse_hostfile(what["hostfile"]))
    assert what["torchrun"] == {"vm": "CUDA_VISIBLE_DEVICES=0,1,2,3,4,6 torchrun --nproc_per_node=6"}


def test_where_one_host_alone_is_left_it_is_localhost_too():
    """Of one host DeepSpeed starts the processes where it is called itself."""
    devices = [[Device(f"node-{replica}", stage, f"u{stage}{replica}") for replica in range(2)] for stage in range(2)]
    what = exclusions([convict(0, 1, devices=devices)], devices, step=60)
    assert launched(what, {"localhost": 2}) == {"localhost": [0, 1]} and list(what["torchrun"]) == ["node-0"]
    assert "on node-0" in what["note"]


@pytest.mark.parametrize("found", [1, 9])
def test_processes_of_one_host_without_gpus_are_counted(found):
    """There the launcher finds as many slots as the host has memory nodes, and a process is bound to none."""
    devices = on_one_host(3, 3, name="cpu")
    what = exclusions([convict(1, 2, devices=devices)], devices, step=60)
    assert processes_of(launched(what, {"localhost": found})) == 6 == what["processes"]
    assert processes_of(launched(what, _parse_hostfile(what["hostfile"]))) == 6
    assert what["torchrun"] == {"vm": "torchrun --nproc_per_node=6"} and what["idle"] == []
    assert "the same processor and memory" in what["note"]


def test_torchrun_is_told_by_host():
    what = exclusions([convict(1, 0), convict(1, 3), convict(2, 1)], DEVICES, step=60)
    assert what["torchrun"] == {
        "node-0": "CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --nnodes=3 --nproc_per_node=4",
        "node-1": "CUDA_VISIBLE_DEVICES=1,2 torchrun --nnodes=3 --nproc_per_node=2",
        "node-2": "CUDA_VISIBLE_DEVICES=0,2,3 torchrun --nnodes=3 --nproc_per_node=3",
    }


def test_what_slurm_takes_out_beside_the_bad_is_told():
    note = exclusions([convict(1, 0), convict(1, 3), convict(2, 1)], DEVICES, step=60)["slurm_note"]
    assert "whole hosts" in note and note.endswith(
        "with node-1 also 2 slots that nothing is known against; with node-2 also 3 slots that nothing is known against"
    )
    all_of_one = exclusions([convict(1, slot) for slot in range(4)], DEVICES, step=60)
    assert all_of_one["slurm"] == "--exclude=node-1" and all_of_one["slurm_note"] == ""
    assert _parse_hostfile(all_of_one["hostfile"]) == {"node-0": 4, "node-2": 2}
    elsewhere = {"host": "node-9", "slot": 1, "device": "gpu:uuid-91"}
    assert exclusions([], DEVICES, step=60, earlier=[elsewhere])["slurm_note"].endswith("with node-9 all it has")


def test_who_names_no_host_is_told_of_and_excludes_none():
    what = exclusions([convict(1, 0, NOBODY)], DEVICES, step=60)
    assert what["workers"][0]["host"] == "" and what["workers"][0]["device"] == "unnamed"
    assert what["deepspeed"] == what["slurm"] == what["slurm_note"] == "" and what["hosts"] == []
    assert what["torchrun"] == {} and not what["workers"][0]["in_lines"] and "runs on is not known" in what["note"]


def test_where_no_replica_is_left_nothing_is_started():
    what = exclusions([convict(stage, replica) for stage in range(3) for replica in range(4)][:10], DEVICES, step=60)
    assert what["processes"] == what["replicas_left"] == 0 and what["deepspeed"] == "" and what["torchrun"] == {}
    assert what["hosts"] == ["node-0", "node-1", "node-2"] and "no whole replica" in what["note"]


@pytest.mark.parametrize("proved", [False, True])
def test_who_is_convicted_by_statistics_while_nothing_is_kept_out_is_no_reason_to_drain_a_machine(proved):
    """Poisoned weights bring honest workers outside of the fences too."""
    suspicion = convict(2, 1, proved=proved, observed=True)
    what = exclusions([suspicion], DEVICES, step=60)
    (worker,) = what["workers"]
    assert (worker["proved"], worker["in_lines"]) == (proved, proved)
    assert bool(what["hosts"]) == bool(what["deepspeed"]) == bool(what["slurm"]) == bool(what["torchrun"]) == proved
    assert ("by statistics alone" in what["note"]) == (not proved)
    both = exclusions([suspicion, convict(1, 0)], DEVICES, step=60)
    assert both["hosts"] == ["node-1", "node-2"][: 1 + proved]
    assert exclusions([replace(suspicion, observed=False)], DEVICES, step=60)["hosts"] == ["node-2"], "it was acted on"
    drill = exclusions([replace(suspicion, injected=True)], DEVICES, step=60, injected=True)
    assert ("by statistics alone" in drill["note"]) == (not proved) and "checkpoint" not in drill["note"]


def test_a_drill_speaks_against_no_machine(tmp_path):
    """Its lines are there to be tried; the next run in its folder forgets them, and not what was found before it."""
    real = exclusions([convict(0, 0)], DEVICES, step=60)
    write_exclusions(tmp_path / FILE, real)
    earlier = read_earlier(tmp_path / FILE)
    drill = exclusions([convict(0, 0), convict(1, 3)], DEVICES, step=9, earlier=earlier, injected=True)
    assert drill["injected"] and [one["injected"] for one in drill["workers"]] == [True, True, False]
    assert drill["hosts"] == ["node-0", "node-1"] and "injected on purpose" in drill["note"]
    write_exclusions(tmp_path / FILE, drill)
    later = exclusions([], DEVICES, step=60, earlier=read_earlier(tmp_path / FILE))
    assert [(one["device"], one["earlier"]) for one in later["workers"]] == [("gpu:uuid-00", True)]
    assert later["hosts"] == ["node-0"] and not later["injected"] and "purpose" not in later["note"]


def test_a_suspicion_takes_no_proof_of_an_earlier_run_away():
    proof = exclusions([convict(2, 1)], DEVICES, step=60)["workers"]
    what = exclusions([convict(2, 1, proved=False, observed=True)], DEVICES, step=60, earlier=proof)
    assert [(one["in_lines"], one.get("earlier", False)) for one in what["workers"]] == [(False, False), (True, True)]
    assert what["hosts"] == ["node-2"]
    again = exclusions([convict(2, 1)], DEVICES, step=60, earlier=what["workers"])
    assert [one["in_lines"] for one in again["workers"]] == [True], "what says no more than that goes"
