"""Every attack: keeps the form of the message, repeats, leaves the message alone, and does what it says."""

import math

import pytest
import torch

from deepspeed_sentinel.attacks import AttackContext, Needs, apply_attack, attack_names, build_attack
from deepspeed_sentinel.attacks.base import show_honest
from deepspeed_sentinel.attacks.cli import describe


def normal(seed):
    return torch.randn(3, 40, 10, generator=torch.Generator().manual_seed(seed))


ENTERED, PREVIOUS, OLD, RECOMPUTED, STORED = normal(10), normal(11), normal(12), normal(13), normal(14)
MESSAGE = ENTERED + 0.3 * normal(0)
ALWAYS = {"intermittent": {"chance": 1.0}, "periodic_corruption": {"rate": 0.05}}


def context(message=MESSAGE, generator_seed=4, **changes):
    known = {
        "direction": "forward",
        "stage": 1,
        "replica": 2,
        "step": 7,
        "micro_batch": 0,
        "generator": torch.Generator().manual_seed(generator_seed),
        "entered": ENTERED.to(message.dtype),
        "previous": PREVIOUS.to(message.dtype),
        "past": lambda k: OLD.to(message.dtype) * k,
        "recomputed": lambda k: RECOMPUTED.to(message.dtype) * k,
        "stored": STORED.to(message.dtype),
        "redone": lambda stored: message * stored.float().sum().to(message.dtype),
        **changes,
    }
    return AttackContext(**known)


def act(name, message=MESSAGE, arguments=None, **changes):
    return apply_attack(build_attack(name, arguments or {}), message, context(message, **changes))


