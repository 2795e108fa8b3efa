"""Places are given out for the least sum."""

from itertools import permutations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sentinel.response.assignment import cheapest


@given(st.integers(0, 6), st.integers(0, 3), st.sampled_from([2, 5, 1 << 58]), st.integers(0, 1 << 30))
@settings(max_examples=200, deadline=None)
def test_no_other_choice_costs_less(workers, spare, most, seed):
    generator = np.random.default_rng(seed)
    places = max(workers + spare, 1)
    cost = generator.integers(0, most, (workers, places))
    stands = generator.permutation(places)[:workers]
    everybody = np.arange(workers)
    place = cheapest(cost, stands)
    assert len(set(place.tolist())) == workers
    least = min(int(cost[everybody, list(choice)].sum()) for choice in permutations(range(places), workers))
    assert cost[everybody, place].sum() == least


def test_the_worked_example_of_the_docstring():
    assert cheapest(np.array([[0, 1, 5], [0, 4, 4]]), np.array([0, 1])).tolist() == [1, 0]


def test_who_stands_best_stays():
    cost = np.ones((3, 4), np.int64)
    assert cheapest(cost, np.array([2, 0, 3])).tolist() == [2, 0, 3]
