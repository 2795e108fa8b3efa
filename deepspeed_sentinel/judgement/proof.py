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

from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.judgement.blame import by_link, chain_order
from deepspeed_sentinel.judgement.record import Tried
from deepspeed_sentinel.judgement.trial import Difference, Proof, Trial
from deepspeed_sentinel.judgement.vote import LEAST, Vote, Voters
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker, workers_of

_MOST_EVENTS = 64  # of one step; what is left out comes again if it lasts


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
    isolated: np.ndarray | None = None,
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
        isolated: bool [S, R], whose word on what they received does not count either, nor that of those to whom they
            sent; None is nobody.
    """
    voters = [
        Voters.of(mesh, twins.kinds[stage], served[stage], convicted[stage], suspects[stage], bool(unlike[stage]))
        for stage in range(mesh.stages)
    ]
    unshared = _of_unlike_states(twins, mesh.stages)
    silent = convicted if isolated is None else convicted | isolated
    word = ~np.take_along_axis(silent, served, 1)
    messages = _Messages.vote(mesh, voters, digests, measures, disputed, unshared, twins.given, keyed, word)
    told: list[tuple[int, int | None, Vote]] = [*messages.votes]
    for stage, workers in enumerate(served):
        asked = messages.entered[stage] & ~unshared[stage]
        if asked.any():
            vote = voters[stage].vote(
                twins.gradients[stage][workers, None, None],
                np.zeros((len(workers), 1), np.int64),  # they reach nobody
                twins.norms[stage][None, workers, None, None],
                asked[:, None],
                messages.entered_exact[stage][:, None],
                word[stage],
            )
            told.append((stage, None, vote))
    lost = disputed.any(axis=(0, 1, 3)) | ~twins.given
    trial = _trial(mesh, told, served, lost, unlike, blind=bool(unshared.any()))
    refuted = _refuted(mesh, trial, convicted) & ~unlike
    if not refuted.any():
        return trial
    evidence = (digests, measures, disputed, twins, served, convicted, suspects)
    trial = try_twins(mesh, *evidence, unlike | refuted, keyed, isolated)
    return replace(trial, unlike=trial.unlike | refuted)


@dataclass(frozen=True)
class _Messages:
    """What was voted on messages.

    Attributes:
        votes: the stage of the senders, the direction and the vote of each, in the order of the flow.
        entered: bool [S, C], whether all that a stage's gradients are made of has agreed.
        entered_exact: the same, to the last bit.
    """

    votes: list[tuple[int, int, Vote]]
    entered: np.ndarray
    entered_exact: np.ndarray

    @classmethod
    def vote(
        cls,
        mesh: Mesh,
        voters: list[Voters],
        digests: np.ndarray,
        measures: np.ndarray,
        disputed: np.ndarray,
        unshared: np.ndarray,
        given: np.ndarray,
        keyed: np.ndarray | None,
        word: np.ndarray,
    ) -> _Messages:
        """Follow the micro-batches. Arguments as of ``try_twins``; of stages that are ``unshared``, bool [S], nobody is
        asked, and where ``word``, bool [S, C], is false nobody's word on what was received counts."""
        links, columns, messages = digests.shape[1:4]
        digests_PCMT, disputed_PCM = chain_order(digests), chain_order(disputed)
        keyed_PCM = np.zeros(disputed_PCM.shape, np.int64) if keyed is None else chain_order(keyed)
        measures_PECMN = np.stack([chain_order(of_end) for of_end in measures], axis=1)
        agreed = exact = np.broadcast_to(given[:, None], (columns, messages))
        entered, entered_exact = (np.zeros((mesh.stages, columns), bool) for _ in range(2))
        votes: list[tuple[int, int, Vote]] = []
        for position in range(2 * links):
            direction = FORWARD if position < links else BACKWARD
            link = position if direction == FORWARD else 2 * links - 1 - position
            stage, receiver = mesh.sender_stage(direction, link), mesh.receiver_stage(direction, link)
            asked = agreed & ~disputed_PCM[position] & ~unshared[stage]
            vote = voters[stage].vote(
                digests_PCMT[position],
                keyed_PCM[position],
                measures_PECMN[position],
                asked,
                exact,
                word[stage] & word[receiver],
            )
            agreed = asked & ~(vote.wrong | vote.undecided | vote.cascade | vote.unlike | vote.forged | vote.unclear)
            exact = agreed & vote.exact
            votes.append((stage, direction, vote))
            if direction == BACKWARD or link == links - 1:
                entered[receiver], entered_exact[receiver] = agreed.all(-1), exact.all(-1)
        return cls(votes, entered, entered_exact)


