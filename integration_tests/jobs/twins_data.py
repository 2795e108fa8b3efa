"""Job script of test_twins_data.py: twin steps on whatever loaders yield, in one job of 2 stages x 2 replicas.

    twins_data.py FOLDER

Writes JOB_FOLDER/<rank>.json: {way in: [[the label that was trained on, for each micro-batch], for each step]} of the
last stage, and of the first the tokens of its inputs, each beside what the rank's column was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import RepeatingLoader
from torch.utils.data import DataLoader

import deepspeed_sentinel

FOLDER = Path(os.environ.get("JOB_FOLDER", "."))
STEPS, MICRO_BATCHES, WIDTH = 2, 2, 4


def number(replica: int, index: int) -> int:
    return 1000 * replica + index


class Embed(torch.nn.Module):
    """Takes a tensor or several; the first tells the number of the micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, WIDTH)
        self.seen: list[int] = []

    def forward(self, inputs: Any) -> torch.Tensor:
        first = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
        for tensor in () if isinstance(inputs, torch.Tensor) else inputs[1:]:
            assert int(tensor.flatten()[0]) == int(first[0, 0]) % 2, "a part of another micro-batch"
        self.seen.append(int(first[0, 0]))
        return self.linear(first[:, :1].float() / 1000)


class Loss:
    """Of tensors, or of a dict of them; remembers the number of each micro-batch."""

    __name__ = "loss"

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, outputs: torch.Tensor, labels: Any) -> torch.Tensor:
        if isinstance(labels, dict):
            assert isinstance(labels["parts"], list) and labels["number"] == int(labels["parts"][0][0, 0])
            labels = labels["parts"]
        first = labels if isinstance(labels, torch.Tensor) else labels[0]
        self.seen.append(int(first[0, 0]))
        return outputs.mean() + first.float().mean() / 1000


class Rows(torch.utils.data.Dataset):
    """DeepSpeed hands every second row to each of two replicas; two make a micro-batch."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Any:
        row = torch.full((WIDTH,), number(index % 2, index // 4))
        return row, row


def batches(replica: int, make: Callable[[torch.Tensor], Any], count: int = 1000) -> Iterator[Any]:
    for index in range(count):
        yield make(torch.full((2, WIDTH), number(replica, index)))


def several(ids: torch.Tensor) -> Any:
    odd = ids % 2
    return [ids, odd.bool(), odd.int(), odd.bfloat16(), odd.t(), odd[:, :1].expand(2, 9)], [ids, odd.bool()]


def ways(engine: Any, replica: int) -> dict[str, Callable[[], Any]]:
    """{name: what gives the iterator for ``train_batch``; None after ``set_dataiterator``}."""

    def with_batch_fn() -> None:
        engine.set_dataiterator(iter(range(1000)))
        engine.set_batch_fn(lambda index: 2 * (torch.full((2, WIDTH), number(replica, index)),))

    def set_iterator() -> None:
        engine.set_dataiterator(batches(replica, lambda ids: (ids, ids)))

    rows = [torch.full((WIDTH,), number(replica, index // 2)) for index in range(1000)]
    own = [(row, row) for row in rows]
    one_stage = (lambda ids: (ids, None)) if engine.stage_id == 0 else (lambda ids: (None, ids))
    return {
        "training_data": lambda: None,
        "train_batch": lambda: batches(replica, lambda ids: (ids, ids)),
        "set_dataiterator": set_iterator,
        "set_batch_fn": with_batch_fn,
        "repeating": lambda: RepeatingLoader(DataLoader(own, batch_size=2)),
        "one_stage": lambda: batches(replica, one_stage),
        "several": lambda: batches(replica, several),
        "dict": lambda: batches(replica, lambda ids: (ids, {"parts": [ids, (ids,)], "number": int(ids[0, 0])})),
    }


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    loss = Loss()
    layers = [Embed(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 1)]
    module = deepspeed.pipe.PipelineModule(layers=layers, num_stages=2, loss_fn=loss, partition_method="uniform")
    engine, *_ = deepspeed_sentinel.initialize(
        model=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1e-3),
        training_data=Rows(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "steps_per_print": 10**9,
            "sentinel": {"enabled": True, "output_dir": str(FOLDER / "logs"), "seed": 3, "twins": {"every": 1}},
        },
    )
    replica = engine.grid.get_data_parallel_id()
    seen = layers[0].seen if engine.stage_id == 0 else loss.seen
    result: dict[str, Any] = {}

    def train(name: str, data: Any, steps: int = STEPS) -> None:
        said = result.setdefault(name, [])
        for _ in range(steps):
            seen.clear()
            end = ""
            try:
                engine.train_batch(data)
            except StopIteration as error:
                end = type(error).__name__
            said.append({"word": engine.sentinel._twins.word, "seen": list(seen), "end": end})

    for name, way in ways(engine, replica).items():
        engine.batch_fn = None
        train(name, way())
    engine.batch_fn = None
    file = FOLDER / f"{torch.distributed.get_rank()}.json"
    file.write_text(json.dumps(result), encoding="utf-8")
    # Both replicas have a step and a half. The last stage then waits for the first, with or without a Sentinel.
    train("ended", batches(replica, lambda ids: (ids, ids), count=MICRO_BATCHES + 1), steps=2)
    file.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
