"""Runs that share their honest steps end as they would alone, to the last bit."""

import json

import numpy as np
import pytest
import torch

from deepspeed_sentinel.simulation.branching import Trunk
from deepspeed_sentinel.simulation.model import build_stages
from deepspeed_sentinel.simulation.options import trunk_of
from deepspeed_sentinel.simulation.pipeline import Wire, train_pass
from deepspeed_sentinel.simulation.run import Simulation

EARLY = {"warmup_steps": 2, "fence_window": 8}


def told(simulation):
    result = simulation.run()
    result.pop("seconds")
    for name in ("seconds_a_step", "judge_seconds_a_step"):
        result["details"].pop(name)
    return json.dumps([result, simulation.losses], allow_nan=False)


WITH_MEMORY = [("stale_weights", {"steps": 3}), ("surrogate", {})]
OTHERS = [("scaling", {}), ("delay", {"steps": 3}), ("replay", {}), ("stored_bit_flip", {})]


def test_branches_end_as_runs_alone(options, tmp_path):
    """Attacks with messages, weights or a pupil kept from before, and of a user's own file."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "class Sum:\n    total = 0.0\n    def observe(self, message, context):\n        self.total += message.mean()\n"
        "    def __call__(self, message, context):\n        return message + self.total\n"
        "class Holds:\n    uses_previous = True\n    def __init__(self):\n        self.scale = lambda x: 3 * x\n"
        "    def __call__(self, message, context):\n        return self.scale(message)\n"
    )
    attacks = [*WITH_MEMORY, (f"{mine}:Sum", {}), (f"{mine}:Holds", {})]
    common = {"sentinel": EARLY, "start": 4, "steps": 6}
    runs = [options(attack=name, attack_arguments=arguments, **common) for name, arguments in attacks]
    runs.append(options(attack="scaling", direction="backward", malicious=0.5, majority=True, **common))
    Trunk.grow(runs).write(tmp_path / "trunk")
    trunk = Trunk.read(tmp_path / "trunk")
    copied = {run.attack: trunk.watchers.get(run.key(), b"") for run in runs}
    assert [name for name, seen in copied.items() if seen is None] == [f"{mine}:Holds"]
    assert all(copied[name] for name in ("stale_weights", "surrogate", f"{mine}:Sum"))
    same_as_alone(trunk, runs)


@pytest.mark.long
def test_branches_of_other_attacks_end_as_runs_alone(options):
    runs = [options(attack=name, attack_arguments=arguments, sentinel=EARLY) for name, arguments in OTHERS]
    same_as_alone(Trunk.grow(runs), runs)


def same_as_alone(trunk, runs):
    results = [told(trunk.branch(run)) for run in runs]
    assert results == [told(Simulation(run)) for run in runs]
    assert len(set(results)) == len(runs)


@pytest.mark.long
def test_branches_of_the_papers_procedure_too(options):
    some = {"attack": "constant", "procedure": "paper", "honest_steps": 6}
    runs = [options(**some, direction=direction) for direction in ("forward", "backward")]
    trunk = Trunk.grow(runs)
    assert [told(trunk.branch(run)) for run in runs] == [told(Simulation(run)) for run in runs]


def test_what_differs_before_the_start_has_another_trunk(options):
    base = options(attack="scaling")
    assert trunk_of(base) == trunk_of(options(attack="delay", malicious=0.5, majority=True, direction="forward"))
    for change in ({"seed": 1}, {"start": 5}, {"steps": 13}, {"guard": "off"}, {"sentinel": EARLY}):
        assert trunk_of(base) != trunk_of(options(attack="scaling", **change))


def test_columns_kept_apart_add_up_to_any_choice_of_them(options):
    some = options(moe=True)
    ids = torch.randint(256, (4, 2, 1, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(256, (4, 2, 1, 16), generator=torch.Generator().manual_seed(1))
    stages = build_stages(some)
    weights = [weight for stage in stages for weight in stage.parameters()]
    passed = train_pass(stages, ids, labels, Wire(), apart=True)
    assert all(weight.grad is None for weight in weights)
    for chosen in ([0, 1, 2, 3], [1, 3], [2]):
        losses_CM = train_pass(stages, ids[chosen], labels[chosen], Wire()).losses_CM
        torch.testing.assert_close(passed.losses_CM[chosen], losses_CM)
        for index, weight in enumerate(weights):
            parts = [passed.gradients[column][index] for column in chosen]
            total = sum(part for part in parts if part is not None)
            torch.testing.assert_close(torch.zeros_like(weight) + total, weight.grad, rtol=1e-4, atol=1e-6)
            weight.grad = None


@pytest.mark.long
def test_a_run_may_end_when_all_are_found(options):
    whole = Simulation(options(attack="nan", steps=11, start=3)).run()
    short = Simulation(options(attack="nan", steps=11, start=3, stop_after=2)).run()
    assert short["details"]["steps"] < whole["details"]["steps"] == 11
    assert short["convicted"] == whole["convicted"] and short["f1"] == 1.0
    unseen = Simulation(options(attack="low_precision", steps=5, start=3, stop_after=1)).run()
    assert unseen["details"]["steps"] == 5


def test_messages_are_counted_with_their_cascade(options):
    result = Simulation(options(attack="nan", steps=6, start=3, direction="forward")).run()
    assert result["details"]["messages"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    silent = Simulation(options(attack="low_precision", steps=5, start=3)).run()
    assert silent["details"]["messages"]["recall"] == 0.0 and silent["details"]["messages"]["precision"] is None
    assert np.isfinite(silent["loss"]["guarded"])
