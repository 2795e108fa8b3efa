"""Whole runs: without an attack plain training, with one the columns at fault never count."""

import json

import numpy as np
import pytest
import torch

from deepspeed_sentinel.mesh import identity
from deepspeed_sentinel.simulation import watched
from deepspeed_sentinel.simulation import weights as weight_history
from deepspeed_sentinel.simulation.attackers import Attackers, draw_attackers
from deepspeed_sentinel.simulation.data import Text
from deepspeed_sentinel.simulation.model import build_stages
from deepspeed_sentinel.simulation.pipeline import Wire, train_pass
from deepspeed_sentinel.simulation.run import Simulation
from integration_tests.variants import some

EARLY = {"warmup_steps": 2, "fence_window": 8}


def weights(simulation):
    return [weight.detach().clone() for stage in simulation.stages for weight in stage.parameters()]


def run(options):
    simulation = Simulation(options)
    return simulation, simulation.run()


def test_with_nobody_tampering_watching_changes_no_bit(options):
    settings = {**EARLY, "action": "observe"}
    watched, seen = run(options(sentinel=settings, steps=7))
    plain, _ = run(options(guard="off", steps=7))
    assert seen["judged_messages"] > 0 and not seen["convicted"]
    assert watched.losses == plain.losses
    assert all(torch.equal(one, other) for one, other in zip(weights(watched), weights(plain), strict=True))


