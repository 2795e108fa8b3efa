"""The outcome of a twin step (``proof.py``): what is true, who is proved, and what stays open."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.mesh import DIRECTIONS, Worker


@dataclass(frozen=True)
class Proof:
    """A worker whose work is not what its stage makes of the same input.

    Attributes:
        worker: whose.
        column: which it served.
        direction: of its messages; None where the accumulated gradients of its weights differ.
        micro_batches: which of its messages differ; empty for gradients.
        agreeing, compared: how many workers made the same of it, of how many that were given the same
            and run on the same kind of hardware.
        trusted: it is in the first or last stage and never convicted: suspect hardware.
    """

    worker: Worker
    column: int
    direction: int | None
    micro_batches: tuple[int, ...]
    agreeing: int
    compared: int
    trusted: bool

    def __str__(self) -> str:
        what = (
            "accumulated other gradients of its weights than"
            if self.direction is None
            else f"sent {DIRECTIONS[self.direction]} messages, micro-batches {list(self.micro_batches)}, that differ "
            "from those of"
        )
        return (
            f"PROVED: given the same micro-batches, {self.worker} {what} {self.agreeing} of {self.compared} workers of "
            f"its stage{', whose hardware is to be suspected' if self.trusted else ''}"
        )


@dataclass(frozen=True)
class Difference:
    """Workers of one stage that made different things of the same, without a majority that could tell who is wrong.

    Attributes:
        workers: who differ.
        columns: which they served.
        direction: of their messages; None where the accumulated gradients of their weights differ.
        as_received: they say the same, and the workers behind them say that they received different messages.
    """

    workers: tuple[Worker, ...]
    columns: tuple[int, ...]
    direction: int | None
    as_received: bool = False

    def __str__(self) -> str:
        what = "gradients of their weights" if self.direction is None else f"{DIRECTIONS[self.direction]} messages"
        workers = ", ".join(map(str, self.workers))
        if self.as_received:
            told = f"{workers} say that they made the same {what}, those behind them that they received different ones"
        elif len(self.workers) == 1:
            told = f"{workers} made other {what} than those of its stage that could be compared with it"
        else:
            told = f"{workers} made different {what}"
        return f"given the same micro-batches, {told}, and no majority tells who is wrong"


@dataclass(frozen=True)
class Trial:
    """The outcome of a twin step. Messages follow the axes [direction, link, column, micro-batch].

    Attributes:
        right: bool [2, L, C, M], messages that are the truth.
        wrong: bool [2, L, C, M], messages that are not, of the same input.
        undecided: bool [2, L, C, M], messages that differ without a truth, or by what they were made of.
        proofs, differences: in the order of stages.
        sound: bool [S, R], workers all of whose messages are right, and whose gradients are.
        same: bool [S, R], workers whose gradients are right to the last bit.
        unlike: bool [S], stages whose honest replicas differ: nothing of them is proved bit for bit.
        alike: bool [S], stages of which all that could be compared (two at least) made the same to the last bit.
        split: bool [S], stages of which what could be compared to the last bit was not all the same.
        spoilt: bool [C], columns that must not count: something in them is wrong or undecided, or it is not exact and
            that of others is.
        forged: bool [2, L, C, M], messages that their senders say are the truth and their receivers that they are not.
        differ: bool [S, R, R], which two workers of a stage made other things of the very same without a truth.
        inexact: workers of another kind of hardware that made other bits of the same, in the order of stages.
        open: bool [events, S, R], workers of which one at least is bad, and nobody can tell which.
        blind: some stage's replicas were in states of their own, so that not everything could be compared.
    """

    right: np.ndarray
    wrong: np.ndarray
    undecided: np.ndarray
    proofs: tuple[Proof, ...]
    differences: tuple[Difference, ...]
    sound: np.ndarray
    same: np.ndarray
    unlike: np.ndarray
    alike: np.ndarray
    split: np.ndarray
    spoilt: np.ndarray
    forged: np.ndarray
    differ: np.ndarray
    inexact: tuple[Worker, ...]
    open: np.ndarray
    blind: bool
