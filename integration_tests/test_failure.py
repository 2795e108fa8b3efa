"""What happens when a run breaks: every rank must end soon, with a text that says who and why."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from deepspeed_sentinel.ending import HALTED_EXIT_CODE
from integration_tests.harness import named, start_job

JOB = "integration_tests/jobs/failure.py"
STAGES, REPLICAS = 3, 2
SIZE = STAGES * REPLICAS
VICTIM = 3  # stage 1, replica 1
STORY = ((3, "ALARM"), (3, "LEFT OUT"), (3, "SUSPECT"), (5, "CONVICTED"))
# Raised where a call of the rank's own failed, else told by its heart, which then ends it.
LOST = f"lost {named(3, REPLICAS)}. Resume"


def start(jobs, tmp_path: Path, mode: str, steps: int, **options):
    return jobs(JOB, STAGES, REPLICAS, args=[mode, str(tmp_path), str(steps)], **options)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Jobs that break, by mode, at the same time, since they mostly wait; of two stages where these do."""
    folders: dict[str, Path] = {}
    with ExitStack() as opened:

        def begin(mode, stages, steps):
            folder = folders[mode] = tmp_path_factory.mktemp(mode)
            return opened.enter_context(
                start_job(JOB, stages, REPLICAS, folder=folder / "job", args=[mode, folder, steps])
            )

        plain = begin("plain", STAGES, 10_000)
        others = {"empty": begin("empty", 2, 10)}
        plain.wait_for(rank=0, text="step 3 ", timeout=150)
        plain.kill(VICTIM)
        others |= {"mismatch": begin("mismatch", 2, 10), "dealt": begin("dealt", 2, 10)}
        others |= {mode: begin(mode, STAGES, 20) for mode in ("full", "halt")}
        results = {"plain": plain.wait(timeout=45)}
        return results | {mode: job.wait(timeout=150) for mode, job in others.items()}, folders


def test_a_killed_worker_is_named_by_all_others_and_the_last_checkpoint_resumes(jobs, broken):
    result, tmp_path = (by_mode["plain"] for by_mode in broken)
    assert not result.timed_out
    for rank in set(range(SIZE)) - {VICTIM}:
        assert result.returncodes[rank] != 0
        told = [line for line in result.stderr[rank].splitlines() if LOST in line]
        assert told, result.describe()
        for line in told:
            assert "saw: " in line and "third_party" not in line and "GLHF" not in line, line
    last = int((tmp_path / "checkpoints" / "latest").read_text().removeprefix("global_step"))
    with start(jobs, tmp_path, "resume", last + 1) as job:
        resumed = job.wait(timeout=150).check()
    for text in resumed.stdout:
        assert f"at step {last}" in text and f"step {last + 1} " in text and "finished" in text
    assert "start anew" not in resumed.stderr[0] + resumed.stdout[0]


@pytest.mark.long
def test_a_worker_that_dies_as_losses_are_averaged_is_named(jobs, tmp_path):
    with start(jobs, tmp_path, "loss", 10) as job:
        result = job.wait(timeout=150)
    assert not result.timed_out and result.returncodes[3] == -signal.SIGKILL, result.describe()
    for rank in (0, 1, 2, 4, 5):
        assert LOST in result.stderr[rank], result.describe()


@pytest.mark.long
def test_who_ends_by_an_error_of_its_own_is_not_taken_for_lost(jobs, tmp_path):
    with start(jobs, tmp_path, "leave", 10) as job:
        result = job.wait(timeout=150)
    assert not result.timed_out and result.returncodes[3] == -signal.SIGKILL, result.describe()
    assert "my own collective broke" in result.stderr[5]
    for rank in (0, 1, 2, 4):
        assert LOST in result.stderr[rank], result.describe()


def ended_by_a_mismatch(broken, how):
    result = broken[0][how]
    assert not result.timed_out, result.describe()
    for rank in range(len(result.returncodes)):
        assert result.returncodes[rank] != 0
        assert f"VerdictMismatch: verdicts differ at step 3: {named(2, REPLICAS)}" in result.stderr[rank]
    return result


def test_different_verdicts_stop_all_ranks_before_the_step(broken):
    result = ended_by_a_mismatch(broken, "mismatch")
    for rank in range(4):
        assert "step 3 " in result.stdout[rank] and "step 4 " not in result.stdout[rank]


def test_different_wirings_stop_all_ranks_before_anybody_moves(broken):
    ended_by_a_mismatch(broken, "dealt")


@pytest.mark.long
def test_a_worker_that_dies_as_columns_are_dealt_anew_is_named(jobs, tmp_path):
    with start(jobs, tmp_path, "deal", 100) as job:
        result = job.wait(timeout=150)
    assert not result.timed_out and result.returncodes[3] == -signal.SIGKILL, result.describe()
    for rank in (0, 1, 2, 4, 5):
        assert result.returncodes[rank] != 0 and LOST in result.stderr[rank], result.describe()


def test_an_error_on_one_rank_reaches_all_with_its_text(broken):
    result = broken[0]["empty"]
    assert not result.timed_out, result.describe()
    for rank in range(4):
        assert result.returncodes[rank] != 0
        said = "cannot reshape tensor of 0 elements" if rank == 1 else f"{named(1, REPLICAS)} failed"
        assert said in result.stderr[rank], result.describe()


def test_a_halt_whose_checkpoint_one_rank_cannot_write_ends_all_with_the_reason_first(broken):
    result = broken[0]["full"]
    assert not result.timed_out and result.returncodes == (HALTED_EXIT_CODE,) * SIZE, result.describe()
    for rank, text in enumerate(result.stderr):
        (line,) = [line for line in text.splitlines() if "SentinelHalt: training stopped in step 5" in line]
        reason, _, problem = line.partition(". No checkpoint, or a part of one: ")
        assert f"{named(3, REPLICAS)} convicted" in reason and "could not be written" in problem, line
        assert ("No space left on device" in problem) == (rank == 2)


@pytest.mark.parametrize("launcher", ["bare", pytest.param("torchrun", marks=pytest.mark.long)])
def test_halt_stops_all_ranks_with_a_checkpoint(jobs, broken, tmp_path, launcher):
    if launcher == "bare":
        result, tmp_path = (by_mode["halt"] for by_mode in broken)
    else:
        result = start(jobs, tmp_path, "halt", 20, launcher=launcher).wait(timeout=150)
    assert not result.timed_out
    # A launcher has an exit code of its own.
    assert result.returncodes == ((HALTED_EXIT_CODE,) * SIZE if launcher == "bare" else (1,)), result.describe()
    texts = [text for text in result.stderr if "SentinelHalt: training stopped in step 5" in text]
    assert texts and f"{named(3, REPLICAS)} convicted" in texts[0], result.describe()
    said = result.stdout[0] + result.stderr[0]
    assert "[sentinel] step 5: HALT: " in said
    story = [said.index(f"[sentinel] step {step}: {word}") for step, word in STORY] + [said.index("[sentinel] END")]
    assert story == sorted(story), said
    folder = tmp_path / "sentinel" / "halt_checkpoint"
    assert (folder / "latest").read_text() == "global_step6"
