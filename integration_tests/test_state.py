"""State travels in DeepSpeed's checkpoints: resuming goes on as before, and takes over nothing secret or spoilt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspeed_sentinel.evidence.keys import Keys, private_key
from deepspeed_sentinel.evidence.renewal import READY
from deepspeed_sentinel.evidence.stage_secret import digest_keys, seal, unseal
from integration_tests.harness import named
from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.spoiling import CONVICTED_AT, LIAR, LIES_AT, SPOILT_AT

FAULT_AT = SPOILT_AT + 1
WATCHED = FAULT_AT + 1
FAULT = {"stage": 1, "replica": 2, "attack": "scaling", "factor": -1, "start_step": FAULT_AT}
BASE = Scenario(name="whole", steps=13, seed=1, hidden=64, lengths=(48,))
# What a verdict decides: scores and digests differ, since what is learnt of pairs is learnt anew.
DECISIONS = ("step", "warming_up", "excluded", "convicted", "alarmed", "disputes", "newly_convicted", "skip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def runs(folder):
    # Secrets that the operating system draws would make the two runs' scores differ in their last digits.
    block = {
        "enabled": True,
        "output_dir": str(folder / "logs"),
        "inject": [FAULT],
        "seed": 0,
        "warmup_steps": 5,
        "conviction": "statistics",
    }
    honest = {"enabled": True, "output_dir": str(folder / "honest"), "seed": 0, "warmup_steps": 5}
    watched, plain, spoilt, convicted = (str(folder / name) for name in ("watched", "plain", "spoilt", "convicted"))
    # Until the attack begins the whole run is a clean one too.
    whole = BASE.with_(
        sentinel=block,
        hook="integration_tests.spoiling:spoil_checkpoint",
        save=({"directory": spoilt, "after_step": SPOILT_AT + 1}, {"directory": watched, "after_step": WATCHED}),
    )
    scenarios = [
        whole,
        whole.with_(
            name="resumed",
            load={"directory": watched},
            hook="integration_tests.spoiling:convict_elsewhere",
            save={"directory": convicted, "after_step": CONVICTED_AT + 1},
        ),
        BASE.with_(name="plain", steps=1, save={"directory": plain, "after_step": 1}),
        BASE.with_(name="without_state", steps=2, sentinel=block, load={"directory": plain}),
        whole.with_(
            name="other_window",
            sentinel={**block, "fence_window": 32},
            steps=WATCHED + 1,
            save=None,
            hook=None,
            load={"directory": watched},
        ),
        BASE.with_(name="elsewhere", steps=CONVICTED_AT + 3, sentinel=honest, load={"directory": convicted}),
        BASE.with_(
            name="healed",
            steps=LIES_AT + READY + 4,
            sentinel=honest,
            load={"directory": spoilt},
            hook="integration_tests.spoiling:lie_once",
        ),
    ]
    return run_scenarios(scenarios, stages=3, replicas=3, folder=folder, timeout=400)


def test_a_resumed_run_gives_the_same_decisions_losses_and_weights(runs):
    for whole, resumed in zip(runs["whole"], runs["resumed"], strict=True):
        assert resumed.record["first_step"] == WATCHED
        for before, after in zip(whole.verdicts[WATCHED:], resumed.verdicts, strict=True):
            assert {name: before[name] for name in DECISIONS} == {name: after[name] for name in DECISIONS}
        assert resumed.losses == whole.losses[WATCHED:]
        assert resumed.record["weights_sha256"] == whole.record["weights_sha256"]


def test_strikes_from_before_the_checkpoint_count(runs):
    # One strike is in the checkpoint, the third falls in the second step after it.
    assert runs["resumed"][0].verdicts[1]["newly_convicted"] == [[1, 2]]


def test_a_conviction_does_not_hold_for_another_machine_in_that_place_and_all_ranks_say_so(runs, folder):
    assert all(run.verdicts[-1]["convicted"][1] == [False, False, True] for run in runs["resumed"])
    for run in runs["elsewhere"]:
        assert run.verdicts and not any(map(any, run.verdicts[-1]["convicted"]))
        assert not any(verdict["newly_convicted"] or any(verdict["excluded"]) for verdict in run.verdicts)
    told = [json.loads(line) for line in (folder / "honest" / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in told if event["kind"] == "replaced"]
    assert (event["step"], event["stage"], event["replica"]) == (CONVICTED_AT + 1, 1, 2)
    assert "another-host" in event["before"] and event["who"][0]["host"] != "another-host"


def test_a_checkpoint_holds_no_secret_and_nothing_that_is_known_of_pairs(runs, folder):
    files = sorted(Path(folder / "watched").rglob("mp_rank_*model_states.pt"))
    assert len(files) == 3, "one a stage"
    states = [torch.load(file, map_location="cpu", weights_only=False)["deepspeed_sentinel"] for file in files]
    for name in ("judge", "placement"):
        assert [name in state for state in states] == [True, False, False], "it is the same for all"
    assert set(states[0]["judge"]) >= {"fences", "cusum", "record"}
    for state in states:
        assert set(state["evidence"]) == {"baselines"}
        for of_part in state["evidence"]["baselines"].values():
            assert all(name.startswith(("average_", "count_")) for name in of_part)
        assert not _seeds(state)
    # With a seed the secrets are known here: of the pairs, and of the stages, and the keys that follow from those.
    keys = Keys(0, private_key(0, 0), [private_key(0, rank).public_key().public_bytes_raw() for rank in range(9)])
    sealed = seal(np.arange(9).reshape(3, 3), keys, seed=0)
    secrets = [unseal(sealed, rank, keys.secret_with(rank)) for rank in range(0, 9, 3)]
    held = [secret._key for secret in (*secrets, *map(keys.secret_with, range(9)))]
    held += [digest_keys(secret, way, WATCHED, WATCHED).numpy().tobytes()[:16] for secret in secrets for way in (0, 1)]
    every = [path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()]
    assert len(every) > 9 and not any(key in content for key in held for content in every)


def _seeds(state):
    """Whole numbers that are too large to count anything."""
    if isinstance(state, dict):
        return [number for part in state.values() for number in _seeds(part)]
    if isinstance(state, torch.Tensor):
        if state.is_floating_point() or state.dtype == torch.bool:
            return []
        return [number for number in state.flatten().tolist() if abs(number) > 2**32]
    return [state] if isinstance(state, int) and abs(state) > 2**32 else []


def test_what_is_known_of_pairs_comes_back_after_a_few_clean_steps(runs):
    """In a clean run that goes on after a checkpoint nobody is accused while it is away, nor when it is back."""
    before_the_lies = runs["healed"][0].verdicts[: LIES_AT - SPOILT_AT]
    for verdict in (*before_the_lies, *runs["healed"][0].verdicts[READY + 2 :]):
        assert not verdict["warming_up"] and not verdict["findings"] and not verdict["disputed"], verdict["step"]


def test_a_spoilt_baseline_is_not_taken_over_at_either_end(runs):
    said = runs.job.stderr[0] + runs.job.stdout[0]
    assert "baseline of the forward messages on link 0 that is not finite: it starts anew, on both ends" in said
    assert not any(runs["healed"][0].verdicts[0]["excluded"])


def test_one_replicas_number_stops_nothing_and_names_it(runs, folder):
    """Without it the median of two replicas is another than that of three at the other end, so a column may be out."""
    for verdict in runs["healed"][0].verdicts:
        assert sum(verdict["excluded"]) <= 1 and not verdict["findings"] and not verdict["newly_convicted"]
    told = [json.loads(line) for line in (folder / "honest" / "events.jsonl").read_text().splitlines()]
    misfits = [(event["step"], event["stage"], event["replica"]) for event in told if event["kind"] == "misfit"]
    assert misfits == [(LIES_AT, *LIAR), (LIES_AT + 1, *LIAR)]
    assert f"{named(3, replicas=3)} told the other replicas" in runs.job.stderr[0] + runs.job.stdout[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [("without_state", "has no Sentinel state"), ("other_window", "fence_window 64 (here 32)")],
)
def test_without_fitting_state_it_warns_and_warms_up_again(runs, name, said):
    assert runs[name][0].verdicts[0]["warming_up"]
    assert said in runs.job.stderr[0] + runs.job.stdout[0]