@pytest.mark.parametrize("left_out", [(), (1, 3)])
def test_it_trains_like_a_plain_loop(options, left_out):
    """Against train_pass without links, AdamW and clipping by hand, on the columns that count alone."""
    some = options(guard="off", steps=3)
    simulation = Simulation(some)
    simulation.left_out = left_out
    result = simulation.run()
    counted = [column for column in range(some.replicas) if column not in left_out]
    stages, text = build_stages(some), Text(some)
    parameters = [weight for stage in stages for weight in stage.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = some.size.learning_rate * (step + 1) / 10
        optimizer.zero_grad()
        ids, labels = text.next_step()
        losses = train_pass(stages, ids[counted], labels[counted], Wire()).losses_CM
        for weight in parameters:
            weight.grad /= losses.numel()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    for ours, theirs in zip(weights(simulation), parameters, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
    assert result["loss"]["clean"] == pytest.approx(simulation.held_out_loss())


def test_an_excluded_column_is_as_if_it_had_never_been(options):
    """NaN is always seen: after a step with tampered columns the weights are those of a step without them."""
    some = options(attack="nan", start=0, steps=1)
    simulation = Simulation(some)
    verdict = simulation.step()
    kept = np.flatnonzero(~verdict.excluded)
    assert 0 < len(kept) < 4
    stages = build_stages(some)
    parameters = [weight for stage in stages for weight in stage.parameters()]
    ids, labels = (part[kept] for part in Text(some).next_step())
    losses = train_pass(stages, ids, labels, Wire()).losses_CM
    for weight in parameters:
        weight.grad /= losses.numel()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=some.size.learning_rate / 10, betas=(0.9, 0.95), weight_decay=0.01).step()
    for ours, theirs in zip(weights(simulation), parameters, strict=True):
        torch.testing.assert_close(ours, theirs.detach())


def test_a_step_without_any_column_left_changes_nothing(options):
    some = options(attack="nan", start=0, steps=1, replicas=2, malicious=1.0, majority=True)
    simulation = Simulation(some)
    before = weights(simulation)
    assert simulation.step().skip
    assert all(torch.equal(one, other) for one, other in zip(before, weights(simulation), strict=True))


def test_attackers_are_found_convicted_and_share_a_column_that_is_left_out(options):
    simulation, result = run(options(attack="nan", steps=12, start=3))
    malicious = np.argwhere(draw_attackers(simulation.mesh, 1, 0)).tolist()
    assert result["malicious"] == result["convicted"] == malicious
    assert (result["precision"], result["recall"], result["f1"]) == (1.0, 1.0, 1.0)
    assert result["false_convictions"] == 0
    healed = result["details"]["until_healed"]
    assert 0 < healed["lost_columns"] <= result["details"]["excluded_columns"] and healed["steps"] <= 9
    assert result["loss"]["guarded"] == pytest.approx(simulation.held_out_loss())
    columns = {int(np.flatnonzero(simulation.served[stage] == replica)[0]) for stage, replica in malicious}
    assert len(columns) == 1 and simulation.step().excluded.nonzero()[0].tolist() == list(columns)


@pytest.mark.parametrize("wiring", some(("heal", "static", "shuffle"), ("heal",)))
def test_columns_are_dealt_as_asked(options, wiring):
    """Two bad workers in two columns of four: where they are moved they share one."""
    some = options(attack="nan", attackers=[[1, 1], [2, 3]], start=2, steps=16, wiring=wiring, sentinel=EARLY)
    simulation, wirings = Simulation(some), []
    result = simulation.run(lambda verdict: wirings.append(verdict.wiring))
    assert len({one.tobytes() for one in wirings[:-1]}) > 10 or wiring != "shuffle"
    assert all((one == identity(simulation.mesh)).all() for one in wirings) or wiring != "static"
    lost = result["details"]["excluded_columns"] / 14
    assert lost > 1.5 if wiring == "static" else lost < 1.5
    assert result["malicious"] == result["convicted"] == [[1, 1], [2, 3]], "by name, and no others"
    assert result["details"]["wiring"] == wiring and result["details"]["skipped_steps"] == 0


@pytest.mark.parametrize(
    ("attack", "arguments"),
    [
        # Branches and runs alone are equal in test_branching.py, with these too.
        pytest.param("random_value", {}, marks=pytest.mark.long),
        pytest.param("delay", {"steps": 3}, marks=pytest.mark.long),
        pytest.param("stale_weights", {"steps": 3}, marks=pytest.mark.long),
        ("surrogate", {}),
    ],
)
def test_the_same_settings_give_the_same_result(options, attack, arguments):
    some = options(attack=attack, attack_arguments=arguments, sentinel=EARLY, start=4, steps=7)
    results = []
    for _ in range(2):
        _, result = run(some)
        result.pop("seconds")
        for name in ("seconds_a_step", "judge_seconds_a_step"):
            result["details"].pop(name)
        results.append(json.dumps(result, allow_nan=False))
    assert results[0] == results[1]


LONG = ("forward", "backward")  # "both" has them in it


@pytest.mark.parametrize("direction", ["both", *(pytest.param(way, marks=pytest.mark.long) for way in LONG)])
def test_micro_batch_by_micro_batch_is_the_same(options, direction):
    common = {"attack": "constant", "direction": direction, "sentinel": EARLY, "start": 3, "steps": 5}
    whole, parts = (run(options(chunk=chunk, **common)) for chunk in (0, 1))
    np.testing.assert_allclose(whole[0].losses, parts[0].losses, rtol=1e-4)
    assert whole[1]["malicious"] == parts[1]["malicious"]


def test_a_guard_that_is_off_lets_the_attack_through(options):
    _, result = run(options(attack="constant", guard="off", start=2, steps=5))
    assert result["loss"]["attacked"] is not None and result["loss"]["guarded"] is None
    assert result["judged_messages"] == 0 and len(result["malicious"]) == 2
    _, diverged = run(options(attack="nan", guard="off", start=2, steps=5))
    assert diverged["loss"]["attacked"] is None, "JSON has no NaN"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_stale_weights_compute_what_the_stage_computed_then(options, direction, monkeypatch):
    """With weights of one step ago: compare with the stage as it was."""
    some = options(attack="stale_weights", attack_arguments={"steps": 1}, direction=direction, start=0, steps=2)
    simulation = Simulation(some)
    simulation.step()
    then = build_stages(some)
    calls = []
    original = Attackers.tamper

    def spy(self, way, stage, step, part, served, sent, entered, anew):
        wire = original(self, way, stage, step, part, served, sent, entered, anew)
        calls.append((way, stage, served, sent, entered, wire))
        return wire

    monkeypatch.setattr(Attackers, "tamper", spy)
    simulation.step()
    stage = 1
    column = int(np.flatnonzero(simulation.attackers.malicious[stage][simulation.served[stage]])[0])
    forward = next(call for call in calls if call[:2] == (0, stage))
    leaf = forward[4][column, 0].requires_grad_()
    made = then[stage](leaf)
    expected = made
    if direction == "backward":
        backward = next(call for call in calls if call[:2] == (1, stage))
        expected = torch.autograd.grad(made, leaf, backward[4][column, 0])[0]
        forward = backward
    torch.testing.assert_close(forward[5][column, 0], expected.detach(), rtol=1e-3, atol=1e-6)
    assert not torch.equal(forward[5][column, 0], forward[3][column, 0])


def test_a_stored_bit_alters_the_gradient_that_leaves_and_nothing_else(options, monkeypatch):
    """Against the stage's own backward pass from the altered input; activations leave as they were."""
    some = options(attack="stored_bit_flip", start=0, steps=1, sentinel=EARLY)
    simulation = Simulation(some)
    stages, calls = build_stages(some), []
    original = weight_history.backward_from

    def spy(stage, stored, gradient):
        sent = original(stage, stored, gradient)
        calls.append((simulation.stages.index(stage), stored, gradient, sent))
        return sent

    monkeypatch.setattr(watched, "backward_from", spy)
    simulation.step()
    assert len(calls) == 2 * 2 * some.micro_batches, "each attacker twice for each of its gradients"
    for (index, kept, gradient, right), (_, altered, _, wrong) in zip(calls[::2], calls[1::2], strict=True):
        assert ((kept.view(torch.int32) ^ altered.view(torch.int32)) != 0).sum() == 1
        for stored, sent in ((kept, right), (altered, wrong)):
            leaf = stored.clone().requires_grad_()
            (expected,) = torch.autograd.grad(stages[index](leaf), leaf, gradient)
            torch.testing.assert_close(sent, expected, rtol=1e-3, atol=1e-6, equal_nan=True)
    assert {direction for direction, *_ in simulation.attackers.altered} <= {1}


def test_framing_is_a_dispute_and_convicts_no_honest_worker(options):
    simulation, result = run(options(attack="framing", verifier="receiver", sentinel=EARLY, start=4, steps=9))
    assert result["details"]["disputes"] > 0
    assert result["malicious"] == np.argwhere(draw_attackers(simulation.mesh, 1, 0)).tolist()
    assert not [worker for worker in result["convicted"] if worker not in result["malicious"]]


def test_a_mixture_of_experts_runs(options):
    _, result = run(options(moe=True, attack="nan", steps=2, start=1))
    assert result["details"]["moe"] and result["loss"]["guarded"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": 2}, "stages must be a whole number from 3, got 2"),
        ({"malicious": 0.5, "attack": "nan"}, "2 of 4 workers of a stage malicious; fewer than half"),
        ({"malicious": -1}, "malicious must be a share from 0 to 1"),
        ({"attack": "nan", "start": 12}, r"start \(12\) must be less than steps \(12\)"),
        ({"attack": "framing"}, "use verifier='receiver'"),
        ({"attack": "scaling", "attack_arguments": {"x": 1}}, "its arguments are: factor"),
        ({"model": "huge"}, "model must be one of tiny"),
        ({"sequence": -1}, "sequence must be a whole number from 1"),
        ({"evidence": "none"}, "evidence must be one of paper, all"),
    ],
)
def test_impossible_settings_are_refused(options, changes, said):
    with pytest.raises(ValueError, match=said):
        options(**changes)


def test_bad_sentinel_settings_are_refused(options):
    with pytest.raises(ValueError, match=r"sentinel.strikes"):
        Simulation(options(sentinel={"strikes": 0}))
