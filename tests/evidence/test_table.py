import re
from pathlib import Path

import numpy as np

from deepspeed_sentinel.evidence.table import NAMES, TABLE, comparable, in_words


def row(**values):
    return np.array([values.get(name, 1.0) for name in NAMES])


def test_names_are_unique_and_every_row_has_a_formula_and_a_source():
    assert len(set(NAMES)) == len(TABLE)
    assert all(entry.formula and entry.source for entry in TABLE)


def test_every_row_has_a_few_plain_words_and_the_page_has_the_same():
    page = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE))
    for entry in TABLE:
        assert 2 <= len(entry.meaning.split()) <= 14 and entry.name not in entry.meaning
        assert told[entry.name] == entry.meaning
    assert in_words("energy") == "energy (mean square of all values)"
    assert in_words("of another version") == "of another version"


def test_comparable_is_finite_for_all_but_missing_values():
    for value in (0.0, np.inf, 1e-45, 3e38):
        assert np.isfinite(comparable(np.full(len(NAMES), value))).all()
    assert np.isnan(comparable(np.full(len(NAMES), np.nan))).all()


def test_scales():
    unit = comparable(row(mean_abs=np.e, sign_flip=1.0, non_finite=7.0))
    assert unit[NAMES.index("mean_abs")] == 1.0
    np.testing.assert_allclose(unit[NAMES.index("sign_flip")], np.pi / 2)
    assert unit[NAMES.index("non_finite")] == 7.0
