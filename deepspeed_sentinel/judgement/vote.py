"""What workers of one stage say on several questions, and what is true of it; ``proof.py`` has the rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.judgement.robust import median
from deepspeed_sentinel.mesh import Mesh

# Of a statistic, relative: bf16 rounds elements by 2^-9, and a largest one may differ by twice that.
ROUNDING = 2.0**-7
LEAST = 2  # one worker alone is no majority of anything
_TINY, _LARGEST = float(np.finfo(np.float32).tiny), 1e300


@dataclass(frozen=True)
class Vote:
    """What workers of one stage say on several questions, [M].

    Attributes:
        right, wrong, undecided: bool [C, M].
        cascade: bool [C, M], those that may differ by what they were made of.
        exact: bool [C, M], those that are right to the last bit.
        near: bool [C, M], those that could be held to the truth by statistics alone.
        agreeing, compared: int [M], workers behind the truth, and all that were asked.
        unlike: bool [M], honest ones differ: too few say the same for all others to be bad.
        split: bool [M], of those that could be compared to the last bit, and whose word counts, not all say the same.
        forged: bool [C, M], those that say the same as the truth, and by whom it reached is something else: the sender
            has made it up or the receiver lies, and of these two one is bad.
        unclear: bool [C, M], those that say the same, while those whom it reached do not, without a majority.
        differ: bool [C, C], which two made other things of the very same without a truth.
        open: bool [C, C], pairs of columns of whose senders, and those whom they reached, one at least is bad, where it
            is not known who made other things; of one column with itself if it is these two.
        wide: bool [C, C], pairs that are apart, and who is bad may be anybody that served the two, since not both were
            given the very same.
        inexact: bool [C], who runs on another kind of hardware and made other bits of the very same than the truth.
    """

    right: np.ndarray
    wrong: np.ndarray
    undecided: np.ndarray
    cascade: np.ndarray
    exact: np.ndarray
    near: np.ndarray
    agreeing: np.ndarray
    compared: np.ndarray
    unlike: np.ndarray
    split: np.ndarray
    forged: np.ndarray
    unclear: np.ndarray
    differ: np.ndarray
    open: np.ndarray
    wide: np.ndarray
    inexact: np.ndarray


@dataclass(frozen=True)
class Voters:
    """Who speaks for the columns of a stage.

    Attributes:
        heard: bool [C], whose word counts.
        alike: bool [C], who runs on the kind of hardware that most do.
        accused: bool [C], who is suspected or convicted.
        of_two: there are two replicas, so that who is accused is wrong where they are apart.
        bad: how many of the stage's workers can be bad.
        unlike: its work is known not to be the same bit for bit, so that who says another thing than most is held
            to it by statistics.
    """

    heard: np.ndarray
    alike: np.ndarray
    accused: np.ndarray
    of_two: bool
    bad: int
    unlike: bool

    @classmethod
    def of(
        cls,
        mesh: Mesh,
        kinds: np.ndarray,
        served: np.ndarray,
        convicted: np.ndarray,
        suspects: np.ndarray,
        unlike: bool,
    ) -> Voters:
        """``kinds`` int64 [R], ``served`` int [C], ``convicted`` and ``suspects`` bool [R]."""
        known, count = np.unique(kinds, return_counts=True)
        alike = kinds[served] == known[np.argmax(count)]
        accused = (convicted | suspects)[served]
        return cls(~convicted[served], alike, accused, mesh.replicas == 2, (mesh.replicas - 1) // 2, unlike)

    def _voices(self, of_CM: np.ndarray, said_CM: np.ndarray | int = 0, most: int = 1) -> np.ndarray:
        """How many of those whose word counts say each of ``most`` things of each question, int [M, most]."""
        questions = of_CM.shape[1]
        answers = np.broadcast_to(np.arange(questions) * most + said_CM, of_CM.shape)
        counts = np.bincount(answers[of_CM & self.heard[:, None]], minlength=questions * most)
        return counts.reshape(questions, most)

    def _count(self, version: np.ndarray, of_CM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of versions [C, M]: the one that most say, how many say it, and how many say anything; int [M] each."""
        votes_MC = self._voices(of_CM, version, len(version))
        return np.argmax(votes_MC, axis=1), votes_MC.max(1), self._voices(of_CM)[:, 0]

    def vote(
        self,
        what_CMT: np.ndarray,
        keyed_CM: np.ndarray,
        measures_ECMN: np.ndarray,
        asked: np.ndarray,
        exact: np.ndarray,
        word: np.ndarray,
    ) -> Vote:
        """The truth on each question, if there is one.

        Args:
            what_CMT: int64 [C, M, T], what each says.
            keyed_CM: int64 [C, M], what they say whom it reached, which nobody who says the same could have made up.
            measures_ECMN: float [ends, C, M, N], statistics of it, as each end reports them: one alone accuses nobody.
            asked: bool [C, M], who is asked.
            exact: bool [C, M], who was given the same as most to the last bit.
            word: bool [C], where neither who says it nor whom it reached is convicted or isolated.
        """
        columns, quorum = len(asked), max(LEAST, self.bad + 1)
        compared = asked & exact & self.alike[:, None]
        same = (what_CMT[:, None] == what_CMT[None]).all(-1) & asked[:, None] & compared[None]
        version = _version(same)
        best, agreeing, voters = self._count(version, compared)
        known = (agreeing >= quorum) & (2 * agreeing > voters)
        true = asked & known & (version == best)
        near = asked & ~true & (~compared | (known & self.unlike))
        apart_ECM = _apart(measures_ECMN, true, asked) > ROUNDING
        apart, together = apart_ECM.all(0), ~apart_ECM.any(0)
        versions = np.count_nonzero(compared & (version == np.arange(columns)[:, None]), axis=0)
        by_nature = ~known & (agreeing < voters - self.bad) & (voters > LEAST)
        known_of_it = ~known & self.unlike & ((agreeing < voters) | (voters == 1))
        # Some that agree may be a half that was bribed: they are out once, as where nobody can tell.
        unlike = known_of_it | (by_nature & (agreeing == 1))
        # Of those that differ, who is suspected is left out alone, if the others make one thing of it.
        differ = compared & ~known & (versions > 1) & ~unlike
        guilty, innocent = differ & self.accused[:, None], differ & ~self.accused[:, None]
        one = guilty.any(0) & innocent.any(0) & _is_one(version, innocent)
        guilty, innocent = guilty & one, innocent & one
        # Without a truth, and with workers that cannot be compared exactly, those are believed that are near most.
        fits, asking = self._voices(asked & together)[:, 0], self._voices(asked)[:, 0]
        believed = together & (fits >= quorum) & (2 * fits > asking)
        torn = asked & ~known & ~unlike & near.any(0) & ~believed & (asked & ~together).any(0)
        surely = maybe = np.zeros((columns, *asked.shape), bool)
        if torn.any() or (self.of_two and guilty.any()):
            surely, maybe = _pairs_apart(measures_ECMN, asked & self.heard[:, None])
        of_torn = torn[:, None] | torn[None]
        same_given = exact[:, None] & exact[None]
        wrong_of_two = guilty & (surely & innocent).any(1) & self.of_two
        far = surely & of_torn & same_given
        one_thing = true | (compared & ~known & (versions == 1)) | innocent
        forged, unclear, open_CC = self._reached(keyed_CM, one_thing, word)
        one_thing &= ~(forged | unclear)
        open_CC |= (maybe & of_torn & ~surely & same_given).any(-1)
        alone = (near & known & exact & ~apart & ~together).any(1) & self.heard & (not self.unlike)
        open_CC[np.arange(columns), np.arange(columns)] = alone
        return Vote(
            right=(true & one_thing) | (near & known & together) | (innocent & one_thing & wrong_of_two.any(0)),
            wrong=(compared & known & ~true & ~near) | (near & known & exact & apart) | wrong_of_two,
            undecided=(differ & ~innocent & ~wrong_of_two) | (near & known & exact & ~apart & ~together) | torn,
            cascade=near & known & ~exact & ~together,
            exact=one_thing,
            near=near,
            agreeing=agreeing,
            compared=voters,
            unlike=unlike | by_nature,
            split=~_is_one(version, compared & self.heard[:, None]),
            forged=forged,
            unclear=unclear,
            differ=((differ[:, None] & differ[None] & ~same) | far).any(-1),
            open=open_CC,
            wide=(maybe & of_torn & ~same_given).any(-1),
            inexact=(near & known & exact).any(1) & (not self.unlike),
        )

    def _reached(
        self, keyed_CM: np.ndarray, one_thing: np.ndarray, word: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those that say the same (``one_thing``, bool [C, M]) must have reached others as the same, too.

        Returns:
            ``forged``, ``unclear`` and ``open`` of a ``Vote``.
        """
        reached = _version((keyed_CM[:, None] == keyed_CM[None]) & one_thing[:, None] & one_thing[None])
        most, behind, receivers = self._count(reached, one_thing)
        # Each column that is wrong has a bad sender or a bad receiver, so one thing alone that many say is the truth.
        likely = self._voices(one_thing, reached, len(reached)) >= np.maximum(receivers - 2 * self.bad, 1)[:, None]
        settled = (behind >= max(LEAST, self.bad + 1)) & (
            (2 * behind > receivers) | (np.count_nonzero(likely, axis=1) == 1)
        )
        odd = one_thing & (reached != most)
        # Against more than half nobody is out for the word of those alone that have none.
        agreed = ~(odd & word[:, None]).any(0) & (
            2 * np.count_nonzero(one_thing & ~odd, axis=0) > np.count_nonzero(one_thing, axis=0)
        )
        unclear = one_thing & odd.any(0) & ~settled & (odd | ~agreed)
        doubtful, all_heard = unclear & self.heard[:, None], one_thing & self.heard[:, None]
        pairs = (doubtful[:, None] & all_heard[None] & (reached[:, None] != reached[None])).any(-1)
        return odd & settled, unclear, pairs | pairs.T


def _version(same: np.ndarray) -> np.ndarray:
    """Of who says the same as whom (bool [C, C, M]) the first column that says the same as each, -1 for none."""
    return np.where(same.any(1), np.argmax(same, axis=1), -1)


def _is_one(version: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """bool [M], whether those chosen (bool [C, M]) say no two things."""
    return np.asarray(np.where(chosen, version, -1).max(0) <= np.where(chosen, version, len(version)).min(0))


def _apart(measures_ECMN: np.ndarray, true: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Largest relative difference from what is reported of the truth, without one from the median; [ends, C, M].

    Of the truth everybody should report the same, and nobody who lies about it may move it upon others: what lies
    between its reports, of whichever end, is no difference. It is infinite where one of the two is not available.

    Args:
        measures_ECMN: float [ends, C, M, N].
        true, asked: bool [C, M], whose messages are the truth, and whose median it is where none are.
    """
    mine = np.clip(measures_ECMN.astype(np.float64), -_LARGEST, _LARGEST)
    of_truth = np.where(true[..., None], mine, np.nan)
    low, high = np.fmin.reduce(of_truth, axis=(0, 1)), np.fmax.reduce(of_truth, axis=(0, 1))
    middle = median(np.moveaxis(np.where(asked[..., None], mine, np.nan), 1, -1))[:, None]
    between = np.where(np.isnan(mine), low, np.clip(mine, low, high))
    theirs = np.where(true[..., None].any(0), between, middle)
    return np.asarray(_relative(mine, theirs).max(-1))


def _pairs_apart(measures_ECMN: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which two of some (bool [C, M]) are apart by more than rounding, bool [C, C, M]: by whatever ends report of the
    two, and by what any ends do."""
    values = np.clip(measures_ECMN.astype(np.float64), -_LARGEST, _LARGEST)
    surely, maybe = (np.zeros((len(among), *among.shape), bool) for _ in range(2))
    for column in np.flatnonzero(among.any(1)).tolist():
        mine = values[:, column][:, None, None]  # [E, 1, 1, M, N], beside [E, C, M, N]
        apart = _relative(mine, values[None]).max(-1) > ROUNDING
        both = among & among[column]
        surely[column], maybe[column] = apart.all((0, 1)) & both, apart.any((0, 1)) & both
    return surely, maybe


def _relative(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Difference over the larger magnitude: 0 of what neither has, infinite of what one has."""
    equal = (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))
    relative = np.abs(mine - theirs) / np.maximum(np.maximum(np.abs(mine), np.abs(theirs)), _TINY)
    return np.asarray(np.where(equal, 0.0, np.where(np.isnan(relative), np.inf, relative)))
