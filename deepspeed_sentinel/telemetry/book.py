"""What is known of devices, so that copies of it can be merged in any order: nothing counted twice, nothing lost.

The same steps are counted in ``ledger.json`` and in every checkpoint, and two runs may write one file. So counts are
kept apart by the run that counted them (an id drawn when it attached, never used again), and a run's only go up. Of
two copies of one run's counts the larger is the later one, element by element, and different runs add up: a grow-only
counter, the G-Counter of Shapiro et al., "A comprehensive study of convergent and commutative replicated data types"
(INRIA RR-7506, 2011).

Worked example, alarms of one device. Run A counts to 5; a checkpoint keeps {A: 5}; A goes on to 7, writes, and dies:

    file {A: 7}      checkpoint {A: 5}      run B resumes: {A: max(7, 5)}, alarms 7

B computes the lost steps again, which is new work of the device: its alarms in them are counted as B's.

    B counts 2: {A: 7, B: 2}, alarms 9.     Somebody starts C from the old checkpoint: {A: 7, B: 2, C: 0}, alarms 9

Adding the numbers of file and checkpoint would have given 12, taking either for the whole would have lost A's or B's.

Many restarts would let that grow without end, so runs that ended long ago are folded: one entry, which holds their sum
and their ids. Entries are merged by the set of their ids. Of equal sets the larger counts hold; an entry whose set is
part of another's is in that one already, and goes:

    {A: 7}, {B: 2}  folded  {A+B: 9};   merged with a copy that still has {A: 5}, {C: 1}:   {A+B: 9}, {C: 1}

Union, maximum and dropping what is part of another are commutative, associative and idempotent, hence so is merging.
Where folding can lose: two copies went apart, each folded runs that they had in common together with others, and then
meet. Sets that overlap stay both, and the larger sum of each count is taken, so nothing is counted twice, and some of
it may be missing from the total. ``fold`` keeps ``KEPT_RUNS`` runs and all of the last day unfolded against that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

FILE, DRILL_FILE = "ledger.json", "drill_ledger.json"  # of runs, and of drills
COUNTS = ("steps", "judged", "alarmed_steps", "alarms", "disputes", "proofs", "unequal_weights")
TIMES = ("first", "last", "trouble")  # seconds since 1970
COLUMNS = COUNTS + TIMES
FIRST, LAST, TROUBLE = (COLUMNS.index(name) for name in TIMES)
MOST = 1 << 53  # of a count: what every reader of JSON takes for a whole number
LATEST = 253402300799  # of a time: the last second of the year 9999, which every calendar can tell
KEPT_RUNS = 32  # single runs that are never folded
_FOLDED_AT_ONCE = 16
_DAY = 86400
PLACES = 8  # where a device was: the last so many

Place = tuple[str, int, str]  # host, slot, PCI address
Runs = frozenset[str]


@dataclass(frozen=True)
class Entry:
    """What some runs counted, all in all.

    Attributes:
        keys: names of devices, sorted, each once.
        table: int64 [D, 10], their ``COLUMNS``: counts, then the first and the last time that something was counted
            and the last time of trouble (an alarm, dispute, proof or unequal weights; 0 for never), in whole seconds.
            Where a device's counts are all 0, so are its times.
    """

    keys: tuple[str, ...]
    table: np.ndarray


NOTHING = Entry((), np.zeros((0, len(COLUMNS)), np.int64))


@dataclass(frozen=True)
class Book:
    """Counts of many runs, and where devices were.

    Attributes:
        entries: what was counted, by the ids of the runs that did; no set of ids is part of another.
        places: of each device, when it was last at each of its latest places, in seconds since 1970.
    """

    entries: Mapping[Runs, Entry] = field(default_factory=dict)
    places: Mapping[str, Mapping[Place, int]] = field(default_factory=dict)

    def merged(self, other: Book) -> Book:
        """All that either knows; see the module's docstring."""
        entries = dict(self.entries)
        for runs, entry in other.entries.items():
            entries[runs] = _combined([entries[runs], entry], apart=False) if runs in entries else entry
        places = {key: dict(known) for key, known in self.places.items()}
        for key, known in other.places.items():
            here = places.setdefault(key, {})
            for place, last in known.items():
                here[place] = max(last, here.get(place, 0))
        return Book(_maximal(entries), {key: _latest(known) for key, known in places.items()})

    def folded(self, now: float) -> Book:
        """The same totals in fewer entries: one for the runs that ended long ago.

        Args:
            now: seconds since 1970.
        """
        single = [(_last(entry), runs) for runs, entry in self.entries.items() if len(runs) == 1]
        single.sort(key=lambda pair: (pair[0], *pair[1]))
        old = [runs for last, runs in single[: max(len(single) - KEPT_RUNS, 0)] if last < now - _DAY]
        if len(old) < _FOLDED_AT_ONCE:
            return self
        kept = {runs: entry for runs, entry in self.entries.items() if runs not in set(old)}
        kept[frozenset[str]().union(*old)] = _combined([self.entries[runs] for runs in old], apart=True)
        return Book(kept, self.places)

    def total(self) -> Entry:
        """What is known of each device over all runs."""
        groups = self._overlapping()
        return _combined([_combined(group, apart=False) for group in groups], apart=True)

    def _overlapping(self) -> Iterable[list[Entry]]:
        """Entries in groups that have no run in common."""
        leader = {run: run for runs in self.entries for run in runs}

        def lead(run: str) -> str:
            while leader[run] != run:
                leader[run] = run = leader[leader[run]]
            return run

        for runs in self.entries:
            first, *others = runs
            for run in others:
                leader[lead(run)] = lead(first)
        groups: dict[str, list[Entry]] = defaultdict(list)
        for runs, entry in self.entries.items():
            groups[lead(next(iter(runs)))].append(entry)
        return groups.values()


