"""A twin step of SentinelTrainer is a step of transformers' Trainer on the source's micro-batches alone."""

from __future__ import annotations

import json

import pytest

from integration_tests.harness import run_job
from integration_tests.hf_twins import CASES, STEPS
from integration_tests.variants import some

SCRIPT = "integration_tests/jobs/hf_twins.py"
NONE, APART, GIVEN, SOURCE, REFUSED = range(5)
CLOSE = 1e-5  # float32 sums in another order
KEYS = ("loss", "grad_norm")


class Both:
    """The runs in a pipeline of 2 stages, and those of one process on what was trained on there."""

    def __init__(self, folder, replicas, twins, names):
        args = ["pipeline", json.dumps(twins), *names]
        self.job = run_job(SCRIPT, 2, replicas, folder=folder / "pipeline", args=args, timeout=500).check()
        self.ranks, self.replicas = self.job.results, replicas
        file = folder / "trained_on.json"
        file.write_text(json.dumps({name: self.trained_on(name) for name in names}), encoding="utf-8")
        plain = run_job(SCRIPT, 1, 1, folder=folder / "plain", args=["plain", str(file)], timeout=300).check()
        self.plain = plain.results[0]

    def words(self, name):
        """Of each step: what each replica's column was."""
        first, last = self.ranks[: self.replicas], self.ranks[self.replicas :]
        words = [list(step) for step in zip(*(rank[name]["words"] for rank in first), strict=True)]
        assert words == [list(step) for step in zip(*(rank[name]["words"] for rank in last), strict=True)]
        return words

    def trained_on(self, name):
        read = [rank[name]["read"] for rank in self.ranks[: self.replicas]]
        trained = []
        for step, words in enumerate(self.words(name)):
            of = [words.index(SOURCE)] if SOURCE in words else range(self.replicas)
            trained.append([batch for replica in of for batch in read[replica][step]])
        return trained

    def check(self, name):
        for key in KEYS:
            expected = [entry[key] for entry in self.plain[name] if key in entry]
            assert len(expected) == STEPS
            for rank in self.ranks:
                found = [entry[key] for entry in rank[name]["history"] if key in entry]
                assert found == pytest.approx(expected, rel=CLOSE), (name, key)


NAMES = (*CASES, "native")
IN_EVERY_RUN = ("plain", "mixtral", "mixed", "refused", "stream", "native")


@pytest.fixture(scope="module")
def both(tmp_path_factory, selected):
    names = {*IN_EVERY_RUN, *selected("name")}
    return Both(tmp_path_factory.mktemp("hf_twins"), 2, {"every": 1}, [name for name in NAMES if name in names])


@pytest.mark.parametrize("name", some(NAMES, IN_EVERY_RUN))
def test_loss_and_gradient_norm_are_those_of_the_source_alone(both, name):
    both.check(name)


def test_the_runs_do_what_they_are_named_for(both):
    for name in both.ranks[0]:
        words = both.words(name)
        assert len(words) == STEPS
        if name == "refused":
            assert words == [[REFUSED, REFUSED]] * STEPS
        else:
            assert all(sorted(step) == [GIVEN, SOURCE] for step in words), name
    assert len({step.index(SOURCE) for step in both.words("plain")}) == 2, "each replica is the source of some step"
    lengths = [{len(batch["input_ids"][0]) for batch in step} for step in both.trained_on("mixed")]
    assert all(len(one) == 2 for one in lengths)
    assert [len(step) for step in both.trained_on("stream")] == [2, 3, 3]
    tokens = [
        [sum(token != -100 for batch in rank["plain"]["read"][step] for row in batch["labels"] for token in row[1:])]
        for rank in both.ranks[:2]
        for step in range(STEPS)
    ]
    assert all(tokens[step] != tokens[STEPS + step] for step in range(STEPS))


def test_refused_twin_steps_are_told_of_once(both):
    said = [
        line for line in both.job.stderr[0].splitlines() + both.job.stdout[0].splitlines() if "could not be" in line
    ]
    assert len(said) == 1 and "1 of 1 twin steps" in said[0] and "fixed length" in said[0]
    assert not any("could not be made" in text for text in (*both.job.stdout[1:], *both.job.stderr[1:]))


@pytest.mark.long
def test_with_fewer_columns_the_others_are_left_out(tmp_path):
    both = Both(tmp_path, 4, {"every": 1, "columns": 3}, ["plain"])
    assert all(sorted(step) == [APART, GIVEN, GIVEN, SOURCE] for step in both.words("plain"))
    both.check("plain")
