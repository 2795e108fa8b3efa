"""Small gathers of all ranks over columns and stages: few sockets, and nobody alters what it hands on unseen."""

from __future__ import annotations

import pytest

from integration_tests.harness import run_job

SCRIPT = "integration_tests/jobs/control.py"
# As under NCCL, where the default group connects no rank with each other.
LAZY = {"TORCH_GLOO_LAZY_INIT": "1"}


def job(tmp_path, stages, replicas, *args, timeout=120):
    return run_job(SCRIPT, stages, replicas, folder=tmp_path, args=[stages, *args], env=LAZY, timeout=timeout)


@pytest.mark.parametrize(("stages", "replicas"), [(3, 2), (4, 1), pytest.param(25, 8, marks=pytest.mark.long)])
def test_all_ranks_hear_all_others_over_few_sockets(tmp_path, stages, replicas):
    done = job(tmp_path, stages, replicas, timeout=560).check()
    for result in done.results:
        assert result["right"] and result["error"] is None
        # A listener, and a connection with each other rank of the column and of the stage.
        assert result["sockets"] <= 2 * (stages + replicas)
    secrets = [result["of_stage"] for result in done.results]
    assert [len(set(secrets[stage * replicas :][:replicas])) for stage in range(stages)] == [1] * stages
    assert len(set(secrets)) == stages and None not in secrets
    print({key: max(result[key] for result in done.results) for key in done.results[0] if key.endswith(("s", "ds"))})


def test_who_alters_what_it_hands_on_is_among_those_named(tmp_path):
    done = job(tmp_path, 2, 2, "--liar")
    told = [result["error"] for result in done.results if result]
    assert any("two versions, handed on by" in text and "worker (stage 0, replica 1)" in text for text in told)


def test_who_alters_a_dealt_secret_ends_all_ranks_with_the_names_of_those_that_cannot_open_it(tmp_path):
    done = job(tmp_path, 2, 2, "--altering").check()
    for result in done.results:
        assert "the secret of its stage, dealt by worker (stage 0, replica 0), cannot be opened by" in result["refused"]
        assert "worker (stage 1, replica 1)" in result["refused"] and "(stage 1, replica 0)" not in result["refused"]
