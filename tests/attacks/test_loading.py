"""Attacks from a user's file: loaded, given what they declare, and bad ones named with what was wrong."""

import pytest
import torch

from deepspeed_sentinel.attacks import AttackContext, Needs, apply_attack, build_attack
from deepspeed_sentinel.attacks.base import show_honest
from deepspeed_sentinel.attacks.faults import Faults
from deepspeed_sentinel.attacks.loading import parse_arguments
from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.mesh import Worker

SOURCE = '''
"""A user's attacks."""
from dataclasses import dataclass

import torch


@dataclass
class Halfway:
    """Half of what entered, half of what should leave."""

    weight: float = 0.5
    history_steps = 2

    def __call__(self, message, context):
        return self.weight * context.entered + (1 - self.weight) * message


class InPlace:
    def __call__(self, message, context):
        return message.zero_()


class WrongShape:
    def __call__(self, message, context):
        return message[:1]


class WrongType:
    def __call__(self, message, context):
        return message.double()


class Nothing:
    def __call__(self, message, context):
        pass


class Raises:
    def __call__(self, message, context):
        return {}["gone"]


class TooFarBack:
    def __call__(self, message, context):
        return context.history(3)


class NotCallable:
    pass


class Refuses:
    def __init__(self, size):
        raise TypeError(f"size {size} is odd")

    def __call__(self, message, context):
        return message


class BadPupil:
    def observe(self, message, context):
        raise RuntimeError("cannot learn")

    def __call__(self, message, context):
        return message
'''
MESSAGE = torch.ones(2, 5, 4)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    return file


def context(**changes):
    return AttackContext("backward", 1, 2, 7, 0, torch.Generator().manual_seed(0), **changes)


def test_an_attack_from_a_file_gets_its_arguments_and_what_it_declares(path):
    attack = build_attack(f"{path}:Halfway", {"weight": 0.25})
    assert Needs.of(attack) == Needs(uses_entered=True, history_steps=2)
    tampered = apply_attack(attack, MESSAGE, context(entered=5 * MESSAGE))
    assert torch.equal(tampered, 2 * MESSAGE)


def test_it_works_in_the_inject_block(path):
    entry = {"stage": 1, "replica": 2, "attack": f"{path}:Halfway", "weight": 0.5}
    faults = Faults(SentinelConfig.parse({"inject": [entry]}).inject, Worker(1, 2), seed=0)
    faults.enter("forward", 0, (3 * MESSAGE,))
    assert torch.equal(faults.apply("compute", "forward", 0, 0, (MESSAGE,))[0], 2 * MESSAGE)


def test_the_same_class_name_in_two_files(path, tmp_path):
    other = tmp_path / "elsewhere" / "mine.py"
    other.parent.mkdir()
    other.write_text("class Halfway:\n    def __call__(self, message, context):\n        return -message\n")
    for _ in range(2):
        assert torch.equal(apply_attack(build_attack(f"{other}:Halfway", {}), MESSAGE, context()), -MESSAGE)
        assert build_attack(f"{path}:Halfway", {}).weight == 0.5


def test_an_attack_in_place_does_not_touch_the_honest_message(path):
    honest = MESSAGE.clone()
    assert (apply_attack(build_attack(f"{path}:InPlace", {}), honest, context()) == 0).all()
    assert torch.equal(honest, MESSAGE)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("WrongShape", r"WrongShape \(backward, stage 1, replica 2, step 7, micro-batch 0\) must return .*\(2, 5, 4\)"),
        ("WrongShape", r"but returned torch.float32 \(1, 5, 4\)"),
        ("WrongType", "but returned torch.float64"),
        ("Nothing", "but returned NoneType None"),
        ("Raises", "Raises .* raised KeyError: 'gone'"),
        ("Halfway", "Halfway .* raised TypeError"),
    ],
)
def test_a_bad_attack_is_named_with_what_was_wrong(path, name, said):
    with pytest.raises(ValueError, match=said):
        apply_attack(build_attack(f"{path}:{name}", {}), MESSAGE, context())


def test_asking_for_more_history_than_declared(path):
    entry = {"stage": 1, "replica": 2, "attack": f"{path}:TooFarBack"}
    faults = Faults(SentinelConfig.parse({"inject": [entry]}).inject, Worker(1, 2), seed=0)
    with pytest.raises(ValueError, match=r"TooFarBack .* declare the class attribute history_steps = 3"):
        faults.apply("compute", "forward", 0, 0, (MESSAGE,))


def test_an_observer_that_fails_is_named(path):
    with pytest.raises(ValueError, match=r"BadPupil .*: observe raised RuntimeError: cannot learn"):
        show_honest(build_attack(f"{path}:BadPupil", {}), MESSAGE, context())


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("{path}:Absent", {}, "has no class 'Absent'; it has: Halfway, InPlace"),
        ("{path}", {}, "say which class of the file"),
        ("nowhere.py:Halfway", {}, "there is no file 'nowhere.py'"),
        ("{path}:Halfway", {"height": 1}, "its arguments are: weight"),
        ("{path}:NotCallable", {}, "has no __call__"),
        ("{path}:Refuses", {"size": 3}, "cannot be built: TypeError: size 3 is odd"),
    ],
)
def test_what_cannot_be_built_says_why(path, name, arguments, said):
    with pytest.raises(ValueError, match=said):
        build_attack(name.format(path=path), arguments)


def test_a_file_that_does_not_run_says_why(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module_anywhere\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="does not run: ModuleNotFoundError"):
            build_attack(f"{file}:Halfway", {})


def test_arguments_from_the_command_line():
    given = parse_arguments(["factor=-1", "inner=scaling", 'inner_arguments={"factor": 2}', "deep=true", "list=[1]"])
    assert given == {"factor": -1, "inner": "scaling", "inner_arguments": {"factor": 2}, "deep": True, "list": [1]}
    for bad in ("factor", "=3", "1x=3"):
        with pytest.raises(ValueError, match="NAME=VALUE"):
            parse_arguments([bad])
