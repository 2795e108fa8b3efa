import math

import pytest
import torch

from deepspeed_sentinel.attacks import AttackContext, attack_names, build_attack
from deepspeed_sentinel.attacks.faults import Faults
from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.mesh import Worker

MESSAGE = torch.randn(3, 40, 10, generator=torch.Generator().manual_seed(0))


def act(name, message=MESSAGE, **arguments):
    context = AttackContext("forward", 1, 2, 7, 0, torch.Generator().manual_seed(4))
    return build_attack(name, arguments)(message, context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", attack_names())
def test_every_attack_keeps_shape_and_dtype_changes_a_copy_and_repeats(name, dtype):
    message = MESSAGE.to(dtype)
    before = message.clone()
    first, second = act(name, message), act(name, message)
    assert (first.shape, first.dtype) == (message.shape, message.dtype)
    assert torch.equal(message, before)
    bits = {2: torch.int16, 4: torch.int32}[message.element_size()]
    assert torch.equal(first.view(bits), second.view(bits))
    assert not torch.equal(first.view(bits), message.view(bits))


def test_what_each_attack_does():
    assert (act("constant", value=3.0) == 3).all()
    assert torch.equal(act("scaling", factor=-2.0), -2 * MESSAGE)
    assert act("random_value", std=5.0).std() == pytest.approx(5.0, rel=0.1)
    flipped = act("random_sign", rate=0.25)
    assert torch.equal(flipped.abs(), MESSAGE.abs())
    assert (flipped != MESSAGE).float().mean() == pytest.approx(0.25, abs=0.05)
    torch.testing.assert_close(act("bias", size=2.0), MESSAGE + 2 * MESSAGE.std(correction=0))
    assert act("nan").isnan().all() and act("nan", rate=0.0).isnan().sum() == 1
    difference = act("bit_flip").view(torch.int32) ^ MESSAGE.view(torch.int32)
    assert (difference != 0).sum() == 1
    assert bin(int(difference[difference != 0]) & 0xFFFFFFFF).count("1") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("magic", {}, "unknown; allowed: bias"),
        ("scaling", {"speed": 1}, "its arguments are: factor"),
        ("scaling", {"factor": "x"}, "factor must be a number"),
        ("random_sign", {"rate": 1.5}, "rate must be a number from 0.0 to 1.0, got 1.5"),
        ("constant", {"value": math.nan}, "value must be a number"),
    ],
)
def test_bad_arguments(name, arguments, said):
    with pytest.raises(ValueError, match=said):
        build_attack(name, arguments)


CULPRIT = Worker(1, 2)


def faults(worker=CULPRIT, **changes):
    entry = {
        "stage": 1,
        "replica": 2,
        "attack": "scaling",
        "factor": -1.0,
        "start_step": 5,
        "stop_step": 8,
        **changes,
    }
    return Faults(SentinelConfig.parse({"inject": [entry]}).inject, worker, seed=0)


def test_faults_act_on_their_worker_direction_place_and_steps_only():
    assert not faults(Worker(1, 1))
    mine = faults()
    for step in range(12):
        tampered = mine.apply("compute", "forward", step, 0, MESSAGE)
        assert (tampered is not MESSAGE) == (5 <= step < 8)
    assert mine.apply("compute", "backward", 6, 0, MESSAGE) is MESSAGE
    assert mine.apply("transit", "forward", 6, 0, MESSAGE) is MESSAGE


def test_probability_is_drawn_anew_for_each_message_and_repeats():
    def acted():
        mine = faults(probability=0.3, stop_step=None)
        return [
            mine.apply("compute", "forward", step, mb, MESSAGE) is not MESSAGE
            for step in range(5, 105)
            for mb in (0, 1)
        ]

    assert acted() == acted()
    assert 0.2 < sum(acted()) / 200 < 0.4
