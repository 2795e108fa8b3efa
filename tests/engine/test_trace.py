"""Spans are in a trace while a profiler runs, and cost nothing to speak of otherwise."""

import timeit

from torch.profiler import ProfilerActivity, profile

from deepspeed_sentinel.engine.trace import span


def test_a_span_is_in_the_trace_of_a_profiler():
    with span("before"):
        pass
    with profile(activities=[ProfilerActivity.CPU]) as seen, span("gate"), span("judge"):
        pass
    assert [event.name for event in seen.events() if event.name.startswith("sentinel")] == [
        "sentinel::gate",
        "sentinel::judge",
    ]


def test_without_a_profiler_it_costs_less_than_a_hundredth_of_a_millisecond():
    def one():
        with span("observe"):
            pass

    assert min(timeit.repeat(one, number=1000, repeat=5)) / 1000 < 1e-5
