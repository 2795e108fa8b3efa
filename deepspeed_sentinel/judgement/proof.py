"""What a twin step proves.

In a twin step all columns are given the same micro-batches. Replicas of a stage hold the same weights, so what honest
ones send is the same to the last bit, forward and backward, and so are the gradients that they accumulate. A worker is
held against the others of its stage that were given the same as it was:

* A micro-batch's messages are taken in the order of its flow. On each link, among the columns whose messages have
  agreed so far, the truth is what a strict majority sent, and at least ``quorum`` workers that are not convicted: more
  than can be bad where fewer than half of each stage's workers are. Who sent another message is proved. What follows a
  difference is cascade and tells nothing about anybody.
* Both ends of a link must report the same digest. Else it is a dispute, and from there on that column is out.
* Accumulated gradients of weights never cross a link. They are compared in the same way, among the workers whose
  columns have agreed on every message that enters their stage, forward and backward.
* Without a truth the step says that workers differ and not who is wrong. Where more workers differ, each from each
  other, than can be bad, honest ones are among them: the stage's work is not the same bit for bit, and its replicas
  cannot be compared so.

Worked example, 4 stages x 3 replicas, one micro-batch, what crossed each link by column:

    forward   link 0   a a a    all agree
              link 1   b b c    two of three say b: worker (1, 2) is proved, column 2 is out from here on
              link 2   d d e    e came of c: cascade. d d are two, as many as the quorum: the truth
    backward  link 2   f f g    the last stage's gradients: column 2 is cascade
              link 1   h i j    of two columns each says something else: they differ, nobody is proved
    gradients stage 2  p p q    columns 0 and 1 agreed on link 1 forward and link 2 backward: p p is the truth
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.judgement.blame import by_link, chain_order
from deepspeed_sentinel.judgement.record import Tried
from deepspeed_sentinel.mesh import BACKWARD, DIRECTIONS, FORWARD, Mesh, Worker

_LEAST = 2  # one worker alone is no majority of anything


@dataclass(frozen=True)
class Proof:
    """A worker whose work is not what its stage makes of the same input.

    Attributes:
        worker: whose.
        column: which it served.
        direction: of its messages; None where the accumulated gradients of its weights differ.
        micro_batches: which of its messages differ; empty for gradients.
        agreeing, compared: how many workers made the same of it, of how many that were given the same.
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
    """

    workers: tuple[Worker, ...]
    columns: tuple[int, ...]
    direction: int | None

    def __str__(self) -> str:
        what = "gradients of their weights" if self.direction is None else f"{DIRECTIONS[self.direction]} messages"
        return (
            f"given the same micro-batches, {', '.join(map(str, self.workers))} made different {what}, and no majority "
            "tells who is wrong"
        )


@dataclass(frozen=True)
class Trial:
    """The outcome of a twin step. Messages follow the axes [direction, link, column, micro-batch].

    Attributes:
        right: bool [2, L, C, M], messages that are the truth.
        wrong: bool [2, L, C, M], messages that are not, of the same input.
        undecided: bool [2, L, C, M], messages that differ without a truth.
        proofs, differences: in the order of stages.
        sound: bool [S, R], workers all of whose messages are right, and whose gradients are.
        unlike: bool [S], stages whose honest replicas differ: nothing of them is proved bit for bit.
        spoilt: bool [C], columns that must not count: something in them is wrong or undecided.
    """

    right: np.ndarray
    wrong: np.ndarray
    undecided: np.ndarray
    proofs: tuple[Proof, ...]
    differences: tuple[Difference, ...]
    sound: np.ndarray
    unlike: np.ndarray
    spoilt: np.ndarray


@dataclass(frozen=True)
class _Vote:
    """What workers of one stage say on several questions; V values on M questions.

    Attributes:
        right, wrong, undecided: bool [C, M].
        agreeing, compared: int [M], workers behind the truth, and all that were asked.
        unlike: bool [M], more differ than can be bad.
    """

    right: np.ndarray
    wrong: np.ndarray
    undecided: np.ndarray
    agreeing: np.ndarray
    compared: np.ndarray
    unlike: np.ndarray


def try_twins(
    mesh: Mesh,
    digests: np.ndarray,
    disputed: np.ndarray,
    gradients: np.ndarray,
    served: np.ndarray,
    convicted: np.ndarray,
    given: np.ndarray,
) -> Trial:
    """Hold the workers of each stage against each other.

    Args:
        mesh: stages and replicas.
        digests: int64 [2, L, C, M, T], of every tensor of every message.
        disputed: bool [2, L, C, M], messages whose two ends report different things.
        gradients: int64 [S, R], of the gradients that each worker has accumulated; 0 is none.
        served: int [S, C], who served each column.
        convicted: bool [S, R], whose word does not count.
        given: bool [C], columns that were given the same micro-batches.
    """
    links, columns, messages = digests.shape[1:4]
    ordered_PCMT, disputed_PCM = chain_order(digests), chain_order(disputed)
    bad = np.maximum((mesh.replicas - 1) // 2 - np.count_nonzero(convicted, axis=1), 0)
    agreed = np.broadcast_to(given[:, None], (columns, messages))
    entered = np.zeros((mesh.stages, columns), bool)  # all that a stage's gradients are made of has agreed
    found = []
    for position, what_CMT in enumerate(ordered_PCMT):
        direction = FORWARD if position < links else BACKWARD
        link = position if direction == FORWARD else 2 * links - 1 - position
        stage = mesh.sender_stage(direction, link)
        asked = agreed & ~disputed_PCM[position]
        vote = _vote(what_CMT, asked, served[stage], convicted[stage], int(bad[stage]))
        agreed = asked & ~vote.wrong & ~vote.undecided & ~vote.unlike
        found.append((stage, direction, vote))
        if direction == BACKWARD or link == links - 1:
            entered[mesh.receiver_stage(direction, link)] = agreed.all(-1)
    right, wrong, undecided = (
        by_link(np.stack([getattr(vote, name) for _, _, vote in found])) for name in ("right", "wrong", "undecided")
    )
    proofs: list[Proof] = []
    differences: list[Difference] = []
    unlike = np.zeros(mesh.stages, bool)
    sound = np.ones((mesh.stages, mesh.replicas), bool)
    spoilt = np.asarray((wrong | undecided).any(axis=(0, 1, 3)))
    for stage in range(mesh.stages):
        alone = np.bincount(served[stage], minlength=mesh.replicas)[served[stage]] == 1
        asked = (entered[stage] & alone & (gradients[stage][served[stage]] != 0))[:, None]
        vote = _vote(
            gradients[stage][served[stage]][:, None, None], asked, served[stage], convicted[stage], int(bad[stage])
        )
        of_stage = [(direction, one) for at, direction, one in found if at == stage]
        told: list[tuple[int | None, _Vote]] = [*of_stage]
        if asked.any():
            told.append((None, vote))
        spoilt |= (vote.wrong | vote.undecided)[:, 0]
        for way, one in told:
            unlike[stage] |= bool(one.unlike.any())
            proofs += _proofs(mesh, stage, way, one, served[stage])
            differences += _differences(stage, way, one, served[stage])
            sound[stage, served[stage][~one.right.all(-1)]] = False
    idle = np.ones((mesh.stages, mesh.replicas), bool)
    np.put_along_axis(idle, served, False, axis=1)
    return Trial(right, wrong, undecided, tuple(proofs), tuple(differences), sound & ~idle, unlike, spoilt)


def tried(mesh: Mesh, trial: Trial | None, suspects: np.ndarray, otherwise: Collection[Worker]) -> Tried:
    """What a step has shown of workers beyond doubt, for the record.

    With two replicas no majority tells which of two that differ is wrong. Where one of them was in alarm by its own
    statistics, and the other was not, it is that one.

    Args:
        mesh: stages and replicas.
        trial: of a twin step, or None.
        suspects: bool [S, R], before it.
        otherwise: who was proved otherwise.
    """
    proved, sound = np.zeros_like(suspects), np.zeros_like(suspects)
    if trial:
        sound |= trial.sound
    differences = trial.differences if trial and mesh.replicas == 2 else ()
    accused = [[worker for worker in one.workers if suspects[worker]] for one in differences]
    found = [proof.worker for proof in trial.proofs] if trial else []
    for worker in (*found, *otherwise, *(one[0] for one in accused if len(one) == 1)):
        proved[worker] = True
    return Tried(proved, sound & ~proved, trial.unlike if trial else np.zeros(mesh.stages, bool))


def _vote(what_CMT: np.ndarray, asked: np.ndarray, served: np.ndarray, convicted: np.ndarray, bad: int) -> _Vote:
    """The truth on each question, if there is one.

    Args:
        what_CMT: int64 [C, M, T], what each says.
        asked: bool [C, M], who is asked.
        served: int [C], the replica that speaks for a column.
        convicted: bool [R], whose word does not count.
        bad: how many of the others can be bad.
    """
    columns, questions = asked.shape
    replicas, quorum = len(convicted), max(_LEAST, bad + 1)
    same = (what_CMT[:, None] == what_CMT[None]).all(-1) & asked[:, None] & asked[None]
    version = np.argmax(same, axis=1)  # the first column that says the same
    heard = asked & ~convicted[served][:, None]
    # A worker that serves several columns has one voice.
    voices = ((np.arange(questions) * columns + version) * replicas + served[:, None])[heard]
    votes_MC = np.bincount(np.unique(voices) // replicas, minlength=questions * columns).reshape(questions, columns)
    voters = np.bincount(
        np.unique(((np.arange(questions) * replicas) + served[:, None])[heard]) // replicas, minlength=questions
    )
    best = np.argmax(votes_MC, axis=1)
    agreeing = votes_MC[np.arange(questions), best]
    known = (agreeing >= quorum) & (2 * agreeing > voters)
    right = asked & known & (version == best)
    wrong = asked & known & (version != best)
    versions = np.count_nonzero(asked & (version == np.arange(columns)[:, None]), axis=0)
    unlike = ~known & (agreeing == 1) & (voters >= max(bad + 2, _LEAST + 1))
    undecided = asked & ~known & (versions > 1) & ~unlike
    return _Vote(right, wrong, undecided, agreeing, voters, unlike)


def _proofs(mesh: Mesh, stage: int, direction: int | None, vote: _Vote, served: np.ndarray) -> list[Proof]:
    return [
        Proof(
            worker=Worker(stage, int(served[column])),
            column=column,
            direction=direction,
            micro_batches=() if direction is None else tuple(np.flatnonzero(vote.wrong[column]).tolist()),
            agreeing=int(vote.agreeing[vote.wrong[column]].min()),
            compared=int(vote.compared[vote.wrong[column]].min()),
            trusted=mesh.is_trusted(stage),
        )
        for column in np.flatnonzero(vote.wrong.any(-1)).tolist()
    ]


def _differences(stage: int, direction: int | None, vote: _Vote, served: np.ndarray) -> list[Difference]:
    columns = np.flatnonzero(vote.undecided.any(-1)).tolist()
    if not columns:
        return []
    return [Difference(tuple(Worker(stage, int(served[column])) for column in columns), tuple(columns), direction)]
