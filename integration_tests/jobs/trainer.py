"""Job script of test_trainer.py.

    trainer.py plain        transformers' own Trainer, one process
    trainer.py pipeline     SentinelTrainer, 2 stages

Each rank writes JOB_FOLDER/<rank>.json: what trainer_runs.run_all returns.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from integration_tests import trainer_runs


def main(mode: str) -> None:
    torch.set_num_threads(1)
    folder, rank = Path(os.environ["JOB_FOLDER"]), os.environ["RANK"]
    if mode == "plain":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]  # no distributed training at all
        results = trainer_runs.run_all(folder, stages=None)
    else:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        results = trainer_runs.run_all(folder, stages=2)
    (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
