"""Attacks that leave out the work of a stage and try to look as if it had been done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from deepspeed_sentinel.attacks.base import register
from deepspeed_sentinel.attacks.common import check_count, check_number, entered_like, normal_like, tokens
from deepspeed_sentinel.attacks.context import AttackContext, seeded

_BLOCK = 64
_TINY = 1e-30


@register("pass_through")
@dataclass(frozen=True)
class PassThrough:
    """The stage skips its work: what entered leaves unchanged."""

    uses_entered: ClassVar[bool] = True

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return entered_like(message, context)


@register("residual_mimic")
@dataclass(frozen=True)
class ResidualMimic:
    """What entered plus, for each token, a change of the right norm in a random direction."""

    uses_entered: ClassVar[bool] = True

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        entered_TD = tokens(entered_like(message, context)).float()
        norm_T1 = torch.linalg.vector_norm(tokens(message).float() - entered_TD, dim=1, keepdim=True)
        noise_TD = normal_like(entered_TD, context.generator)
        noise_TD /= torch.linalg.vector_norm(noise_TD, dim=1, keepdim=True)
        return (entered_TD + norm_T1 * noise_TD).reshape(message.shape).to(message.dtype)


@register("ema_mimic")
@dataclass(frozen=True)
class EmaMimic:
    """Wrong content with the honest mean, energy and covariance, hence nearly the honest projected quantiles.

    The deviations from the token mean are mixed over the tokens by a random rotation that keeps their sum:
    X' = 1 xbar + Q (X - 1 xbar) with Q orthogonal and Q 1 = 1, so mean and Gram matrix of the dimensions are the same.
    """

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        x_TD = tokens(message).float()
        mean_D = x_TD.mean(0)
        order_T = torch.randperm(len(x_TD), generator=context.generator)
        mixed_TD = torch.empty_like(x_TD)
        # In blocks of shuffled tokens: a rotation of all T tokens would cost T cubed.
        for part_B in order_T.split(_BLOCK):
            rotation_BB = _rotation_keeping_sums(len(part_B), context.generator).to(x_TD.device)
            rows_B = part_B.to(x_TD.device)
            mixed_TD[rows_B] = rotation_BB @ (x_TD[rows_B] - mean_D) + mean_D
        return mixed_TD.reshape(message.shape).to(message.dtype)


def _rotation_keeping_sums(size: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix Q with Q 1 = 1, float32 [size, size]: U diag(1, V) U^T, first column of U along 1."""
    spread = torch.randn(size, size, generator=generator, dtype=torch.float64)
    spread[:, 0] = 1.0
    basis = torch.linalg.qr(spread).Q
    inner = torch.eye(size, dtype=torch.float64)
    if size > 1:
        random = torch.randn(size - 1, size - 1, generator=generator, dtype=torch.float64)
        inner[1:, 1:] = torch.linalg.qr(random).Q
    return (basis @ inner @ basis.T).float()


@register("surrogate")
class Surrogate:
    """A network with one hidden layer of ``width``, trained online to imitate the stage, replaces it.

    It learns from what entered and left, ``passes`` gradient steps a message, in all steps before the attack begins
    and after: the strongest such attacker, since it then still knows the honest result.
    """

    uses_entered: ClassVar[bool] = True

    def __init__(self, width: int = 64, passes: int = 2, learning_rate: float = 3e-3) -> None:
        check_count("width", width)
        check_count("passes", passes)
        check_number("learning_rate", learning_rate, 0.0, 1.0)
        self.width, self.passes, self.learning_rate = width, passes, learning_rate
        self._pupils: dict[tuple[str, int, int], _Pupil] = {}

    def observe(self, message: torch.Tensor, context: AttackContext) -> None:
        """Learn from one honest message."""
        entered_TD = tokens(entered_like(message, context)).float()
        key = (context.direction, context.stage, context.replica)
        if key not in self._pupils:
            self._pupils[key] = _Pupil(self, entered_TD, seeded(context.seed, "surrogate", *key))
        self._pupils[key].learn(entered_TD, tokens(message).float(), self.passes)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        entered = entered_like(message, context)
        pupil = self._pupils.get((context.direction, context.stage, context.replica))
        if pupil is None:
            return entered
        return pupil.imitate(tokens(entered).float()).reshape(message.shape).to(message.dtype)


class _Pupil:
    """The surrogate of one worker in one direction: predicts the change of each token, in units of its usual size."""

    def __init__(self, settings: Surrogate, entered_TD: torch.Tensor, generator: torch.Generator) -> None:
        hidden, width = entered_TD.shape[1], settings.width
        # Without initialisation, which would draw from the generator that the attacked training draws from.
        layers = [nn.utils.skip_init(nn.Linear, *sizes) for sizes in ((hidden, width), (width, hidden))]
        for layer in layers:
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / layer.weight.shape[1] ** 0.5
            layer.bias.data.zero_()
        self._net = nn.Sequential(layers[0], nn.GELU(), layers[1]).to(entered_TD.device)
        self._optimizer = torch.optim.Adam(self._net.parameters(), lr=settings.learning_rate)
        self._change = 0.0

    def learn(self, entered_TD: torch.Tensor, left_TD: torch.Tensor, passes: int) -> None:
        change_TD = left_TD - entered_TD
        size = float(change_TD.square().mean().sqrt())
        if not 0.0 < size < float("inf"):
            return
        self._change = size if self._change == 0.0 else 0.9 * self._change + 0.1 * size
        for _ in range(passes):
            with torch.enable_grad():
                loss = (self._net(self._normal(entered_TD)) - change_TD / self._change).square().mean()
                self._optimizer.zero_grad()
                loss.backward()
            self._optimizer.step()

    def imitate(self, entered_TD: torch.Tensor) -> torch.Tensor:
        return entered_TD + self._change * self._net(self._normal(entered_TD))

    def _normal(self, entered_TD: torch.Tensor) -> torch.Tensor:
        return entered_TD / (entered_TD.square().mean().sqrt() + _TINY)
