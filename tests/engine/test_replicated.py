"""Which tensors all replicas of a stage hold alike, for each kind of optimizer that a pipeline engine may have."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from deepspeed_sentinel.engine.replicated import replicated


def module():
    stage = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
    stage[2].weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    return stage


def stepped(parameters, make=torch.optim.Adam):
    """An optimizer after one step, so that it has its state."""
    optimizer = make(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def engine(stage, optimizer, basic):
    return SimpleNamespace(module=stage, optimizer=optimizer, basic_optimizer=basic)


def wrapped(kind, basic):
    """A wrapper of DeepSpeed's without what building one takes."""
    wrapper = object.__new__(kind)
    wrapper.optimizer = basic
    return wrapper


def same(found, expected):
    return [tensor.data_ptr() for tensor in found] == [tensor.data_ptr() for tensor in expected]


def test_without_a_wrapper_the_parameters_and_the_optimizers_state_no_buffers():
    stage = module()
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    adam = stepped(trained)
    state = [adam.state[parameter][name] for parameter in trained for name in ("exp_avg", "exp_avg_sq", "step")]
    found = replicated(engine(stage, adam, adam))
    assert same(found, [*stage.parameters(), *state])
    assert not any(tensor.requires_grad for tensor in found)


@pytest.mark.parametrize("kind", [FP16_Optimizer, FP16_UnfusedOptimizer])
def test_with_fp16_the_masters_and_their_state_too(kind):
    stage = module()
    masters = [torch.ones(5).requires_grad_(), torch.ones(4).requires_grad_()]
    basic = stepped(masters, torch.optim.Adagrad)
    state = [[master, basic.state[master]["step"], basic.state[master]["sum"]] for master in masters]
    found = replicated(engine(stage, wrapped(kind, basic), basic))
    assert same(found, [*stage.parameters(), *state[0], *state[1]])


@pytest.mark.parametrize("kind", [BF16_Optimizer, DeepSpeedZeroOptimizer, type("Unknown", (), {})])
def test_partitions_exist_once_and_are_left_out(kind):
    stage = module()
    basic = stepped([torch.ones(5).requires_grad_()])
    assert same(replicated(engine(stage, wrapped(kind, basic), basic)), list(stage.parameters()))


def test_looking_makes_no_state():
    stage = module()
    adam = torch.optim.Adam(stage.parameters())
    assert same(replicated(engine(stage, adam, adam)), list(stage.parameters()))
    assert not adam.state


def test_an_optimizer_that_communicates_by_itself_may_hold_other_weights():
    stage = module()
    local = stepped(list(stage.parameters()))
    local.__class__ = type("ZeroOneAdam", (torch.optim.Adam,), {"__module__": "deepspeed.runtime.fp16.onebit.zoadam"})
    assert replicated(engine(stage, local, local)) == []
    assert replicated(engine(stage, wrapped(FP16_Optimizer, local), local)) == []
