"""Every way in which data reach an engine, in twin steps; and what happens when a loader or a rank ends in one."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from integration_tests.harness import named, run_job, start_job
from integration_tests.jobs.twins_data import MICRO_BATCHES, STEPS, number
from integration_tests.test_failure import JOB, REPLICAS, STAGES

SCRIPT = "integration_tests/jobs/twins_data.py"
GIVEN, SOURCE = 2, 3
WAYS = (
    "training_data",
    "train_batch",
    "set_dataiterator",
    "set_batch_fn",
    "repeating",
    "one_stage",
    "several",
    "dict",
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    result = run_job(SCRIPT, 2, 2, folder=tmp_path_factory.mktemp("twins_data"), timeout=300)
    assert not result.timed_out and all(result.results), result.describe()
    return result


@pytest.fixture(scope="module")
def ranks(job):
    return job.results


@pytest.mark.parametrize("way", WAYS)
def test_all_columns_train_on_the_sources_micro_batches(ranks, way):
    assert all(set(rank) >= set(WAYS) for rank in ranks)
    for step in range(STEPS):
        words = [rank[way][step]["word"] for rank in ranks]
        assert sorted(words[:2]) == [GIVEN, SOURCE] and words[:2] == words[2:]
        source = words.index(SOURCE)
        expected = [number(source, step * MICRO_BATCHES + index) for index in range(MICRO_BATCHES)]
        assert [rank[way][step]["seen"] for rank in ranks] == [expected] * 4


def test_a_loader_that_ends_reaches_the_script_as_it_would_and_who_waits_for_it_is_told(job, ranks):
    for replica, rank in enumerate(ranks[:2]):
        trained, ended = rank["ended"]
        assert trained["word"] in (GIVEN, SOURCE) and len(trained["seen"]) == MICRO_BATCHES and not trained["end"]
        assert ended == {"word": 0, "seen": [number(replica, MICRO_BATCHES)], "end": "StopIteration"}
    for text in job.stderr[2:]:
        assert "failed: StopIteration" in text, job.describe()


VICTIMS = (1, 5)


@pytest.fixture(scope="module")
def dying(tmp_path_factory):
    """Both jobs at the same time, since they mostly wait."""
    with ExitStack() as opened:
        begun = {}
        for victim in VICTIMS:
            folder = tmp_path_factory.mktemp(f"twin{victim}")
            args = [f"twin{victim}", folder, 10]
            begun[victim] = opened.enter_context(start_job(JOB, STAGES, REPLICAS, folder=folder / "job", args=args))
        return {victim: job.wait(timeout=150) for victim, job in begun.items()}


@pytest.mark.parametrize("victim", VICTIMS)
def test_who_dies_as_micro_batches_are_handed_over_is_named_by_all_others(dying, victim):
    """In the first stage and in the last; the middle one takes no part in it."""
    result = dying[victim]
    assert not result.timed_out, result.describe()
    name = f"lost {named(victim, replicas=2)}. Resume"
    for rank in set(range(6)) - {victim}:
        assert result.returncodes[rank] != 0
        assert name in result.stderr[rank], result.describe()
