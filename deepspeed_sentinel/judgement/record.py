"""The record of every worker: strikes, suspicion, convictions, probation; and of every link: disputes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.evidence import exact
from deepspeed_sentinel.mesh import Mesh, Worker

_TRIED_AT_FIRST, _TRIED_AT_LEAST, _PATIENCE, _LONG = 0.5, 1.0 / 64.0, 4, 9
_TRIED_AT_A_LOSS = 0.75
_HOPELESS = 3  # twin steps in a row that could not be made, after which strikes convict until one can
# Twin steps in a row in which a stage that is unlike by nature must have made the same before it is taken for alike:
# what differs now and then, such as sums in an order of their own, is the same most of the time.
_LIKE_AGAIN = 8


@dataclass(frozen=True)
class Tried:
    """What exact comparison has shown of workers.

    Attributes:
        proved: bool [S, R], workers whose work is not their stage's.
        sound: bool [S, R], workers all of whose work is.
        unlike: bool [S], stages whose honest replicas do not make the same of the same.
        alike: bool [S], stages of which all that could be compared (two at least) made the same to the last bit.
        split: bool [S], stages of which what could be compared to the last bit was not all the same.
        held: it was a twin step. Else somebody was proved by weights, a reduction or a replay, and nobody was tried.
        blind: not all of what workers made could be compared, since some replicas were in states of their own.
    """

    proved: np.ndarray
    sound: np.ndarray
    unlike: np.ndarray
    alike: np.ndarray
    split: np.ndarray
    held: bool
    blind: bool = False


@dataclass(frozen=True)
class Changes:
    """What a step has changed in the record, each bool [S, R].

    Attributes:
        convicted, released: by this step.
        cleared: suspects no longer.
    """

    convicted: np.ndarray
    released: np.ndarray
    cleared: np.ndarray


class Record:
    """A strike makes a suspect for as long as the sliding window holds it, and so does a doubt: something unsettled
    with another worker (``unsettled.py``), or having been released. A doubt is no strike. What convicts depends:

    by proof       a proof does, at once; who agrees with the majority of its stage in a twin step is cleared.
    by statistics  so do ``strikes`` of them within the window.

    A conviction is lifted after ``probation`` steps without a strike or a proof. A released worker stays on probation
    for as long again: where strikes convict, one then does. First and last stage are trusted: they collect strikes, so
    that events can tell, but are never convicted.

    Args:
        mesh: stages and replicas.
        strikes, window: strikes that convict, and the steps within which they must fall.
        probation: steps.
        by_proof: strikes convict only where nothing can be proved: in a stage whose honest replicas differ, after a
            twin step that was blind, and where three twin steps in a row could not be made. Only strikes of such steps
            count for it, in which they were looked into.
        heals: columns are dealt anew, so that who stood behind a convicted worker can be tried.

    Attributes:
        convicted, on_probation: bool [S, R].
        at_a_loss: steps are lost and nobody is found (``deadlock.py``), to be set from outside.
    """

    def __init__(
        self, mesh: Mesh, strikes: int, window: int, probation: int, by_proof: bool = False, heals: bool = False
    ) -> None:
        self.mesh = mesh
        self.strikes_needed = strikes
        self.probation = probation
        self.by_proof = by_proof
        self.at_a_loss = False
        self._heals = heals
        shape = (mesh.stages, mesh.replicas)
        self._struck, self._counted, self._doubted, self._untried = (np.zeros((window, *shape), bool) for _ in range(4))
        self._disputed = np.zeros((window, mesh.links, mesh.replicas), bool)
        self.convicted = np.zeros(shape, bool)
        self.on_probation = np.zeros(shape, bool)
        self._quiet_steps = np.zeros(shape, np.int64)
        self._unlike = np.zeros(mesh.stages, np.int64)  # twin steps that must find a stage alike before it is so
        self._blind = False  # the last twin step was
        self._more_to_find = False
        self._refused_trials = self._fruitless = self._in_vain = 0
        self._explained = np.zeros(shape, bool)
        self._position = 0
        self._before: dict[str, np.ndarray] | None = None
        self._shown: tuple[Tried | None, bool, np.ndarray | None, np.ndarray | None] = (None, False, None, None)
        self._trusted = np.zeros(shape, bool)
        self._trusted[[0, -1]] = True

    @property
    def strikes(self) -> np.ndarray:
        """Strikes within the window, int [S, R]."""
        return np.count_nonzero(self._struck, axis=0)

    @property
    def accused(self) -> np.ndarray:
        """Workers with a strike within the window that are not convicted, bool [S, R]."""
        return np.asarray(self._struck.any(0) & ~self.convicted)

    @property
    def suspects(self) -> np.ndarray:
        """Workers to be tried: with a strike or a doubt within the window, and not convicted, bool [S, R]."""
        return np.asarray((self._struck.any(0) | self._doubted.any(0)) & ~self.convicted)

    @property
    def untried(self) -> np.ndarray:
        """Workers that were not compared when somebody was convicted, within the window, nor since, bool [S, R]."""
        return np.asarray(self._untried.any(0) & ~self.suspects & ~self.convicted)

    @property
    def strikes_count(self) -> np.ndarray:
        """Stages in which a strike may come to convict, bool [S], so that it must be looked into."""
        return np.asarray(self.unlike | self._blind | (self._refused_trials > 0) | (not self.by_proof))

    @property
    def unlike(self) -> np.ndarray:
        """Stages whose honest replicas are known not to make the same of the same, bool [S]."""
        return np.asarray(self._unlike > 0)

    @property
    def suspicion(self) -> float:
        """How likely the next step should be a twin step, because somebody is to be tried; 0 if nobody is.

        That is a suspect, or whoever may stand behind a worker that the last trial convicted: what follows a difference
        is not tested. It is a half, and half as much after each four trials in a row that have settled nothing, such as
        where a suspect stands behind bad work in a column that stays what it is. Where all suspects stood beside an
        isolated worker when they were struck, clearing one of them settles nothing either: it will be accused again.
        Where steps are lost all the same, a twin step costs nothing.
        """
        return max(self._of_suspects(), _TRIED_AT_A_LOSS if self.at_a_loss else 0.0)

    def _of_suspects(self) -> float:
        suspects = self.suspects
        if not (self._more_to_find or suspects.any() or self.untried.any()):
            return 0.0
        others = self._more_to_find or (suspects & ~self._explained).any() or self.untried.any()
        trials = self._fruitless if others else self._in_vain
        return float(max(_TRIED_AT_FIRST / (1 << min(trials // _PATIENCE, _LONG)), _TRIED_AT_LEAST))

    @property
    def lasting_disputes(self) -> np.ndarray:
        """Links disputed as often as it takes strikes to convict, bool [L, C]."""
        return np.count_nonzero(self._disputed, axis=0) >= self.strikes_needed

    def update(
        self,
        struck: np.ndarray,
        disputed: np.ndarray,
        tried: Tried | None = None,
        refused: bool = False,
        doubted: np.ndarray | None = None,
        explained: np.ndarray | None = None,
    ) -> Changes:
        """Enter one step.

        Args:
            struck: bool [S, R], workers blamed in this step.
            disputed: bool [L, C], links in dispute in this step.
            tried: what a twin step has shown.
            refused: it was to be a twin step and could not be one.
            doubted: bool [S, R], workers to be tried without a strike; None is nobody.
            explained: bool [S, R], workers that are isolated (``isolation.py``) or stand beside one who is; None is
                nobody.
        """
        self._before, self._shown = self.state_dict(), (tried, refused, doubted, explained)
        slot = self._position % len(self._struck)
        self._struck[slot], self._disputed[slot] = struck, disputed
        self._doubted[slot] = False if doubted is None else doubted & ~self._trusted
        self._position += 1
        proved = cleared = np.zeros_like(self.convicted)
        trial = tried if tried is not None and tried.held else None
        self._refused_trials = 0 if trial else self._refused_trials + refused
        if tried is not None:
            proved, cleared = tried.proved, tried.sound & self.suspects
            # A step in which too few could be compared tells nothing of it.
            unlike = tried.unlike | (self.unlike & tried.split)
            self._unlike = np.where(unlike, _LIKE_AGAIN, np.maximum(self._unlike - tried.alike, 0))
        if trial:
            self._blind = trial.blind
        self._counted[slot] = struck & self.strikes_count[:, None]
        self._quiet_steps = np.where(struck | proved, 0, self._quiet_steps + 1)
        counted = exact.count(self._counted, axis=0)
        guilty = (counted >= self.strikes_needed) | (self.on_probation & struck)
        if self.by_proof:
            guilty &= self.unlike[:, None] | self._blind | (self._refused_trials >= _HOPELESS)
        if cleared.any():
            self._struck[:, cleared] = self._counted[:, cleared] = self._doubted[:, cleared] = False
        self._untried[slot] = False
        newly = ((guilty & ~cleared) | proved) & ~self.convicted & ~self._trusted
        if trial:
            self._more_to_find = bool(newly.any())
            self._untried[:, trial.sound] = False
            if self._heals and newly.any() and trial.sound.any():
                self._untried[slot] = ~(trial.sound | trial.proved | self._trusted)
            self._fruitless = 0 if newly.any() or cleared.any() else self._fruitless + 1
            self._in_vain = 0 if newly.any() or (cleared & ~self._explained).any() else self._in_vain + 1
        named = struck if doubted is None else struck | doubted
        self._explained = np.where(named, False if explained is None else explained, self._explained)
        self.convicted = self.convicted | newly
        self.on_probation = self.on_probation & ~newly
        quiet = self._quiet_steps >= self.probation
        released = self.convicted & quiet
        served = self.on_probation & quiet
        self.convicted = self.convicted & ~released
        self.on_probation = (self.on_probation & ~served) | released
        self._quiet_steps = np.where(released, 0, self._quiet_steps)
        if released.any():
            self._struck[:, released] = self._counted[:, released] = False
            self._doubted[slot] |= released
        return Changes(newly, released, cleared)

    def update_again(self, struck: np.ndarray, disputed: np.ndarray) -> Changes:
        """Enter the last step anew, in place of what was entered: strikes were taken back, links found in dispute.

        Args and returns as of ``update``.
        """
        assert self._before is not None, "no step was entered yet"
        self.load_state_dict(self._before)
        return self.update(struck, disputed, *self._shown)

    def forget(self, worker: Worker) -> None:
        """Hold nothing against a worker, since it is another one than before."""
        place = (slice(None), *worker)
        for window in (self._struck, self._counted, self._doubted, self._untried):
            window[place] = False
        for marked in (self.convicted, self.on_probation, self._explained):
            marked[worker] = False
        self._quiet_steps[worker] = 0

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "struck": self._struck.copy(),
            "counted": self._counted.copy(),
            "doubted": self._doubted.copy(),
            "untried": self._untried.copy(),
            "disputed": self._disputed.copy(),
            "convicted": self.convicted.copy(),
            "on_probation": self.on_probation.copy(),
            "quiet_steps": self._quiet_steps.copy(),
            "unlike": self._unlike.copy(),
            "blind": np.array(self._blind),
            "more_to_find": np.array(self._more_to_find),
            "refused_trials": np.array(self._refused_trials),
            "fruitless": np.array(self._fruitless),
            "in_vain": np.array(self._in_vain),
            "explained": self._explained.copy(),
            "position": np.array(self._position),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._struck, self._counted, self._doubted, self._untried = (
            np.array(state[name]) for name in ("struck", "counted", "doubted", "untried")
        )
        self._disputed = np.array(state["disputed"])
        self.convicted = np.array(state["convicted"])
        self.on_probation = np.array(state["on_probation"])
        self._quiet_steps = np.array(state["quiet_steps"])
        self._unlike, self._blind = np.array(state["unlike"]), bool(state["blind"])
        self._more_to_find = bool(state["more_to_find"])
        self._refused_trials = int(state["refused_trials"])
        self._fruitless, self._in_vain = int(state["fruitless"]), int(state["in_vain"])
        self._explained = np.array(state["explained"])
        self._position = int(state["position"])
