"""What a twin step proves.

In a twin step all columns are given the same micro-batches. Replicas of a stage hold the same weights, so what honest
ones send is the same to the last bit, forward and backward, and so are the gradients that they accumulate. A worker is
held against the others of its stage that were given the same as it was:

* A micro-batch's messages are taken in the order of its flow. On each link, among the columns whose messages have
  agreed so far, the truth is what a strict majority sent of those that are not convicted, and ``quorum`` workers:
  more than can be bad where fewer than half of each stage's R are. Convictions do not lower it, since who is convicted
  may be honest by now. Who sent another message is proved. What follows a difference is cascade and tells nothing about
  anybody.
* Both ends of a link must report the same digest. Else it is a dispute, and from there on that column is out.
* What both ends report has public weights, so a sender can make up a message with the honest one's digest. Receivers
  report another digest beside it, under a key that no sender knows. Among columns that say the same, what most of these
  say is believed, and ``quorum`` of them; where one says otherwise the sender has made the message up, or the receiver
  lies. That is a dispute between the two as well: nobody is proved by it, and who is given the message is not tested.
* Accumulated gradients of weights never cross a link. They are compared in the same way, among the workers whose
  columns have agreed on every message that enters their stage, forward and backward.
* Workers on unlike hardware round differently. A worker that says it runs on another kind than most of its stage, and
  whoever is given what it sent, is held against the truth by statistics. Apart by more than 2^-7 it is proved,
  if it was given the truth to the last bit; what is near may still be anything, so who is given that is never proved.
  In any case such a column is left out as long as two exact ones remain: all have the same data, so nothing is lost.
  And who claims a kind of its own blinds nobody to the others. Of gradients its word alone clears nobody.
* Modules may keep a state that forward passes change (running maxima, router biases). Before the step a stage's
  replicas are brought into the state that more than half of them are in (``engine/shared_state.py``), so everybody is
  held to what these make. Where no more than half are in one state, it is each one's own by nature: that stage is not
  compared, nor is what is made of its work. Then strikes count, of all, since nobody is compared whole.
* Without a truth, workers on unlike hardware are held against the median of all by statistics; if some do not fit,
  those that are near are believed where they are more than can be bad.
* Without a truth the step says that workers differ and not who is wrong. Of those, who is suspected by its own
  statistics is left out alone, if the others agree; with two replicas it is the one that is wrong, if the two are
  apart by more than rounding.
* Where so few workers agree that the others are more than can be bad, honest ones are among those: the stage's work is
  not the same bit for bit, and its replicas cannot be compared so. Where each makes something else, nobody is left out
  for it. Where some agree they are out once, since half of a stage may have been bribed. Where that is known of a
  stage, nobody is out for differing without a truth, and who differs from a truth is held to it by statistics, as
  unlike hardware is: what differs now and then by nature makes a majority and an odd one as well. So it is where more
  workers would be proved in one step than can be bad. It takes many twin steps without a difference until such a stage
  is compared to the last bit again.

Worked example, 4 stages x 3 replicas, one micro-batch, what crossed each link by column:

    forward   link 0   a a a    all agree
              link 1   b b c    two of three say b: worker (1, 2) is proved, column 2 is out from here on
              link 2   d d e    e came of c: cascade. d d are two, as many as the quorum: the truth
    backward  link 2   f f g    the last stage's gradients: column 2 is cascade
              link 1   h i j    of two columns each says something else: they differ, nobody is proved
    gradients stage 2  p p q    columns 0 and 1 agreed on link 1 forward and link 2 backward: p p is the truth
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np

from deepspeed_sentinel.evidence.table import Twins
from deepspeed_sentinel.judgement.blame import by_link, chain_order
from deepspeed_sentinel.judgement.record import Tried
from deepspeed_sentinel.judgement.vote import LEAST, Vote, Voters
from deepspeed_sentinel.mesh import BACKWARD, DIRECTIONS, FORWARD, Mesh, Worker


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
        return "given the same micro-batches, " + (
            f"{workers} say that they made the same {what}, those behind them that they received different ones, and "
            "no majority tells who is wrong"
            if self.as_received
            else f"{workers} made different {what}, and no majority tells who is wrong"
        )


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
        spoilt: bool [C], columns that must not count: something in them is wrong or undecided, or it is not exact and
            that of others is.
        forged: bool [2, L, C, M], messages that their senders say are the truth and their receivers that they are not.
        differ: bool [S, R, R], which two workers of a stage made other things of the very same without a truth.
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
    spoilt: np.ndarray
    forged: np.ndarray
    differ: np.ndarray
    blind: bool


def try_twins(
    mesh: Mesh,
    digests: np.ndarray,
    measures: np.ndarray,
    disputed: np.ndarray,
    twins: Twins,
    served: np.ndarray,
    convicted: np.ndarray,
    suspects: np.ndarray,
    unlike: np.ndarray,
    keyed: np.ndarray | None = None,
) -> Trial:
    """Hold the workers of each stage against each other.

    Args:
        mesh: stages and replicas.
        digests: int64 [2, L, C, M, T], of every tensor of every message.
        measures: float [2 ends, 2, L, C, M, N], statistics of every message by which unlike hardware is held to the
            truth, as both its ends report them.
        disputed: bool [2, L, C, M], messages whose two ends report different things.
        twins: what else is known of the step.
        served: int [S, C], who served each column.
        convicted: bool [S, R], whose word does not count.
        suspects: bool [S, R], before this step.
        unlike: bool [S], stages that are known not to make the same of the same.
        keyed: int64 [2, L, C, M], of every message as received, as in ``Evidence``; None where nobody has keys.
    """
    links, columns, messages = digests.shape[1:4]
    digests_PCMT, disputed_PCM = chain_order(digests), chain_order(disputed)
    keyed_PCM = np.zeros(disputed_PCM.shape, np.int64) if keyed is None else chain_order(keyed)
    measures_PECMN = np.stack([chain_order(of_end) for of_end in measures], axis=1)
    stages = [
        Voters.of(mesh, twins.kinds[stage], served[stage], convicted[stage], suspects[stage], bool(unlike[stage]))
        for stage in range(mesh.stages)
    ]
    unshared = _of_unlike_states(twins, mesh.stages)
    agreed = exact = np.broadcast_to(twins.given[:, None], (columns, messages))
    # Whether all that a stage's gradients are made of has agreed, and to the last bit.
    entered, entered_exact = (np.zeros((mesh.stages, columns), bool) for _ in range(2))
    found: list[tuple[int, int, Vote]] = []
    for position in range(2 * links):
        direction = FORWARD if position < links else BACKWARD
        link = position if direction == FORWARD else 2 * links - 1 - position
        stage, receiver = mesh.sender_stage(direction, link), mesh.receiver_stage(direction, link)
        asked = agreed & ~disputed_PCM[position] & ~unshared[stage]
        vote = stages[stage].vote(digests_PCMT[position], keyed_PCM[position], measures_PECMN[position], asked, exact)
        agreed = asked & ~(vote.wrong | vote.undecided | vote.cascade | vote.unlike | vote.forged | vote.unclear)
        exact = agreed & vote.exact
        found.append((stage, direction, vote))
        if direction == BACKWARD or link == links - 1:
            entered[receiver], entered_exact[receiver] = agreed.all(-1), exact.all(-1)
    right, wrong, undecided, cascade, forged, unclear = (
        by_link(np.stack([getattr(vote, name) for _, _, vote in found]))
        for name in ("right", "wrong", "undecided", "cascade", "forged", "unclear")
    )
    undecided = undecided | cascade | unclear
    proofs: list[Proof] = []
    differences: list[Difference] = []
    found_unlike, split = np.zeros(mesh.stages, bool), np.zeros(mesh.stages, bool)
    differ = np.zeros((mesh.stages, mesh.replicas, mesh.replicas), bool)
    sound, same = np.ones((mesh.stages, mesh.replicas), bool), np.zeros((mesh.stages, mesh.replicas), bool)
    spoilt = np.asarray((wrong | undecided | forged).any(axis=(0, 1, 3)))
    inexact = np.zeros(columns, bool)
    for stage, workers in enumerate(served):
        told: list[tuple[int | None, Vote]] = [(direction, vote) for at, direction, vote in found if at == stage]
        gradients, norms = twins.gradients[stage][workers], twins.norms[stage][workers]
        asked = entered[stage] & ~unshared[stage]
        if asked.any():
            vote = stages[stage].vote(
                gradients[:, None, None],
                np.zeros((columns, 1), np.int64),  # they reach nobody
                norms[None, :, None, None],
                asked[:, None],
                entered_exact[stage][:, None],
            )
            spoilt |= (vote.wrong | vote.undecided | vote.cascade)[:, 0]
            same[stage, workers] = (vote.right & vote.exact)[:, 0]
            told.append((None, vote))
        for way, one in told:
            found_unlike[stage] |= bool(one.unlike.any())
            split[stage] |= bool(one.split.any())
            differ[stage][np.ix_(workers, workers)] |= one.differ
            inexact |= one.near.any(-1)
            proofs += _proofs(mesh, stage, way, one, workers)
            differences += _differences(stage, way, one, workers)
            # A norm is the worker's own word.
            right_by_others = one.right if way is not None else one.right & ~one.near
            sound[stage, workers[~right_by_others.all(-1)]] = False
    lost = spoilt | disputed.any(axis=(0, 1, 3)) | ~twins.given
    if np.count_nonzero(~lost & ~inexact) >= LEAST:
        spoilt = spoilt | inexact
    trial = Trial(
        right,
        wrong,
        undecided,
        tuple(proofs),
        tuple(differences),
        sound,
        same,
        found_unlike,
        ~split & (np.count_nonzero(sound & same, axis=1) >= LEAST),
        spoilt,
        forged,
        differ,
        bool(unshared.any()),
    )
    refuted = _refuted(mesh, trial, convicted) & ~unlike
    if not refuted.any():
        return trial
    evidence = (digests, measures, disputed, twins, served, convicted, suspects)
    trial = try_twins(mesh, *evidence, unlike | refuted, keyed)
    return replace(trial, unlike=trial.unlike | refuted)


def tried(mesh: Mesh, trial: Trial | None, otherwise: Collection[Worker]) -> Tried:
    """What a step has shown of workers beyond doubt, for the record.

    Args:
        mesh: stages and replicas.
        trial: of a twin step, or None.
        otherwise: who was proved otherwise.
    """
    proved = _marked(mesh, (*(proof.worker for proof in (trial.proofs if trial else ())), *otherwise))
    sound = trial.sound & ~proved if trial else np.zeros_like(proved)
    nothing = np.zeros(mesh.stages, bool)
    unlike, alike = (trial.unlike, trial.alike) if trial else (nothing, nothing)
    return Tried(proved, sound, unlike, alike, held=trial is not None, blind=trial is not None and trial.blind)


def _refuted(mesh: Mesh, trial: Trial, convicted: np.ndarray) -> np.ndarray:
    """bool [S], stages of which somebody would be proved although honest ones differ: by what the same step shows
    otherwise, or since more would be proved than can be bad."""
    proved = _marked(mesh, (proof.worker for proof in trial.proofs))
    # of two replicas one is named by its own statistics
    too_many = (np.count_nonzero(proved & ~convicted, axis=1) > (mesh.replicas - 1) // 2) & (mesh.replicas > LEAST)
    return too_many | (trial.unlike & proved.any(1))


def _marked(mesh: Mesh, workers: Iterable[Worker]) -> np.ndarray:
    """bool [S, R], true where these are."""
    marked = np.zeros((mesh.stages, mesh.replicas), bool)
    for worker in workers:
        marked[worker] = True
    return marked


def _of_unlike_states(twins: Twins, stages: int) -> np.ndarray:
    """bool [S], stages of which no more than half of the replicas tell of one state that is that of all."""
    if twins.states is None:
        return np.zeros(stages, bool)
    most = [np.unique(states[states != 0], return_counts=True)[1].max(initial=0) for states in twins.states]
    return 2 * np.array(most) <= twins.states.shape[1]


def _proofs(mesh: Mesh, stage: int, direction: int | None, vote: Vote, served: np.ndarray) -> list[Proof]:
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


def _differences(stage: int, direction: int | None, vote: Vote, served: np.ndarray) -> list[Difference]:
    found = []
    for differ, as_received in ((vote.undecided, False), (vote.unclear, True)):
        columns = np.flatnonzero(differ.any(-1)).tolist()
        if columns:
            workers = tuple(Worker(stage, int(served[column])) for column in columns)
            found.append(Difference(workers, tuple(columns), direction, as_received))
    return found