def _trial(
    mesh: Mesh,
    told: list[tuple[int, int | None, Vote]],
    served: np.ndarray,
    lost: np.ndarray,
    known_unlike: np.ndarray,
    blind: bool,
) -> Trial:
    """What votes come to.

    Args:
        mesh: stages and replicas.
        told: of messages in the order of their flow, then of gradients.
        served: int [S, C], who served each column.
        lost: bool [C], columns that are in dispute or were given something else.
        known_unlike: bool [S], stages that are known not to make the same of the same.
        blind: not everything could be compared.
    """
    right, wrong, undecided, cascade, forged, unclear = (
        by_link(np.stack([getattr(vote, name) for _, way, vote in told if way is not None]))
        for name in ("right", "wrong", "undecided", "cascade", "forged", "unclear")
    )
    undecided = undecided | cascade | unclear
    proofs: list[Proof] = []
    differences: list[Difference] = []
    events: list[tuple[int | None, np.ndarray]] = []
    rounds = np.zeros(served.shape, bool)
    once = np.arange(len(lost))[:, None] <= np.arange(len(lost))
    unlike, split = np.zeros(mesh.stages, bool), np.zeros(mesh.stages, bool)
    differ = np.zeros((mesh.stages, mesh.replicas, mesh.replicas), bool)
    sound, same = np.ones((mesh.stages, mesh.replicas), bool), np.zeros((mesh.stages, mesh.replicas), bool)
    spoilt = np.asarray((wrong | undecided | forged).any(axis=(0, 1, 3)))
    inexact = np.zeros(len(lost), bool)
    for stage, way, vote in sorted(told, key=lambda one: one[0]):
        workers = served[stage]
        unlike[stage] |= bool(vote.unlike.any())
        split[stage] |= bool(vote.split.any())
        differ[stage][np.ix_(workers, workers)] |= vote.differ
        events += [(stage, _between(stage, way, pair, served)) for pair in np.argwhere(vote.open & once)]
        events += [(None, _between(None, way, pair, served)) for pair in np.argwhere(vote.wide & once)]
        inexact |= vote.near.any(-1)
        rounds[stage, workers[vote.inexact]] = True
        proofs += _proofs(mesh, stage, way, vote, workers)
        differences += _differences(stage, way, vote, workers)
        right_by_others = vote.right
        if way is None:
            spoilt |= (vote.wrong | vote.undecided | vote.cascade)[:, 0]
            same[stage, workers] = (vote.right & vote.exact)[:, 0]
            right_by_others = vote.right & ~vote.near  # a norm is the worker's own word
        sound[stage, workers[~right_by_others.all(-1)]] = False
    if np.count_nonzero(~(spoilt | lost | inexact)) >= LEAST:
        spoilt = spoilt | inexact
    # Where a stage's work is not the same by nature, what comes of it may lie apart and nobody be bad.
    told_of = [event for at, event in events if not (unlike[at] if at is not None else (unlike | known_unlike).any())]
    return Trial(
        right=right,
        wrong=wrong,
        undecided=undecided,
        proofs=tuple(proofs),
        differences=tuple(differences),
        sound=sound,
        same=same,
        unlike=unlike,
        alike=~split & (np.count_nonzero(sound & same, axis=1) >= LEAST),
        split=split,
        spoilt=spoilt,
        forged=forged,
        differ=differ,
        inexact=workers_of(rounds),
        open=np.array(told_of[:_MOST_EVENTS], bool).reshape(-1, *served.shape),
        blind=blind,
    )


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
    unlike, alike, split = (trial.unlike, trial.alike, trial.split) if trial else (nothing, nothing, nothing)
    return Tried(proved, sound, unlike, alike, split, held=trial is not None, blind=trial is not None and trial.blind)


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


def _between(stage: int | None, direction: int | None, columns: np.ndarray, served: np.ndarray) -> np.ndarray:
    """bool [S, R], who made what some columns (their numbers) have, and whom it reached; of None all who serve them."""
    workers = np.zeros(served.shape, bool)
    of: Iterable[int] = range(len(served))
    if stage is not None:
        of = {stage} if direction is None else {stage, stage + 1 if direction == FORWARD else stage - 1}
    for one in of:
        workers[one, served[one, columns]] = True
    return workers


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