def _maximal(entries: Mapping[Runs, Entry]) -> dict[Runs, Entry]:
    """Without those whose runs are part of another's."""
    having: dict[str, list[Runs]] = defaultdict(list)
    for runs in entries:
        for run in runs:
            having[run].append(runs)
    # Whatever contains all of them has the one that fewest have.
    return {
        runs: entry
        for runs, entry in entries.items()
        if not any(runs < other for other in min((having[run] for run in runs), key=len))
    }


def _latest(known: Mapping[Place, int]) -> dict[Place, int]:
    ordered = sorted(known.items(), key=lambda item: (item[1], item[0]), reverse=True)
    return dict(ordered[:PLACES])


def _last(entry: Entry) -> int:
    return int(entry.table[:, LAST].max(initial=0))


def _combined(entries: Sequence[Entry], apart: bool) -> Entry:
    """One of several: the sum if what they count is apart, or else the latest of what is the same."""
    keys = tuple(sorted({key for entry in entries for key in entry.keys}))
    if not keys:
        return NOTHING
    place = {key: index for index, key in enumerate(keys)}
    table = np.zeros((len(keys), len(COLUMNS)), np.int64)
    table[:, FIRST] = MOST
    counts, times = slice(len(COUNTS)), [LAST, TROUBLE]
    for entry in entries:
        rows, mine = [place[key] for key in entry.keys], entry.table
        known = table[rows]
        known[:, counts] = (
            np.minimum(known[:, counts] + mine[:, counts], MOST)
            if apart
            else np.maximum(known[:, counts], mine[:, counts])
        )
        known[:, times] = np.maximum(known[:, times], mine[:, times])
        known[:, FIRST] = np.minimum(known[:, FIRST], np.where(mine[:, FIRST] > 0, mine[:, FIRST], MOST))
        table[rows] = known
    table[:, FIRST] %= MOST
    return Entry(keys, table)
