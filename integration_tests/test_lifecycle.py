"""Restarts, and ranks that are gone, stuck or only slow while nothing raises."""

from __future__ import annotations

import signal
from pathlib import Path

from integration_tests.harness import JobHandle, named
from integration_tests.processes import ROOT, free_port

JOB = "integration_tests/jobs/lifecycle.py"
TORCHRUN = "integration_tests/jobs/torchrun.py"
EXIT = 70
GONE = f"lost {named(1, 1)}: no heartbeat for 5 s, and everybody waits"
STUCK = f"stuck: {named(1, 1)} in ForwardPass of step 3, for which the others wait"


def start(jobs, tmp_path: Path, mode: str, **options):
    return jobs(JOB, 2, 1, args=[mode, str(tmp_path / mode)], **options)


def test_a_job_that_torchrun_starts_anew_goes_on_from_its_checkpoint(jobs, tmp_path):
    logs = ["--redirects=3", f"--log-dir={tmp_path / 'torchrun'}"]
    torchrun = [
        "--nproc_per_node=2",
        "--max-restarts=2",
        "--monitor-interval=0.1",
        f"--master_port={free_port()}",
        *logs,
    ]
    agent = jobs(TORCHRUN, 1, 1, args=[*torchrun, ROOT / JOB, "restart", tmp_path / "restart"], folder=tmp_path)
    with JobHandle(2, 1, tmp_path, "torchrun", agent.processes) as job:
        result = job.wait(timeout=240).check()
    assert "ValueError: transient" in agent.log(0, "stderr")
    assert result.stdout[0].count("[sentinel] guarding 2 stages x 1 replica") == 2, "by the flag, in both attempts"
    for text in result.stdout:
        assert text.count("resumed at step 2") == text.count("finished") == 1, result.describe()


def test_a_rank_that_is_gone_or_stuck_is_named_though_nothing_raises_and_a_slow_one_is_waited_for(jobs, tmp_path):
    modes = ("stopped", "dead", "stuck", "slow", "observe")
    running = {mode: start(jobs, tmp_path, mode) for mode in modes}
    running["stopped"].wait_for(rank=1, text="ready", timeout=100)
    running["stopped"].kill(1, signal.SIGSTOP)

    slow = running["slow"].wait(timeout=150).check()
    assert all("finished" in text for text in slow.stdout)
    assert not any("[sentinel] rank" in text for text in slow.stderr)

    # Report only: what another mode ends for is said, and passes.
    observed = running["observe"].wait(timeout=60).check()
    assert STUCK in observed.stderr[0] and 'nothing is ended: "action" is "observe"' in observed.stderr[0]

    stuck = running["stuck"].wait(timeout=60)
    assert stuck.returncodes == (EXIT, EXIT), stuck.describe()
    for text in stuck.stderr:
        assert STUCK in text, stuck.describe()

    dead = running["dead"].wait(timeout=60)
    assert dead.returncodes == (EXIT, -signal.SIGKILL) and "hangs" in dead.stdout[0], dead.describe()
    assert GONE in dead.stderr[0], dead.describe()

    running["stopped"].processes[0].wait(60)
    stopped = running["stopped"].wait(timeout=1)
    assert stopped.returncodes[0] == EXIT and GONE in stopped.stderr[0], stopped.describe()
