"""What the neighbours of a stage keep of a step, so that a trusted worker can look again at what they report of it.

Of the messages that enter and leave stage s, its two neighbours keep those of one micro-batch, whole, in both
directions. They draw it from their secret, so stage s cannot know which. If an audit asks, each testifies: the
messages, the seeds of their sketches, and what the two have learnt of the stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepspeed_sentinel.evidence.parts import Layout, parts_of
from deepspeed_sentinel.evidence.probe import End, Probe
from deepspeed_sentinel.evidence.sketch import sketches_of
from deepspeed_sentinel.evidence.statement import Statement, check_kinds, kinds_of
from deepspeed_sentinel.evidence.transfer import Sketches
from deepspeed_sentinel.mesh import Mesh

# An auditor takes statements of so many times the size of its own messages, or of so many bytes: stages may differ in
# width and number of tokens, but a stranger must not choose how much memory is taken.
_TIMES, _FREE_BYTES = 8, 1 << 26


class Keeping:
    """Copies of the chosen messages of one worker, until the next step begins."""

    def __init__(self) -> None:
        self._chosen: dict[End, int] = {}
        self._kept: dict[End, tuple[torch.Tensor, ...]] = {}
        self._largest = 0

    @property
    def most_bytes(self) -> int:
        """How large a message to take of others, after what this worker has seen itself."""
        return max(_TIMES * self._largest, _FREE_BYTES)

    def begin_step(self, chosen: Mapping[End, int]) -> None:
        """``chosen``: per end the micro-batch to keep."""
        self._chosen = dict(chosen)
        self._kept = {}

    def observe(self, end: End, micro_batch: int, tensors: Sequence[torch.Tensor]) -> None:
        """Copy a message's tensors if it is the chosen one. Nothing waits for the device.

        Raises:
            ValueError: see ``check_kinds``.
        """
        self._largest = max(self._largest, sum(tensor.nbytes for tensor in tensors))
        if self._chosen.get(end) == micro_batch:
            check_kinds(kinds_of(tensors))
            self._kept[end] = tuple(tensor.detach().clone() for tensor in tensors)

    def kept(self, end: End) -> tuple[int, tuple[torch.Tensor, ...]]:
        """The micro-batch and its tensors as observed; no tensors, if it could not be kept."""
        return self._chosen[end], self._kept.get(end, ())


@dataclass(frozen=True)
class SecondLook:
    """A kept message, observed anew.

    Attributes:
        digests: int64 [T], as in ``Evidence.digests``.
        sketches: the secret ones of each part, float32 [2, 1, TOKENS, K], FRESH and LASTING.
        tokens: of each part, how many the message has, 0 where it is not judged; so many of a sketch's tokens are
            filled.
    """

    digests: np.ndarray
    sketches: tuple[Sketches, ...]
    tokens: tuple[int, ...]


def look_again(
    statement: Statement, end: End, stage: int, mesh: Mesh, layout: Layout, device: torch.device
) -> SecondLook | None:
    """Observe a kept message as the witness at ``stage`` did; None if there is nothing in it to observe.

    Args:
        statement: of that witness.
        end: at which it observed the message.
        layout: what messages are made of.
    """
    if not any(statement.tensors[index].numel() for index in parts_of(statement.tensors)):
        return None
    probe = Probe(mesh, stage, device, seed=0)
    probe.adopt(layout)
    sample, *projections = statement.seeds
    # The probe wants a public sketch before the secret ones, and nobody looks at it.
    seeds = [[sample, sample], *([sample, projection] for projection in projections)]
    probe.begin_step(1, {end: torch.tensor(seeds, dtype=torch.int64, device=device)})
    probe.observe(end, probe.next_micro_batch(end), statement.tensors)
    words_T2 = np.ascontiguousarray(probe.digests(end)[0].cpu().numpy())
    digests_T = layout.mark(words_T2.view(np.int64)[..., 0], end[0], probe.link(end))
    sketches = sketches_of(probe, end)
    parts = range(layout.parts)
    return SecondLook(
        digests_T,
        tuple(sketches.of(part) for part in parts),
        tuple(probe.tokens(end, part)[0] for part in parts),
    )
