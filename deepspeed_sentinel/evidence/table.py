"""The table of statistics: numpy only, so that judgement needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from deepspeed_sentinel.evidence import exact

SENT, RECEIVED = 0, 1
ZEROS = 0x5EA1ED  # the digest in evidence of a tensor of zeros; 0 is that of no tensor
# float32 knows a correlation to 1e-7: closer to one than this, two devices that add in another order would differ by as
# much, in the unit compared, as honest messages do.
_LARGEST_CORRELATION = 1.0 - 2.0**-15
_TINY = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Statistic:
    """One row of the table.

    Attributes:
        name: as in events.
        meaning: the same in plain words, for whoever reads a line or a report: a few, no sentence.
        formula: for one message, with xbar its mean over tokens and m the EMA baseline.
        source: where the method comes from.
        scale: the unit that is compared. "log" cancels the growth of activations and the decay of gradients;
            "arcsine" gives a share of counts the same spread everywhere, "fisher" (the inverse hyperbolic tangent)
            a correlation; "plain" is compared as it is.
        resolution: of a "log" row, the value below which differences mean nothing; log(value + resolution) is compared.
        floor: smallest inter-quartile range assumed, in the unit that is compared; below it a difference is
            rounding, not behaviour.
        hard: no fence; any value above zero is an alarm.
        of_pair: of what entered the sender and what left it, so the sender's two neighbours report it, not the
            two ends of the link. Messages of the first and last stage have none.
        adds_up: small deviations of it are summed over steps (``judgement/cusum.py``): what lasts between honest
            workers in it stays as it is, or changes no faster than what is usual is learnt.
        to_baseline: measured from the baseline, of which the two ends of a link hold a copy each.
        learnt: measured against what was learnt of the stage in a projection that is renewed now and then.
        by_judge: the judge finds it in the reports of both ends of two links; nobody reports it.
    """

    name: str
    meaning: str
    formula: str
    source: str
    scale: Literal["log", "arcsine", "fisher", "plain"] = "log"
    resolution: float = _TINY
    floor: float = 1e-3
    hard: bool = False
    of_pair: bool = False
    adds_up: bool = False
    to_baseline: bool = False
    learnt: bool = False
    by_judge: bool = False


_PAPER, _OURS = "arXiv 2603.03592", "ours, see docs/statistics.md"


def _of_pair(
    name: str, meaning: str, formula: str, scale: Literal["log", "arcsine", "fisher", "plain"], learnt: bool = False
) -> Statistic:
    return Statistic(name, meaning, formula, _OURS, scale, of_pair=True, adds_up=True, learnt=learnt)


TABLE: tuple[Statistic, ...] = (
    Statistic(
        "mean_abs", "how far the average token is from its usual", "mean_d |xbar_d - m_d|", _PAPER, to_baseline=True
    ),
    Statistic(
        "l2_rel",
        "how far the average token is from its usual, over its length",
        "||xbar - m|| / ||m||",
        _PAPER,
        to_baseline=True,
    ),
    Statistic(
        "sign_flip",
        "share of dimensions whose average has the other sign than usual",
        "mean_d [sign xbar_d != sign m_d]",
        _PAPER,
        scale="arcsine",
        to_baseline=True,
    ),
    Statistic(
        "sliced_wasserstein",
        "how far values are spread otherwise than usual",
        "mean |projected quantiles - EMA of projected quantiles|",
        _PAPER,
        to_baseline=True,
    ),
    Statistic("energy", "mean square of all values", "mean_td x_td^2", "ours"),
    Statistic("max_abs", "largest value, whichever sign", "max_td |x_td|", "ours"),
    Statistic(
        "non_finite",
        "NaN and infinite values, counted",
        "number of NaN and infinite elements",
        "ours",
        scale="plain",
        hard=True,
    ),
    _of_pair(
        "transfer_cosine",
        "how alike in direction tokens leave the stage as they entered",
        "mean_t cos(e_t, l_t): token entering, same token leaving",
        "fisher",
    ),
    _of_pair(
        "transfer_gain",
        "how much longer tokens leave the stage than they entered, logarithm",
        "mean_t log(|l_t| / |e_t|)",
        "plain",
    ),
    _of_pair("transfer_step", "size of the change that the stage makes", "||L - E|| / ||E||", "log"),
    # A difference between correlations has a size of its own: a few thousandths are neither harm nor evidence. It does
    # not add up: measured in a projection that a column keeps, it goes its own way while training moves the stage.
    Statistic(
        "cross_moment",
        "how far what leaves the stage hangs on what entered otherwise than usual",
        "mean_k |corr_k(E, L) - EMA of it|, uncentred, per sketch dimension",
        _OURS,
        resolution=0.01,
        floor=0.2,
        of_pair=True,
        learnt=True,
    ),
    _of_pair(
        "token_gram",
        "whether tokens resemble each other behind the stage as before it",
        "linear CKA of E and L: alignment of their token Gram matrices",
        "arcsine",
    ),
    _of_pair(
        "prediction_correlation",
        "how well the stage's change follows what is foretold of it",
        "corr(E W, L - E), both centred over tokens; W by ridge regression",
        "fisher",
        True,
    ),
    _of_pair(
        "prediction_slope",
        "how large the stage's change is beside what is foretold of it",
        "slope of L - E on E W, both centred over tokens",
        "plain",
        True,
    ),
    Statistic(
        "passed_on",
        "tensors that the stage always handed on unchanged and did not",
        "number of tensors that used to pass the sender unchanged and did not",
        _OURS,
        scale="plain",
        hard=True,
        by_judge=True,
    ),
    Statistic(
        "from_nothing",
        "a gradient made from one that was zero",
        "1 where the sender made a gradient from one that was zero",
        _OURS,
        scale="plain",
        hard=True,
        by_judge=True,
    ),
)
NAMES = tuple(row.name for row in TABLE)
HARD = np.array([row.hard for row in TABLE])
OF_PAIR = np.array([row.of_pair for row in TABLE])
ADDS_UP = np.array([row.adds_up for row in TABLE])
TO_BASELINE = np.array([row.to_baseline for row in TABLE])
LEARNT = np.array([row.learnt for row in TABLE])
BY_JUDGE = np.array([row.by_judge for row in TABLE])
FLOORS = np.array([row.floor for row in TABLE])
_MEANINGS = {row.name: row.meaning for row in TABLE}


def in_words(name: str) -> str:
    """``energy`` -> "energy (mean square of all values)"; a name that is none of the table's stays as it is."""
    return f"{name} ({_MEANINGS[name]})" if name in _MEANINGS else name


