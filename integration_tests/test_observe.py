"""``"action": "observe"`` ends no run that trains without Sentinel: what it cannot look at it says, and lets pass."""

from __future__ import annotations

import csv
import json
import socket

from prometheus_client.parser import text_string_to_metric_families

from integration_tests.asking import ACTIONS, STEPS
from integration_tests.harness import named
from integration_tests.models_unseen import EMPTY_AT
from integration_tests.processes import free_port
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
    taken = socket.create_server(("127.0.0.1", free_port()))
    port = taken.getsockname()[1]
    block = {**observe, "prometheus": {"port": port}}
    scenarios += [asked(tmp_path), resumed(tmp_path), base.with_(name="taken", sentinel=block, expect_error=True)]
    with taken:
        runs = run_scenarios(scenarios, 3, 2, folder=tmp_path / "job", timeout=180)
    for run in runs["taken"]:
        assert run.error["type"] == "ValueError"
        assert f"sentinel.prometheus: cannot listen on 127.0.0.1, port {port}: " in run.error["message"]
    check_asked(runs, tmp_path)
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


def asked(folder):
    """A column that is disputed in every step, and a run that is told to let it pass, and then not to."""
    block = {
        "enabled": True,
        "action": "exclude",
        "output_dir": str(folder / "asked"),
        "prometheus": {"port": free_port(), "textfile": str(folder / "sentinel.prom")},
        "inject": [{"stage": 1, "replica": 1, "where": "transit", "attack": "scaling", "factor": 1.001}],
    }
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"}}
    hook = "integration_tests.asking:ask"
    save = {"directory": str(folder / "saved"), "after_step": 4}  # while it only observes
    return Scenario(name="asked", sentinel=block, steps=STEPS, micro_batches=2, hook=hook, config=monitor, save=save)


def resumed(folder):
    """A run that goes on from there, with the action of its config."""
    before = asked(folder)
    block = {name: value for name, value in before.sentinel.items() if name != "prometheus"}
    load = {"directory": str(folder / "saved")}
    return before.with_(name="resumed", sentinel=block, hook=None, config={}, save=None, load=load, steps=5)


def check_asked(runs, folder):
    said = runs.job.stderr[0] + runs.job.stdout[0]
    acts = [action != "observe" for action in ACTIONS]
    for run in runs["asked"]:
        assert [any(verdict["excluded"]) for verdict in run.verdicts] == acts
        digests = [verdict["digest"] for verdict in run.verdicts]
        assert digests == [verdict["digest"] for verdict in runs["asked"][0].verdicts]
    for run in runs["resumed"]:
        (verdict,) = run.verdicts
        assert verdict["step"] == 4 and any(verdict["excluded"])
    first, last, middle = (named(rank, replicas=2) for rank in (0, 5, 2))
    assert said.count("SETTINGS: ") == 2
    assert (
        f"step 2: SETTINGS: action 'observe' in place of 'exclude' from the next step on, as {first} asked; {last} "
        "asked for 'halt', and the lowest rank decides" in said
    )
    assert f"from the next step on, as {first} asked in control.json" in said
    assert f"step 2: {middle} asks for action 'halt', and that counts for nothing" in said
    events = map(json.loads, (folder / "asked" / "events.jsonl").read_text().splitlines())
    settings = [(one["step"], one["action"], one["source"]) for one in events if one["kind"] == "settings"]
    assert settings == [(2, "observe", "script"), (4, "exclude", "file")]

    curves = {path.stem: list(csv.reader(path.open()))[1:] for path in (folder / "csv" / "job").glob("*.csv")}
    assert [float(value) for _, value in curves["Sentinel_excluded_columns"]] == acts
    samples = [step for step, _ in curves["Train_Samples_train_loss"]]
    assert [step for step, _ in curves["Sentinel_score_stage_2"]] == samples and len(samples) == STEPS

    for path, steps in ((folder / "asked" / "metrics.txt", STEPS - 1), (folder / "sentinel.prom", STEPS)):
        families = {family.name: family.samples for family in text_string_to_metric_families(path.read_text())}
        assert families["deepspeed_sentinel_steps"][0].value == steps
        assert families["deepspeed_sentinel_excluded_column_steps"][0].value == sum(acts[:steps])
        assert families["deepspeed_sentinel_run_info"][0].labels["action"] == "exclude"
    spans = json.loads((folder / "asked" / "spans.json").read_text())
    # Of stage 0, two micro-batches: each is sent once and its gradient received once.
    assert spans == {"sentinel::observe": 4, "sentinel::gate": 1, "sentinel::collect": 1, "sentinel::judge": 1}
