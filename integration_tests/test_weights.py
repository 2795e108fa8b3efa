"""One bit changed in what one replica holds: found at the next comparison, healed from the majority, or all stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration_tests.flipping import AT, BETWEEN, EVERY, IN_STATE, IN_WEIGHTS, LAST, LATER
from integration_tests.harness import named
from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.variants import some

HOOKS = "integration_tests.flipping:"
BASE = Scenario(name="plain", steps=LATER + 2, micro_batches=1)
KINDS = ("fp32_zero1", "fp16", "fp16_zero1", "bf16", "bf16_zero1")
IN_EVERY_RUN = ("bf16_zero1",)


def events(folder: Path, name: str) -> list[dict[str, object]]:
    told = map(json.loads, (folder / name / "events.jsonl").read_text().splitlines())
    fields = ("step", "stage", "replica", "action", "groups")
    return [{key: one[key] for key in fields} for one in told if one["kind"] == "weights"]


def found(step: int, worker: object, action: str) -> dict[str, object]:
    return {"step": step, "stage": worker[0], "replica": worker[1], "action": action, "groups": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def runs(folder, selected):
    def watched(base, name, every, **changes):
        block = {"enabled": True, "output_dir": str(folder / name), "weights_every": every}
        return base.with_(name=name, sentinel=block, **changes)

    saved = {"directory": str(folder / "saved"), "after_step": LATER}
    scenarios = [
        BASE,
        watched(BASE, "untouched", EVERY, save=saved),
        watched(BASE, "flipped", EVERY, hook=f"{HOOKS}weights_then_state"),
        watched(BASE, "loaded", 50, hook=f"{HOOKS}after_load", load={"directory": saved["directory"]}),
        watched(BASE, "between", EVERY, hook=f"{HOOKS}between"),
    ]
    for kind in sorted(selected("kind")):
        plain = BASE.with_(name=kind, precision=kind, steps=4)
        scenarios += [plain, watched(plain, f"{kind} flipped", 1, hook=f"{HOOKS}each_kind")]
    return run_scenarios(scenarios, 2, 3, folder=folder / "three", timeout=300)


def equal_to_the_bit(runs, name, expected):
    for run, other in zip(runs[name], runs[expected], strict=True):
        for key in ("weights_sha256", "masters_sha256"):
            assert run.record[key] == other.record[key], key
        assert run.losses == other.losses[len(other.losses) - len(run.losses) :]


def test_without_a_difference_training_is_that_of_plain_deepspeed(runs, folder):
    equal_to_the_bit(runs, "untouched", "plain")
    assert events(folder, "untouched") == []


def test_a_flipped_bit_is_healed_and_the_run_ends_with_the_weights_of_an_untouched_one(runs, folder):
    assert events(folder, "flipped") == [
        *(found(AT, worker, "healed") for worker in IN_WEIGHTS),
        found(LATER, IN_STATE, "healed"),
    ]
    equal_to_the_bit(runs, "flipped", "untouched")
    said = runs.job.stderr[0] + runs.job.stdout[0]
    assert f"step {AT}: {named(5, replicas=3)} holds other weights" in said and "it was given theirs" in said


def test_at_the_first_step_after_a_load_too(runs, folder):
    assert runs["loaded"][0].record["first_step"] == LATER
    assert events(folder, "loaded") == [found(LATER, LAST, "healed")]
    equal_to_the_bit(runs, "loaded", "untouched")


def test_what_changes_between_is_found_at_the_next_one_and_replicas_are_alike_again(runs, folder):
    """What its gradients did to all replicas meanwhile stays; all of a stage hold the same in the end."""
    assert BETWEEN < LATER and events(folder, "between") == [found(LATER, LAST, "healed")]
    for stage in range(2):
        assert len({runs.at("between", stage, replica).record["weights_sha256"] for replica in range(3)}) == 1


@pytest.mark.parametrize("kind", some(KINDS, IN_EVERY_RUN))
def test_with_every_optimizer_it_compares_what_replicas_hold_alike_and_no_more(runs, folder, kind):
    assert events(folder, f"{kind} flipped") == [found(step, LAST, "healed") for step in (1, 2)]
    equal_to_the_bit(runs, f"{kind} flipped", kind)


@pytest.fixture(scope="module")
def of_two(folder):
    def block(name, **changes):
        return {"enabled": True, "output_dir": str(folder / name), "weights_every": EVERY, **changes}

    flipped = BASE.with_(steps=LATER + 1, hook=f"{HOOKS}between")
    scenarios = [
        flipped.with_(name="observed", sentinel=block("observed", action="observe")),
        flipped.with_(name="off", sentinel=block("off", weights_every=0)),
        flipped.with_(name="stopped", sentinel=block("stopped"), expect_error=True),
    ]
    return run_scenarios(scenarios, 2, 2, folder=folder / "two", timeout=200)


def undecided(action: str) -> list[dict[str, object]]:
    return [{"step": LATER, "stage": 1, "replica": None, "groups": [[0], [1]], "action": action}]


def test_of_two_unequal_replicas_all_ranks_stop_without_a_checkpoint(of_two, folder):
    for run in of_two["stopped"]:
        assert run.error is not None and run.error["type"] == "WeightsDiffer"
        who = [f"{named(rank, replicas=2)} holds" for rank in (2, 3)]
        for part in (f"at step {LATER}", f"stage 1: {who[0]}", who[1], "no checkpoint", "Resume from"):
            assert part in run.error["message"]
        assert len(run.losses) == LATER
    assert len({run.error["message"] for run in of_two["stopped"]}) == 1
    assert events(folder, "stopped") == undecided("stopped")
    left = sorted(path.name for path in (folder / "stopped").iterdir())
    assert left == ["events.jsonl", "ledger.json", "ledger.json.lock"], "no checkpoint; and what was counted is kept"


@pytest.mark.parametrize("name", ["observed", "off"])
def test_observed_it_is_told_and_switched_off_it_is_not_and_nothing_is_changed(of_two, folder, name):
    assert events(folder, name) == (undecided("reported") if name == "observed" else [])
    here, there = (of_two.at(name, 1, replica) for replica in range(2))
    assert len(here.losses) == LATER + 1
    assert here.record["weights_sha256"] != there.record["weights_sha256"]
    assert of_two.at(name, 0, 0).record["weights_sha256"] == of_two.at(name, 0, 1).record["weights_sha256"]
