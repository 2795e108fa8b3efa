import functools
import operator
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sentinel.telemetry.book import (
    COLUMNS,
    FIRST,
    KEPT_RUNS,
    LAST,
    MOST,
    NOTHING,
    PLACES,
    TROUBLE,
    Book,
    Entry,
)
from deepspeed_sentinel.telemetry.bookfile import from_text, to_text

ALARMS = COLUMNS.index("alarms")
DAY = 86400


def row(alarms, first, last, trouble=0):
    values = np.zeros(len(COLUMNS), np.int64)
    values[[ALARMS, FIRST, LAST, TROUBLE]] = alarms, first, last, trouble
    return values


def entry(**alarms):
    keys = tuple(sorted(alarms))
    return Entry(keys, np.stack([row(alarms[key], 5, 9) for key in keys]))


def of(*runs):
    return frozenset(runs)


def alarms(book):
    total = book.total()
    return dict(zip(total.keys, total.table[:, ALARMS].tolist(), strict=True))


def plain(book):
    return (
        {runs: (one.keys, one.table.tolist()) for runs, one in book.entries.items()},
        {key: dict(known) for key, known in book.places.items()},
    )


def merged(books):
    return functools.reduce(Book.merged, books, Book())


tables = st.dictionaries(st.sampled_from("pqr"), st.tuples(*[st.integers(1, 9)] * 4), min_size=1).map(
    lambda rows: Entry(tuple(sorted(rows)), np.stack([row(*rows[key]) for key in sorted(rows)]))
)
run_sets = st.frozensets(st.sampled_from("ABCDE"), min_size=1, max_size=3)
places = st.dictionaries(
    st.sampled_from("pq"), st.dictionaries(st.tuples(st.just("h"), st.integers(0, 12), st.just("")), st.integers(1, 9))
)
# Places of a book are never more than PLACES, so books are made by merging.
books = st.builds(lambda entries, known: Book().merged(Book(entries, known)), st.dictionaries(run_sets, tables), places)


def laws_of_merging(a, b, c):
    assert plain(a.merged(b)) == plain(b.merged(a))
    assert plain(a.merged(b).merged(c)) == plain(a.merged(b.merged(c)))
    assert plain(a.merged(a)) == plain(a)
    assert plain(a.merged(b).merged(b)) == plain(a.merged(b))


@given(books, books, books)
@settings(max_examples=40, deadline=None)
def test_merging_is_commutative_associative_and_idempotent(a, b, c):
    laws_of_merging(a, b, c)


@pytest.mark.long
@given(books, books, books)
@settings(max_examples=300, deadline=None)
def test_merging_is_so_for_many_books(a, b, c):
    laws_of_merging(a, b, c)


@given(books)
@settings(max_examples=40, deadline=None)
def test_what_is_written_down_is_read_back(book):
    read = from_text(to_text(book).encode())
    assert plain(read)[0] == plain(book)[0]
    counted = {key for one in book.entries.values() for key in one.keys}
    assert plain(read)[1] == {key: dict(book.places.get(key, {})) for key in counted}


# A run counts, writes the file (where ended runs are folded), leaves a checkpoint, takes an old one over, starts anew.
events = st.lists(
    st.one_of(
        st.tuples(st.just("count"), st.integers(0, 3), st.sampled_from("pqr"), st.integers(1, 4)),
        st.tuples(st.just("write"), st.integers(0, 3)),
        st.tuples(st.just("checkpoint"), st.integers(0, 3)),
        st.tuples(st.just("resume"), st.integers(0, 3), st.integers(0, 5)),
        st.tuples(st.just("restart"), st.integers(0, 3)),
    ),
    max_size=40,
)


@given(events, st.booleans())
@settings(max_examples=200, deadline=None)
def test_nothing_is_counted_twice_or_lost_whoever_copies_what(story, folding):
    """Four runs at a time over one file, old and new checkpoints: the end's total is what was counted."""
    truth, file, checkpoints, names = Counter(), Book(), [], iter(range(10_000))
    runs = [[f"run-{next(names)}", Counter(), Book()] for _ in range(4)]

    def known(run):
        name, counted, book = run
        return book.merged(Book({of(name): entry(**counted)} if counted else {}))

    def write(run):
        nonlocal file
        file = file.merged(known(run))
        living = {one[0] for one in runs}
        ended = [runs_ for runs_ in file.entries if not runs_ & living and len(runs_) == 1]
        if folding and len(ended) >= 2:
            rest = {key: one for key, one in file.entries.items() if key not in set(ended)}
            total = Book({key: file.entries[key] for key in ended}).total()
            file = Book({**rest, functools.reduce(operator.or_, ended): total})
        run[2] = file

    for what, index, *more in story:
        run = runs[index]
        if what == "count":
            device, number = more
            run[1][device] += number
            truth[device] += number
        elif what == "write":
            write(run)
        elif what == "checkpoint":
            write(run)  # as the engine does, so that the file is never behind a checkpoint
            checkpoints.append(known(run))
        elif what == "resume" and more[0] < len(checkpoints):
            run[2] = run[2].merged(checkpoints[more[0]])
        elif what == "restart":
            write(run)
            runs[index] = [f"run-{next(names)}", Counter(), Book()]
    for run in runs:
        write(run)
    assert alarms(merged([*checkpoints, file, *map(known, runs)])) == {key: n for key, n in truth.items() if n}


