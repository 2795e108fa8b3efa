"""Twin steps in the simulator: what is proved, and what the red team does about them."""

import numpy as np
import pytest

from deepspeed_sentinel.simulation.options import SimulationOptions
from deepspeed_sentinel.simulation.run import Simulation

MESH = {"stages": 4, "replicas": 4, "micro_batches": 1, "micro_batch_size": 1, "sequence": 16}
QUICK = {**MESH, "seed": 5, "steps": 30, "start": 2, "sentinel": {"warmup_steps": 20}, "stop_after": 1}


def run(**changes):
    return Simulation(SimulationOptions(**{**QUICK, **changes})).run()


@pytest.mark.parametrize("attack", ["low_precision", "stale_weights", "wrong_gradients", "stored_bit_flip"])
def test_what_no_statistic_sees_is_proved_in_the_warm_up_already(attack):
    arguments = {"steps": 2} if attack == "stale_weights" else {}
    result = run(attack=attack, attack_arguments=arguments, twins_every=2)
    assert result["f1"] == 1.0 and result["details"]["proofs"] >= len(result["malicious"])


def test_a_clean_run_proves_nothing():
    result = run(twins_every=2, malicious=0.0, stop_after=0, steps=10)
    details = result["details"]
    assert details["twin_steps"] > 3 and details["proofs"] == details["excluded_columns"] == 0


def test_without_twin_steps_rounding_goes_unseen():
    result = run(attack="low_precision", steps=9)
    assert result["f1"] == 0.0 and result["details"]["twin_steps"] == 0


def test_attackers_that_compare_what_they_are_given_keep_still_in_twin_steps():
    many = {"replicas": 6, "malicious": 0.34, "attack": "comparing", "attack_arguments": {"inner": "low_precision"}}
    assert run(**many, twins_every=2, steps=8)["f1"] == 0.0


@pytest.mark.long
def test_fewer_columns_in_a_twin_step_find_those_whose_partner_was_given_other_data():
    some = {"warmup_steps": 20, "twins": {"every": 2, "columns": 4}}
    many = {"replicas": 6, "malicious": 0.34, "attack": "comparing", "attack_arguments": {"inner": "low_precision"}}
    result = run(**many, sentinel=some, steps=60)
    assert result["f1"] == 1.0 and result["false_convictions"] == 0


def test_a_twin_step_gives_all_columns_the_same_loss():
    simulation = Simulation(SimulationOptions(**{**QUICK, "twins_every": 1}))
    verdict = simulation.step()
    assert verdict.twins and verdict.alike.all() and not verdict.excluded.any()
    assert np.isfinite(simulation.losses[0])