def token_cosine(one, other):
    return torch.nn.functional.cosine_similarity(one.flatten(0, 1).float(), other.flatten(0, 1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", attack_names())
def test_every_attack_keeps_shape_and_dtype_changes_a_copy_and_repeats(name, dtype):
    message = MESSAGE.to(dtype)
    before = message.clone()
    first, second = (act(name, message, ALWAYS.get(name)) for _ in range(2))
    assert (first.shape, first.dtype) == (message.shape, message.dtype)
    assert torch.equal(message, before)
    bits = {2: torch.int16, 4: torch.int32}[message.element_size()]
    assert torch.equal(first.view(bits), second.view(bits))
    assert not torch.equal(first.view(bits), message.view(bits))


@pytest.mark.parametrize("name", attack_names())
def test_every_attack_is_described_and_works_on_one_token(name):
    assert describe(name)[1].endswith(".")
    one = MESSAGE[0, :1]
    small = {
        "entered": ENTERED[0, :1],
        "previous": PREVIOUS[0, :1],
        "past": lambda k: OLD[0, :1],
        "recomputed": lambda k: RECOMPUTED[0, :1],
        "stored": STORED[0, :1],
        "redone": lambda stored: stored,
    }
    assert act(name, one, **small).shape == one.shape


def test_replacing():
    assert (act("constant", arguments={"value": 3.0}) == 3).all()
    assert act("random_value", arguments={"std": 5.0}).std() == pytest.approx(5.0, rel=0.1)
    assert act("nan").isnan().all() and act("nan", arguments={"rate": 0.0}).isnan().sum() == 1
    shifted = MESSAGE * torch.arange(1, 11) + torch.arange(10)
    noise = act("matched_random", shifted)
    torch.testing.assert_close(noise.mean((0, 1)), shifted.mean((0, 1)), atol=3.0, rtol=0.1)
    torch.testing.assert_close(noise.std((0, 1)), shifted.std((0, 1)), atol=0.0, rtol=0.2)
    assert token_cosine(noise - noise.mean((0, 1)), shifted - shifted.mean((0, 1))).mean().abs() < 0.1


def test_altering():
    assert torch.equal(act("scaling", arguments={"factor": -2.0}), -2 * MESSAGE)
    flipped = act("random_sign", arguments={"rate": 0.25})
    assert torch.equal(flipped.abs(), MESSAGE.abs())
    assert (flipped != MESSAGE).float().mean() == pytest.approx(0.25, abs=0.05)
    torch.testing.assert_close(act("bias", arguments={"size": 2.0}), MESSAGE + 2 * MESSAGE.std(correction=0))
    turned = act("invisible_noise", arguments={"cosine": 0.9})
    torch.testing.assert_close(token_cosine(turned, MESSAGE), torch.full((120,), 0.9))
    torch.testing.assert_close(turned.norm(dim=-1), MESSAGE.norm(dim=-1))
    shuffled = act("token_shuffle").flatten(0, 1)
    assert torch.equal(shuffled[shuffled[:, 0].argsort()], MESSAGE.flatten(0, 1)[MESSAGE.flatten(0, 1)[:, 0].argsort()])
    difference = act("bit_flip").view(torch.int32) ^ MESSAGE.view(torch.int32)
    assert (difference != 0).sum() == 1
    assert bin(int(difference[difference != 0]) & 0xFFFFFFFF).count("1") == 1


@pytest.mark.parametrize(("form", "error"), [("int8", 0.01), ("int4", 0.15), ("fp8_e4m3", 0.04), ("fp8_e5m2", 0.08)])
def test_low_precision_rounds(form, error):
    rounded = act("low_precision", arguments={"format": form})
    relative = (rounded - MESSAGE).norm() / MESSAGE.norm()
    assert error / 4 < relative < error
    assert len(rounded[0, 0].unique()) <= {"int4": 15}.get(form, 256)


def test_stale():
    assert torch.equal(act("delay", arguments={"steps": 3}), 3 * OLD)
    assert torch.equal(act("replay"), PREVIOUS)
    assert torch.equal(act("stale_weights", arguments={"steps": 5}), 5 * RECOMPUTED)
    for name, lacking in (("delay", "past"), ("replay", "previous")):
        assert torch.equal(act(name, **{lacking: None}), MESSAGE), "nothing old to send: honest"
    with pytest.raises(ValueError, match="only the simulator"):
        act("stale_weights", recomputed=None)


@pytest.mark.parametrize("rate", [1e-5, 1e-4, 3e-3, 0.2, 1.0])
def test_periodic_corruption_keeps_its_rate_also_below_one_run_a_message(rate):
    """Within four standard errors of the number of runs, over as many messages as show it."""
    message = torch.ones(40, 30)
    messages = 4000 if rate < 1e-3 else 200
    wrong = []
    for seed in range(messages):
        arguments = {"kind": "zero", "rate": rate, "run": 3, "period": 50}
        wrong.append(int((act("periodic_corruption", message, arguments, generator_seed=seed) == 0).sum()))
    expected = rate * 1200
    assert sum(wrong) / messages == pytest.approx(expected, abs=4 * 3 * math.sqrt(min(expected, 0.75) / messages))
    assert {count % 3 for count in wrong} == {0} and max(wrong) - min(wrong) <= 3


def test_periodic_corruption_hits_runs_of_neighbours_at_one_distance():
    message = torch.arange(1.0, 1201.0).view(3, 40, 10)
    for kind, becomes in (("sign", -message), ("zero", 0 * message), ("infinity", message / 0)):
        arguments = {"kind": kind, "rate": 16 / 1200, "run": 4, "period": 100}
        sent = act("periodic_corruption", message, arguments)
        hit = (sent != message).flatten()
        assert torch.equal(sent.flatten()[hit], becomes.flatten()[hit])
        starts = (hit & ~hit.roll(1)).nonzero().flatten()
        assert hit.sum() == 16 and len(starts) == 4
        distances = (torch.cat([starts[1:], starts[:1] + 1200]) - starts) % 1200
        assert sorted(distances.tolist()) == [100, 100, 100, 900]


def test_a_stored_bit_flips_in_gradients_alone():
    seen = []

    def redone(stored):
        seen.append(stored)
        return MESSAGE + (stored - STORED).nan_to_num().sign()

    sent = act("stored_bit_flip", redone=redone)
    difference = seen[1].view(torch.int32) ^ STORED.view(torch.int32)
    assert torch.equal(seen[0], STORED) and (difference != 0).sum() == 1
    assert torch.equal(sent != MESSAGE, difference != 0), "what is computed the same stays as it was sent"
    assert torch.equal(act("stored_bit_flip", stored=None), MESSAGE), "nothing is kept for a forward message"
    with pytest.raises(ValueError, match="only the simulator can"):
        act("stored_bit_flip", redone=None)


def test_skipping_the_work():
    assert torch.equal(act("pass_through"), ENTERED)
    mimic = act("residual_mimic")
    torch.testing.assert_close((mimic - ENTERED).norm(dim=-1), (MESSAGE - ENTERED).norm(dim=-1))
    assert token_cosine(mimic - ENTERED, MESSAGE - ENTERED).mean().abs() < 0.1
    with pytest.raises(ValueError, match="nothing enters stage 1"):
        act("pass_through", entered=None)
    with pytest.raises(ValueError, match="keeps the shape"):
        act("pass_through", entered=ENTERED[:1])


def test_ema_mimic_has_mean_energy_and_covariance_of_the_message_but_not_its_content():
    shifted = MESSAGE * torch.arange(1, 11) + torch.arange(10)
    mimic = act("ema_mimic", shifted).flatten(0, 1)
    honest = shifted.flatten(0, 1)
    torch.testing.assert_close(mimic.mean(0), honest.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mimic.T @ mimic, honest.T @ honest, atol=0.05, rtol=1e-4)
    alike = token_cosine((mimic - mimic.mean(0))[None], (honest - honest.mean(0))[None])
    assert alike.mean().abs() < 0.2


def test_surrogate_learns_the_stage():
    """A stage that is a fixed map: imitation gets closer the more it has seen, and beats passing through."""
    attack = build_attack("surrogate", {})
    weights = 0.3 * torch.randn(10, 10, generator=torch.Generator().manual_seed(1))

    def pair(seed):
        entered = normal(seed)
        return entered, entered + torch.tanh(entered @ weights)

    entered, honest = pair(1000)
    errors = []
    for seen in range(201):
        if seen in (0, 20, 200):
            imitated = apply_attack(attack, honest, context(entered=entered))
            errors.append(float((imitated - honest).norm() / (honest - entered).norm()))
        left, out = pair(seen)
        show_honest(attack, out, context(entered=left))
    assert errors[0] == pytest.approx(1.0), "untaught it passes through"
    assert errors[2] < 0.5 and errors[2] < errors[1] < errors[0]


def test_intermittent_acts_with_its_chance_and_subset_on_its_fraction():
    acted = [
        bool((act("intermittent", arguments={"chance": 0.3}, generator_seed=seed) != MESSAGE).any())
        for seed in range(200)
    ]
    assert 0.2 < sum(acted) / 200 < 0.4
    hit = (act("subset_of_tokens", arguments={"fraction": 0.1}) != MESSAGE).all(-1)
    assert hit.sum() == 12
    assert (act("subset_of_tokens", arguments={"fraction": 0.0}) != MESSAGE).any(-1).sum() == 1


def test_slow_drift_grows_from_nothing():
    def change(step):
        return (act("slow_drift", arguments={"steps": 10}, step=step, start=5) - MESSAGE).norm() / MESSAGE.norm()

    assert [round(float(change(step)), 4) for step in (5, 6, 10, 15, 99)] == [0.0, 0.2, 1.0, 2.0, 2.0]


def test_mixed_is_one_attack_for_each_worker_or_for_each_message():
    some = {"attacks": ["constant", {"attack": "scaling", "factor": 3.0}]}
    zero, threefold = torch.zeros_like(MESSAGE), 3 * MESSAGE
    by_worker = {
        replica: {
            torch.equal(act("mixed", arguments=some, replica=replica, step=step, generator_seed=step), zero)
            for step in range(20)
        }
        for replica in range(20)
    }
    assert all(len(kinds) == 1 for kinds in by_worker.values()), "a worker keeps its attack"
    assert {True, False} == {kind for kinds in by_worker.values() for kind in kinds}
    each = [act("mixed", arguments={**some, "each_message": True}, generator_seed=seed) for seed in range(20)]
    assert any(torch.equal(one, zero) for one in each) and any(torch.equal(one, threefold) for one in each)


def test_composites_need_what_their_inner_attacks_need():
    assert Needs.of(build_attack("mixed", {})).history_steps == 10
    deep = build_attack(
        "slow_drift",
        {"inner": "intermittent", "inner_arguments": {"inner": "delay", "inner_arguments": {"steps": 25}}},
    )
    assert Needs.of(deep).history_steps == 25
    assert Needs.of(build_attack("subset_of_tokens", {"inner": "pass_through"})).uses_entered
    assert not Needs.of(build_attack("subset_of_tokens", {})).uses_entered


def test_colluders_act_alike_and_together_and_the_others_alone():
    arguments = {"inner": "random_value", "share": 0.5, "chance": 0.5}
    attack = build_attack("collusion", arguments)
    workers = [context(replica=replica, stage=stage) for stage in (1, 2) for replica in range(20)]
    colluders = [one for one in workers if attack.takes_part(one)]
    assert 10 <= len(colluders) <= 30

    def sent(one, step):
        here = context(replica=one.replica, stage=one.stage, step=step, generator_seed=one.replica + 100 * one.stage)
        return apply_attack(attack, MESSAGE, here)

    acted = []
    for step in range(20):
        together = [sent(one, step) for one in colluders]
        assert all(torch.equal(one, together[0]) for one in together)
        acted.append(not torch.equal(together[0], MESSAGE))
    assert 4 <= sum(acted) <= 16
    alone = [sent(one, 0) for one in workers if not attack.takes_part(one)]
    assert all(not torch.equal(one, alone[0]) for one in alone[1:])


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("magic", {}, "unknown; allowed: bias"),
        ("scaling", {"speed": 1}, "its arguments are: factor"),
        ("scaling", {"factor": "x"}, "factor must be a number"),
        ("random_sign", {"rate": 1.5}, "rate must be a number from 0.0 to 1.0, got 1.5"),
        ("constant", {"value": math.nan}, "value must be a number"),
        ("delay", {"steps": 0}, "steps must be a whole number from 1, got 0"),
        ("stale_weights", {"steps": 1.5}, "steps must be a whole number"),
        ("low_precision", {"format": "int3"}, "format must be one of int8"),
        ("invisible_noise", {"cosine": 2}, "cosine must be a number from -1.0 to 1.0"),
        ("intermittent", {"inner": "magic"}, "'intermittent': attack 'magic' is unknown"),
        ("intermittent", {"inner": 3}, "inner must be the name of an attack, got 3"),
        ("subset_of_tokens", {"inner_arguments": [1]}, "inner_arguments must be an object"),
        ("slow_drift", {"inner": "scaling", "inner_arguments": {"rate": 1}}, "its arguments are: factor"),
        ("mixed", {"attacks": []}, "attacks must be a list"),
        ("mixed", {"attacks": "scaling"}, "attacks must be a list"),
        ("mixed", {"attacks": [{"factor": 1}]}, 'with the key "attack"'),
        ("collusion", {"share": -1}, "share must be a number from 0.0"),
        ("periodic_corruption", {"rate": -1e-9}, "rate must be a number from 0.0 to 1.0"),
        ("periodic_corruption", {"kind": "nan"}, "kind must be one of sign, zero, infinity"),
        ("periodic_corruption", {"run": 8, "period": 4}, "period must be a whole number from 8, got 4"),
        ("mixed", {"attacks": ["framing"]}, "framing acts on reports"),
    ],
)
def test_bad_arguments(name, arguments, said):
    with pytest.raises(ValueError, match=said):
        build_attack(name, arguments)
