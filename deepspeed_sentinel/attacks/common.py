"""What the attacks share: checks of their arguments, and random draws that repeat.

Dimension key: T tokens (all leading dimensions of a message flattened), D hidden size.
"""

from __future__ import annotations

import math

import torch

from deepspeed_sentinel.attacks.context import AttackContext


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")


def check_count(name: str, value: object, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number from {low}, got {value!r}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def uniform_like(message: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 draws from [0, 1), drawn on the CPU so that every device gets the same."""
    return torch.rand(message.shape, generator=generator).to(message.device)


def normal_like(message: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 standard normal draws, drawn on the CPU so that every device gets the same."""
    return torch.randn(message.shape, generator=generator).to(message.device)


def tokens(message: torch.Tensor) -> torch.Tensor:
    """The message as x_TD."""
    return message.reshape(-1, message.shape[-1]) if message.dim() > 1 else message.reshape(-1, 1)


def flip_bit(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A contiguous copy with one random bit of one random element inverted."""
    flipped = tensor.clone(memory_format=torch.contiguous_format)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    width = 8 * tensor.element_size()
    element = int(torch.randint(tensor.numel(), (), generator=generator))
    bit = int(torch.randint(width, (), generator=generator))
    mask = 1 << bit if bit < width - 1 else -(1 << bit)
    flipped.view(-1).view(bits)[element] ^= mask
    return flipped


def entered_like(message: torch.Tensor, context: AttackContext) -> torch.Tensor:
    """What entered the stage, where it has the message's shape.

    Raises:
        ValueError: nothing entered, or something of another shape.
    """
    entered = context.entered
    if entered is None:
        raise ValueError(f"nothing enters stage {context.stage} in {context.direction} direction; choose another stage")
    if entered.shape != message.shape:
        raise ValueError(
            f"what entered has shape {tuple(entered.shape)}, what leaves {tuple(message.shape)}: this attack needs a "
            "stage that keeps the shape"
        )
    return entered.to(message.dtype)