def test_the_worked_example():
    file, checkpoint = Book({of("A"): entry(gpu=7)}), Book({of("A"): entry(gpu=5)})
    assert alarms(file.merged(checkpoint)) == {"gpu": 7}
    later = file.merged(checkpoint).merged(Book({of("B"): entry(gpu=2)}))
    assert alarms(later) == {"gpu": 9}
    assert alarms(later.merged(checkpoint)) == {"gpu": 9}
    folded = Book({of("A", "B"): later.total()})
    again = folded.merged(Book({of("A"): entry(gpu=5), of("C"): entry(gpu=1)}))
    assert set(again.entries) == {of("A", "B"), of("C")} and alarms(again) == {"gpu": 10}


def test_sets_that_overlap_count_no_run_twice():
    book = Book(
        {of("A", "B"): entry(gpu=9), of("B", "C"): entry(gpu=4), of("D"): entry(gpu=1), of("E", "F"): entry(x=2)}
    )
    assert alarms(book) == {"gpu": 10, "x": 2}
    assert alarms(book.merged(Book({of("C", "D"): entry(gpu=2)}))) == {"gpu": 9, "x": 2}


def test_times_are_the_first_and_the_last_and_zero_is_none():
    one = Entry(("gpu",), row(1, 50, 90, 0)[None])
    other = Entry(("gpu", "idle"), np.stack([row(2, 20, 60, 30), row(0, 0, 0)]))
    for book in (Book({of("A"): one, of("B"): other}), Book({of("A"): one}).merged(Book({of("A"): other}))):
        total = book.total()
        assert total.table[0, [FIRST, LAST, TROUBLE]].tolist() == [20, 90, 30]
        assert total.table[1].tolist() == [0] * len(COLUMNS)


def test_folding_keeps_totals_and_bounds_what_grows():
    book, now = Book(), 1000 * DAY
    for number in range(500):
        begun = (number + 1) * DAY
        ran = Entry(("gpu", f"gpu{number % 7}"), np.stack([row(1, begun, begun + 9), row(2, begun, begun + 9)]))
        book = book.merged(Book({of(f"r{number}"): ran}))
        before, book = book, book.folded(now)
        if book is not before:
            assert plain(Book({of("x"): book.total()})) == plain(Book({of("x"): before.total()}))
    assert len(book.entries) <= KEPT_RUNS + 16 + 500 // 16
    assert {f"r{number}" for number in range(500 - KEPT_RUNS, 500)} <= {run for runs in book.entries for run in runs}
    assert all(of(f"r{number}") in book.entries for number in range(500 - KEPT_RUNS, 500))


def test_runs_of_the_last_day_are_not_folded():
    book = Book({of(f"r{number}"): Entry(("gpu",), row(1, 5, 10 * DAY)[None]) for number in range(100)})
    assert len(book.folded(10 * DAY + 3600).entries) == 100
    assert len(book.folded(12 * DAY).entries) == KEPT_RUNS + 1


def test_a_copy_from_before_folding_changes_nothing():
    before = Book({of(f"r{number}"): Entry(("gpu",), row(number, 5, number + 1)[None]) for number in range(100)})
    after = before.folded(10 * DAY)
    assert len(after.entries) < 100
    assert plain(after.merged(before)) == plain(after)
    assert alarms(after) == alarms(before) == {"gpu": sum(range(100))}


def test_only_the_latest_places_are_kept():
    book = merged(Book({}, {"gpu": {("host", slot, ""): 100 + slot}}) for slot in range(20))
    assert book.places["gpu"] == {("host", slot, ""): 100 + slot for slot in range(20 - PLACES, 20)}


def test_an_empty_book():
    assert Book().total() is NOTHING and plain(from_text(to_text(Book()).encode())) == ({}, {})


@pytest.mark.parametrize("number", [1, 3])
def test_sums_stay_numbers_that_can_be_written(number):
    most = 1 << 53
    book = Book({of(f"r{index}"): entry(gpu=most - index) for index in range(number)})
    assert alarms(book)["gpu"] == most
    assert alarms(from_text(to_text(Book({of("all"): book.total()})).encode())) == {"gpu": most}


def test_counts_beyond_what_fits_stay_at_the_most_and_can_be_read_back():
    full = Entry(("p",), np.full((1, len(COLUMNS)), MOST, np.int64))
    full.table[:, [FIRST, LAST, TROUBLE]] = 5
    book = Book({of(f"r{index}"): full for index in range(2000)})
    assert alarms(book) == {"p": MOST}
    folded = book.folded(10.0 * DAY)
    assert len(folded.entries) == KEPT_RUNS + 1
    assert plain(from_text(to_text(folded).encode()))[0] == plain(folded)[0]


@pytest.mark.parametrize("shared", [False, True])
def test_many_entries_take_no_time(shared):
    """As many that overlap in a chain, or all in one run: nobody can make reading a file take minutes."""
    begun = time.process_time()
    entries = {of("all" if shared else f"r{index + 1}", f"r{index}"): entry(p=1) for index in range(10_000)}
    book = Book().merged(Book(entries))
    assert len(book.entries) == 10_000 and alarms(book) == {"p": 1}
    assert time.process_time() - begun < 5
