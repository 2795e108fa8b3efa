"""The demo's job for real, as small as it goes: all processes, all three runs, and what is left when one fails."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

from deepspeed_sentinel import corpus
from deepspeed_sentinel.demo.launch import error_tail, job
from deepspeed_sentinel.demo.options import DemoOptions
from deepspeed_sentinel.demo.progress import Reader, fold


@pytest.fixture
def options(tmp_path):
    small = {"layers": 2, "hidden": 16, "intermediate": 16, "heads": 2, "key_value_heads": 1, "sequence": 8}
    short = {"steps": 2, "start_step": 1, "eval_micro_batches": 1, "overhead_rounds": 1, "overhead_block": 1}
    options = DemoOptions(stages=2, replicas=2, attackers=((0, 1),), out=str(tmp_path), **small, **short)
    options.save(tmp_path / "options.json")
    return options


def status_of(options, tmp_path):
    with job(options, tmp_path / "options.json") as process:
        return process.wait(timeout=600)


def test_all_runs_are_done_and_start_from_the_same(options, tmp_path):
    corpus.prepare(options.corpus_folder, options.tokenizer, options.vocabulary)
    assert status_of(options, tmp_path) == 0, error_tail(options.job_log)
    state = fold(Reader(options.progress_file)())
    assert state.done
    assert len({run.losses[0] for run in state.runs.values()}) == 1
    assert [len(run.losses) for run in state.runs.values()] == [2, 2, 2]
    assert [guard["wiring"] for guard in state.runs["guarded"].step_guard] == [[[0, 1], [0, 1]]] * 2
    assert len(state.plain_seconds) == len(state.guarded_seconds) == 1


@pytest.mark.long
def test_what_fails_in_a_process_is_told(options, tmp_path):
    assert status_of(options, tmp_path) != 0
    told = error_tail(options.job_log)
    assert "FileNotFoundError" in told, "nobody has prepared the text"
    assert told.count("Traceback") == 1 and "start_processes" not in told
