"""Whose rows an evaluation counts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepspeed_sentinel.hf.evaluation import gather_replicas

STAGES, REPLICAS, ROWS = 2, 3, 2
# Replica r has rows 10 r and 10 r + 1, on each of its stages.
GATHERED = torch.tensor([10 * replica + row for replica in range(REPLICAS) for row in range(ROWS)] * STAGES)


def gathered(out, remainder=0, tensor=GATHERED):
    state = SimpleNamespace(end_of_dataloader=remainder > 0, remainder=remainder)
    accelerator = SimpleNamespace(gather=lambda mine: tensor, gradient_state=state)
    return gather_replicas(accelerator, tensor[:ROWS], STAGES, np.array(out, bool))


@pytest.mark.parametrize(
    ("out", "remainder", "kept"),
    [
        ([0, 0, 0], 0, [0, 1, 10, 11, 20, 21]),
        ([0, 0, 0], 5, [0, 1, 10, 11, 20]),
        ([0, 1, 0], 0, [0, 1, 20, 21]),
        ([0, 1, 0], 5, [0, 1, 20]),
        ([1, 0, 1], 3, [10]),
        ([1, 1, 1], 0, []),
    ],
)
def test_rows_of_columns_with_convicted_workers_count_no_more_than_those_that_are_there_twice(out, remainder, kept):
    assert gathered(out, remainder).tolist() == kept


def test_logits_go_with_their_rows():
    logits = torch.arange(STAGES * REPLICAS * ROWS * 4).view(-1, 4) % 24
    assert gathered([1, 0, 0], tensor=logits).tolist() == logits[ROWS : REPLICAS * ROWS].tolist()
