"""State travels in DeepSpeed's checkpoints: resuming continues exactly."""

from __future__ import annotations

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario

FAULT = {"stage": 1, "replica": 2, "attack": "scaling", "factor": -1, "start_step": 25}
BASE = Scenario(name="whole", steps=32, hidden=64, lengths=(48,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    # Secrets that the operating system draws would make the two runs' scores differ in their last digits.
    block = {"enabled": True, "output_dir": str(folder / "logs"), "inject": [FAULT], "seed": 0}
    watched, plain = str(folder / "watched"), str(folder / "plain")
    whole = BASE.with_(sentinel=block, save={"directory": watched, "after_step": 26})
    scenarios = [
        whole,
        whole.with_(name="resumed", save=None, load={"directory": watched}),
        BASE.with_(name="plain", steps=3, save={"directory": plain, "after_step": 3}),
        BASE.with_(name="without_state", steps=5, sentinel=block, load={"directory": plain}),
        whole.with_(
            name="other_window",
            sentinel={**block, "fence_window": 32},
            steps=27,
            save=None,
            load={"directory": watched},
        ),
    ]
    return run_scenarios(scenarios, stages=3, replicas=3, folder=folder, timeout=300)


def test_a_resumed_run_gives_the_same_verdicts_losses_and_weights(runs):
    for whole, resumed in zip(runs["whole"], runs["resumed"], strict=True):
        assert resumed.record["first_step"] == 26
        assert [v["digest"] for v in resumed.verdicts] == [v["digest"] for v in whole.verdicts[26:]]
        assert resumed.losses == whole.losses[26:]
        assert resumed.record["weights_sha256"] == whole.record["weights_sha256"]


def test_strikes_from_before_the_checkpoint_count(runs):
    # The attack began at step 25: one strike is in the checkpoint, the third falls at step 27.
    assert runs["resumed"][0].verdicts[1]["newly_convicted"] == [[1, 2]]


@pytest.mark.parametrize(
    ("name", "said"),
    [("without_state", "has no Sentinel state"), ("other_window", "fence_window 64 (here 32)")],
)
def test_without_fitting_state_it_warns_and_warms_up_again(runs, name, said):
    assert runs[name][0].verdicts[0]["warming_up"]
    assert said in runs.job.stderr[0] + runs.job.stdout[0]
