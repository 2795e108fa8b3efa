"""Ways in besides the flag, the way out, and what is refused: on every rank, with a text that says what to do."""

from __future__ import annotations

import json

import pytest

import deepspeed_sentinel
from integration_tests.harness import run_job
from integration_tests.scenario import Scenario

RANKS = range(4)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways_in")
    return run_job("integration_tests/jobs/ways_in.py", 2, 2, folder=folder, timeout=200).check().results


def test_disabled_means_absent(cases):
    for case in cases:
        assert case["disabled_returns"] == case["returns"] == 4
        assert case["disabled_attributes"] == [] and case["disabled_observed"] == 0
        assert case["disabled"] == case["plain"]


def test_a_detached_engine_is_as_it_was(cases):
    for case in cases:
        assert case["attached_is_handle"] and case["attached_once"]
        assert case["attached_observed"] == case["detached_observed"] == 2 * 2 * Scenario(name="").micro_batches
        assert case["detached_attributes"] == ["save_checkpoint"] and case["set_meanwhile"] == "set while attached"
        assert case["still_the_scripts"] and case["own_instruction_runs"]
        assert case["detached"] == case["plain"]


def test_the_flag_and_the_script_together_attach_once(cases):
    for case in cases:
        assert case["flag"]


REFUSED = {
    "twice": "already has a sentinel attached, with other settings; detach it first",
    "no_settings": 'put "sentinel": {"enabled": true} into the DeepSpeed config',
    "unknown_key": 'sentinel.warmup: unknown key (value 3); did you mean "warmup_steps"?',
    "outside_mesh": "stage 7, replica 0 is not in the mesh; allowed are stages 0 to 1 and replicas 0 to 1",
    "unwritable": "sentinel.output_dir: cannot write to",
    "one_stage": "sentinel needs at least 2 pipeline stages, got 1",
    "stages_do_not_divide": "num_stages (3) must divide distributed world size (4)",
    "no_pipeline": "sentinel watches DeepSpeed's PipelineEngine, got DeepSpeedEngine",
    "tensor_parallel": "further axes: 'model' of size 2. Allowed beside 'pipe' and 'data' are axes of size 1",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_on_every_rank(cases, name):
    for case in cases:
        assert REFUSED[name] in case[name]


def test_a_tool_that_takes_the_place_of_an_entry_is_noticed_in_the_same_step(cases):
    for case in cases:
        assert "another tool has put its own entry for OptimizerStep" in case["taken"]


def test_further_axes_of_size_one_change_nothing(cases):
    for case in cases:
        trained, judged, ranks = case["three_axes"]
        assert trained and judged == 0 and ranks == [[0, 1], [2, 3]]
        trained, judged, ranks = case["other_axes"]
        assert trained and judged == 0 and ranks == [[0, 2], [1, 3]]


def test_dualpipev_is_refused():
    dualpipev = pytest.importorskip("deepspeed.runtime.pipe.dualpipev")  # not in every version, 0.19.8 has it
    engine = dualpipev.DualPipeVEngine.__new__(dualpipev.DualPipeVEngine)
    with pytest.raises(ValueError, match="does not support DualPipeV yet"):
        deepspeed_sentinel.attach(engine, {"enabled": True})


def test_a_mistake_in_the_config_ends_every_rank_before_training(jobs, tmp_path):
    config = tmp_path / "ds_config.json"
    block = {"enabled": True, "action": "exlude"}
    config.write_text(json.dumps(Scenario(name="train", sentinel=block).deepspeed_config()), encoding="utf-8")
    arguments = ["run", "integration_tests/jobs/train.py", "--deepspeed_config", str(config)]
    with jobs("deepspeed_sentinel", 2, 2, args=arguments, module=True) as job:
        result = job.wait(timeout=100)
    assert not result.timed_out
    for rank in RANKS:
        assert result.returncodes[rank] != 0 and result.results[rank] is None
        assert 'sentinel.action: got "exlude"' in result.stderr[rank]
        assert "'observe', 'exclude', 'quarantine' or 'halt'" in result.stderr[rank]
