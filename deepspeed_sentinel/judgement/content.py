"""Content: what tells that the data of a column are not like the others'.

A replica's data may be of another kind than its neighbours', for good or for a while, and honest workers that are given
other data send other messages. Nothing that a middle stage sends can show whether it is that, nor what the last stage
makes of it. What the first stage sends can: it is trusted, and has been given nothing but data, so where its messages
lie apart, it is the content of the column. With the statistics of single messages over link 0,

    r = mean over a column's messages of the statistic minus its median over all replicas
    a <- decay a + (1 - decay) r                                      fast and slow
    t = |a| / (s sqrt((1 - decay) / (1 + decay)))                     s: the spread of r where columns are alike

and a column is *unlike* the others where t exceeds ``UNLIKE`` for any statistic.

Arrays follow the axes [statistic, column], statistics those of single messages without the hard ones.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence import exact
from deepspeed_sentinel.evidence.table import Rows
from deepspeed_sentinel.judgement.blame import CONSPICUOUS
from deepspeed_sentinel.judgement.robust import median
from deepspeed_sentinel.mesh import BACKWARD, FORWARD

UNLIKE = 10.0
ROOM = 2.0
# In fences; nothing that content does was seen so far out.
HIGHEST = 10.0
_DECAYS = np.array([0.7, 0.95])
_OF_MEAN = np.sqrt((1.0 - _DECAYS) / (1.0 + _DECAYS))
_IQR_OF_NORMAL = 1.349
_ONE_PART = Rows(1)


class Content:
    """Whose content is unlike the others'.

    Args:
        columns: how many there are.
        table: the rows judged.

    Attributes:
        unlike: bool [C], after the last step.
    """

    def __init__(self, columns: int, table: Rows = _ONE_PART) -> None:
        self._own = np.flatnonzero(~table.of_pair & ~table.hard)
        self.unlike = np.zeros(columns, bool)
        self._apart = np.zeros((len(_DECAYS), len(self._own), columns))

    def step(self, compared: np.ndarray, whole: np.ndarray, iqr: np.ndarray) -> None:
        """Hear what the first stage sent.

        Args:
            compared: float64 [K, 2, L, C, M], all statistics in the unit that fences compare, over link 0 as the first
                stage reports them.
            whole: bool [2, L, C, M], finite messages that nobody disputes.
            iqr: float64 [K, 2, L], of a message's residuals.
        """
        heard = np.where(whole[FORWARD, 0], compared[self._own, FORWARD, 0], np.nan)
        known = ~np.isnan(heard)
        count = exact.count(known)
        centre = median(heard.reshape(len(heard), -1))[:, None, None]
        apart = exact.total(np.where(known, heard - centre, 0.0)) / np.maximum(count, 1)
        decay = _DECAYS[:, None, None]
        self._apart = np.where(count > 0, decay * self._apart + (1.0 - decay) * apart, self._apart)
        spread = iqr[self._own, FORWARD, 0][:, None] / _IQR_OF_NORMAL / np.sqrt(np.maximum(count, 1))
        with np.errstate(invalid="ignore"):
            self.unlike = (np.abs(self._apart) > UNLIKE * spread * _OF_MEAN[:, None, None]).any(axis=(0, 1))

    @property
    def room(self) -> np.ndarray:
        """float64 [C], by how much fences are wider."""
        return np.where(self.unlike, ROOM, 1.0)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"unlike": self.unlike.copy(), "apart": self._apart.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.unlike, self._apart = np.array(state["unlike"]), np.array(state["apart"])


def content_alone(
    alarms: np.ndarray, per_statistic: np.ndarray, values: np.ndarray, unlike: np.ndarray, table: Rows
) -> tuple[np.ndarray, np.ndarray]:
    """Alarms that content explains, bool [2, L, C, M]: they are no strike, and what is usual follows them.

    They lie no further out than content does. Of a middle stage nothing but statistics of single messages stands out,
    while those of the pair are as foretold, in a column whose content is unlike the others'. The last stage has no
    pair, and the first is what tells of content.

    The second array is of alarms that content would explain but for the pair, which is what the sender's neighbours say
    of it: they rest on that as if the pair itself were in alarm.

    Args:
        alarms: bool [2, L, C, M].
        per_statistic: float64 [K, 2, L, C, M], scores.
        values: float64 [K, 2, L, C, M], NaN where a statistic is not available.
        unlike: bool [C].
        table: the rows judged.
    """
    if not alarms.any():
        return alarms, alarms
    available = ~np.isnan(values[table.of_pair]).all(0)
    mild = alarms & (per_statistic[~table.of_pair].max(0) <= HIGHEST)
    explained = available & (per_statistic[table.of_pair].max(0) < CONSPICUOUS)
    explained[BACKWARD, -1] = explained[FORWARD, 0] = True
    new = np.broadcast_to(unlike[:, None], alarms.shape).copy()
    new[FORWARD, 0] = True
    return mild & new & explained, mild & new & ~explained
