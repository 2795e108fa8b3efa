"""The benchmark that docs/wiring.md has its numbers from deals and judges with the code of a run."""

import runpy
from pathlib import Path

import numpy as np

from deepspeed_sentinel.mesh import Mesh

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "dealing.py"


def test_all_who_are_bad_are_convicted_and_as_soon_as_derived():
    measured = runpy.run_path(str(BENCHMARK))
    mesh, bad = Mesh(5, 3), np.zeros((5, 3), bool)
    bad[[1, 2, 3], [0, 1, 2]] = True
    result = measured["Healing"](mesh, bad, 0).run()
    assert result["steps"] <= 4 * measured["expected"](mesh, 1)["steps"]
