"""What of a left-out column's buffers stays: what its stage's other replicas hold alike, as all of them computed it.

After a step in which columns are left out, the workers of a stage tell each other digests of what their modules hold
(``ForwardState.digests``), and a left-out worker does with each thing as they do:

    sound = the digest of more than half of those that took part, if they are two or more; else the digest that one that
            took part has with more than half of all replicas; else none

    sound and its own       it stays: a count of steps, a temperature that is annealed
    sound and another       it takes the value of one that took part, if that arrives as told: a count of batches
                            without NaN, of which it had one
    none                    it goes back: running statistics, which follow each replica's own data

One that stays behind in what the others hold alike would make other messages than they do for good. Above half of the
replicas no liar decides what is sound; and never those left out alone, whom one bad neighbour may have sent the same.

Worked example, three replicas, the last one left out, digests of three things:

    replica 0      7  1  4      took part
    replica 1      7  2  4      took part
    replica 2      7  3  5      left out: the first stays, the second goes back, the third is given by 0 or by 1

In a step that is skipped all replicas go back to where it began, and are alike in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.engine.buffers import NO_LAYOUT, UNMOVED, ForwardState
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.weights import tensors_digest
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.response.healing import heal


def sound(digests_RN: np.ndarray, took_part_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the replicas of a stage hold alike: int64 [N] digests, and bool [N], whether there is one.

    Args:
        digests_RN: int64 [R, N].
        took_part_R: bool [R], in this step.
    """
    same_RRN = digests_RN[:, None] == digests_RN[None]  # [of whom, as who, N]
    all_RN, within_RN = same_RRN.sum(1), same_RRN[:, took_part_R].sum(1)
    count = int(took_part_R.sum())
    # Those that took part go before all: of both majorities there may be one each.
    rank_RN = np.where((2 * within_RN > count) & (count > 1), 2, np.where(2 * all_RN > len(digests_RN), 1, 0))
    rank_RN[~took_part_R] = 0
    best_N = rank_RN.argmax(0)
    places = np.arange(digests_RN.shape[1])
    return digests_RN[best_N, places], rank_RN[best_N, places] > 0


@dataclass(frozen=True)
class Gift:
    """Replicas that were left out are to take one thing from a replica that took part."""

    index: int
    source: int
    receivers: tuple[int, ...]


def settle(took_part_R: np.ndarray, told_RN2: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray, tuple[Gift, ...]]:
    """What is sound, int64 [N]; what stays as it is, bool [R, N]; and what is given, for the replicas of one stage.

    Args:
        took_part_R: bool [R], in this step.
        told_RN2: int64 [R, N, 2], digests and layouts.
        step: takes turns among those who can give, since one may send something else.
    """
    digests_RN, layouts_RN = np.moveaxis(told_RN2, -1, 0)
    sound_N, known_N = sound(digests_RN, took_part_R)
    stays_RN = known_N & (digests_RN == sound_N)
    gifts = []
    wanting_RN = ~took_part_R[:, None] & known_N & ~stays_RN & (sound_N != UNMOVED)
    for index in np.flatnonzero(wanting_RN.any(0)).tolist():
        holders = np.flatnonzero(took_part_R & stays_RN[:, index])
        source = int(holders[step % len(holders)])
        fits_R = (layouts_RN[:, index] == layouts_RN[source, index]) & (layouts_RN[:, index] != NO_LAYOUT)
        if (receivers_R := wanting_RN[:, index] & fits_R).any():
            gifts.append(Gift(index, source, tuple(np.flatnonzero(receivers_R).tolist())))
    return sound_N, stays_RN, tuple(gifts)


class Alike:
    """Ends each step of one worker's ``ForwardState``.

    Args:
        state: of this worker.
        worker, ranks: this worker, and int [S, R], the global rank of each.
        control: gathers of all ranks.
        group: of the stage's replicas.
        device: what the group's backend sends from.
    """

    def __init__(
        self,
        state: ForwardState,
        worker: Worker,
        ranks: np.ndarray,
        control: Control,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._state, self._worker, self._ranks = state, worker, ranks
        self._control, self._group, self._device = control, group, device

    def words(self, left_out: bool) -> tuple[int, int, int]:
        """What every rank is to know of every other before ``end_step``: whether anything moved, and what there is.

        Args:
            left_out: some column may be, in this step.
        """
        moved = self._state.moved(thorough=left_out)
        return int(moved), *(self._state.listing if left_out else (0, 0))

    def end_step(self, took_part_SR: np.ndarray, words_SR: np.ndarray, step: int) -> None:
        """Let go back what has to. Collective where some columns are left out, and some not.

        Args:
            took_part_SR: bool [S, R], whose column takes part in this step.
            words_SR: int64 [S, R, 3], what all told by ``words``.
            step: the engine's global step.
        """
        counts = bool(took_part_SR[self._worker])
        if took_part_SR.all() or not took_part_SR.any() or not words_SR[..., 0].any():
            self._state.end_step(counts)
            return
        listings_SR2 = words_SR[..., 1:]
        same_SRR = (listings_SR2[:, :, None] == listings_SR2[:, None]).all(-1)
        usual_SR = 2 * same_SRR.sum(-1) > same_SRR.shape[1]
        most = int(np.where(usual_SR, listings_SR2[..., 0], 0).max())
        usual_R = usual_SR[self._worker.stage]
        told_RN2 = self._exchange(most, usual_R)
        if not usual_R[self._worker.replica]:
            self._state.end_step(counts)
            return
        self._settle(took_part_SR[self._worker.stage], told_RN2, step)

    def _exchange(self, most: int, usual_R: np.ndarray) -> np.ndarray:
        """int64 [R, N, 2]: what the replicas of this stage hold, with nothing alike where one lists other things."""
        own_R = -1 - np.arange(len(usual_R))
        mine = self._state.digests(int(own_R[self._worker.replica]))
        padded = torch.zeros(most, 2, dtype=torch.int64)
        if usual_R[self._worker.replica]:
            padded[: len(mine)] = mine
        said = self._control.all_gather(padded.flatten()).numpy()[self._ranks[self._worker.stage]]
        told_RN2 = said.reshape(len(said), most, 2)[:, : len(mine)]
        nothing_R12 = np.stack([own_R, np.full_like(own_R, NO_LAYOUT)], axis=-1)[:, None]
        return np.where(usual_R[:, None, None], told_RN2, nothing_R12)

    def _settle(self, took_part_R: np.ndarray, told_RN2: np.ndarray, step: int) -> None:
        sound_N, stays_RN, gifts = settle(took_part_R, told_RN2, step)
        given = {}
        for gift in gifts:
            if self._worker.replica in (gift.source, *gift.receivers):
                value = self._state.value(gift.index)
                source, *others = self._ranks[self._worker.stage, [gift.source, *gift.receivers]].tolist()
                heal([value], source, others, self._group, self._device)
                if int(tensors_digest([value], value.device)) == sound_N[gift.index]:
                    given[gift.index] = value
        stays = frozenset(np.flatnonzero(stays_RN[self._worker.replica]).tolist())
        self._state.end_step(bool(took_part_R[self._worker.replica]), stays, given)
