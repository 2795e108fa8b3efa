"""One attack module serves both: in DeepSpeed and in the simulator the same attackers are convicted, nobody else."""

from __future__ import annotations

import pytest

from deepspeed_sentinel.simulation.options import SimulationOptions
from deepspeed_sentinel.simulation.run import Simulation
from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario

STAGES, REPLICAS, SEED = 4, 3, 0
WARM, START, STEPS = 12, 17, 23
# Columns of DeepSpeed stay what they are, and two bad ones of three leave nobody to compare a worker with.
EARLY = {"warmup_steps": WARM, "conviction": "statistics"}
CULPRITS = ((1, 2), (2, 1))
ATTACKS = {
    "constant": {},
    "scaling": {"factor": -1},
    "delay": {"steps": 5},
    "token_shuffle": {},
}
BASE = Scenario(name="base", steps=STEPS, hidden=64, lengths=(64,))


def scenario(attack: str, folder) -> Scenario:
    inject = [
        {"stage": stage, "replica": replica, "direction": way, "start_step": START, "attack": attack} | ATTACKS[attack]
        for stage, replica in CULPRITS
        for way in ("forward", "backward")
    ]
    block = {"enabled": True, "seed": SEED, "output_dir": str(folder / f"logs_{attack}"), "inject": inject, **EARLY}
    return BASE.with_(name=attack, sentinel={**block, "events": "steps"}, load={"directory": str(folder / "warm")})


@pytest.fixture(scope="module")
def live(tmp_path_factory, selected):
    folder = tmp_path_factory.mktemp("parity")
    scenarios = [scenario(attack, folder) for attack in ATTACKS if attack in selected("attack")]
    block = {"enabled": True, "seed": SEED, "output_dir": str(folder / "logs_warm"), **EARLY}
    saved = {"directory": str(folder / "warm"), "after_step": WARM}
    warm = BASE.with_(name="warm", steps=WARM, sentinel=block, save=saved)
    return run_scenarios([warm, *scenarios], stages=STAGES, replicas=REPLICAS, folder=folder, timeout=420)


@pytest.mark.long
@pytest.mark.parametrize("attack", ATTACKS)
def test_convictions_in_deepspeed_are_those_of_the_simulator(live, attack):
    convicted = {tuple(worker) for verdict in live[attack][0].verdicts for worker in verdict["newly_convicted"]}
    options = SimulationOptions(
        stages=STAGES,
        replicas=REPLICAS,
        attackers=CULPRITS,
        attack=attack,
        attack_arguments=ATTACKS[attack],
        steps=STEPS,
        start=START,
        seed=SEED,
        sentinel=EARLY,
    )
    result = Simulation(options).run()
    assert sorted(convicted) == [tuple(worker) for worker in result["convicted"]] == [*CULPRITS]
