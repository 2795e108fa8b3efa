"""``"action": "observe"`` ends no run that trains without Sentinel: what it cannot look at it says, and lets pass."""

from __future__ import annotations

from integration_tests.harness import named
from integration_tests.models_unseen import EMPTY_AT
from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario


def test_what_cannot_be_judged_is_said_once_and_passes(tmp_path):
    base = Scenario(
        name="", models="integration_tests.models_unseen", steps=4, micro_batches=2, dynamic_shape=True, hidden=16
    )
    logs = tmp_path / "full"
    logs.mkdir()
    (logs / "events.jsonl").symlink_to("/dev/full")
    observe = {"enabled": True, "action": "observe", "warmup_steps": 2, "output_dir": str(tmp_path / "logs")}
    split = base.with_(name="split", kind="empty", sentinel=observe, hook="integration_tests.models_unseen:disagree")
    scenarios = [split]
    for kind in ("empty", "ids"):
        scenarios.append(base.with_(name=kind, kind=kind))
        block = {**observe, "output_dir": str(logs if kind == "ids" else tmp_path / "logs"), "events": "steps"}
        scenarios.append(base.with_(name=f"{kind} observed", kind=kind, sentinel=block))
    runs = run_scenarios(scenarios, 3, 2, folder=tmp_path / "job")
    for kind in ("empty", "ids"):
        for plain, observed in zip(runs[kind], runs[f"{kind} observed"], strict=True):
            assert observed.losses == plain.losses and len(plain.losses) == base.steps
            assert observed.record["weights_sha256"] == plain.record["weights_sha256"]
    assert [run.losses for run in runs["split"]] == [run.losses for run in runs["empty"]]
    said = [err + out for err, out in zip(runs.job.stderr, runs.job.stdout, strict=True)]
    for rank, text in enumerate(said):
        # Once in each run: replica 1 has the empty message, and every rank the ids.
        assert text.count("not judged: the ") == (3 if rank % 2 else 1), text
        assert text.count("micro-batch 1, has zero tokens: its shape is (2, 0, 16)") == (2 if rank % 2 else 0)
    assert said[0].count("verdicts differ at step") == 1 and f"step {EMPTY_AT}: {named(2, replicas=2)}" in said[0]
    assert said[0].count(f"cannot write to '{logs}' any more") == 1