@dataclass(frozen=True)
class Rows:
    """The table once for each judged part of a message: part 0 first, K rows, then part 1, and so on.

    A part is a floating-point tensor; the first of a message is part 0. Where a message has fewer parts than another,
    its rows are NaN. Example: with K rows and two parts, row K + 4 is the ``energy`` of the second.

    Args:
        parts: how many, P.

    Attributes:
        hard, of_pair, adds_up, to_baseline, learnt, by_judge: bool [P * K], as of ``Statistic``.
        floors: float64 [P * K].
    """

    parts: int

    def __len__(self) -> int:
        return self.parts * len(TABLE)

    @property
    def hard(self) -> np.ndarray:
        return _of_parts("hard", self.parts)

    @property
    def of_pair(self) -> np.ndarray:
        return _of_parts("of_pair", self.parts)

    @property
    def adds_up(self) -> np.ndarray:
        return _of_parts("adds_up", self.parts)

    @property
    def to_baseline(self) -> np.ndarray:
        return _of_parts("to_baseline", self.parts)

    @property
    def measures(self) -> np.ndarray:
        """Of one message, and small where its elements change little: not a share of signs, nor a count.

        Nor its largest element, which bf16 rounds by as much as any other one, in each block that it passes.
        """
        several = [row.scale == "log" and not row.of_pair and row.name != "max_abs" for row in TABLE]
        return np.tile(several, self.parts)

    @property
    def learnt(self) -> np.ndarray:
        return _of_parts("learnt", self.parts)

    @property
    def by_judge(self) -> np.ndarray:
        return _of_parts("by_judge", self.parts)

    @property
    def floors(self) -> np.ndarray:
        return _of_parts("floor", self.parts)

    @staticmethod
    def part(row: int) -> int:
        """Which part a row is of."""
        return row // len(TABLE)

    @staticmethod
    def name(row: int) -> str:
        """The statistic's."""
        return NAMES[row % len(TABLE)]

    @staticmethod
    def all_of(name: str) -> slice:
        """The rows of one statistic, part by part."""
        return slice(NAMES.index(name), None, len(TABLE))


@cache
def _of_parts(attribute: str, parts: int) -> np.ndarray:
    """An attribute of all rows, asked for many times a step; not to be written to."""
    result = np.tile([getattr(row, attribute) for row in TABLE], parts)
    result.flags.writeable = False
    return result


def comparable(statistics: np.ndarray) -> np.ndarray:
    """Statistics [P * K, ...] in the unit that fences compare, the same bits on every host; NaN (missing) stays NaN.

    Float64, whatever is given.
    """
    result = np.empty(statistics.shape)
    given, found = statistics.reshape(len(statistics), -1), result.reshape(len(result), -1)
    # Rows of one scale together: of a small mesh a call costs more than its numbers.
    for scale, rows, resolution in _by_scale(len(statistics) // len(TABLE)):
        for messages in exact.blocks(given.shape[1], len(rows)):
            found[rows, messages] = _in_unit(scale, given[rows, messages].astype(np.float64), resolution)
    return result


@cache
def _by_scale(parts: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Of each scale its rows, int [N], and what is added to them, float64 [N, 1]."""
    scales = np.tile([row.scale for row in TABLE], parts)
    resolutions = np.tile([row.resolution for row in TABLE], parts)[:, None]
    return [
        (scale, np.flatnonzero(scales == scale), resolutions[scales == scale]) for scale in np.unique(scales).tolist()
    ]


def _in_unit(scale: str, values: np.ndarray, resolution: np.ndarray) -> np.ndarray:
    """Of rows of one scale, float64 [N, messages]."""
    if scale == "arcsine":
        return exact.arcsin(np.sqrt(values.clip(0.0, 1.0)))
    if scale == "fisher":
        return exact.arctanh(values.clip(-_LARGEST_CORRELATION, _LARGEST_CORRELATION))
    infinite = np.isinf(values)
    if infinite.any():
        values = np.where(infinite, np.copysign(_LARGEST, values), values)
    return exact.log(np.maximum(values, 0.0) + resolution) if scale == "log" else values
