"""Job script of test_huggingface.py.

    hf.py plain         transformers' own Trainer, one process
    hf.py pipeline      the families and SentinelTrainer, 6 processes; names of cases after it select some

Each rank writes JOB_FOLDER/<rank>.json: {"families": ..., "training": ...}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from integration_tests import hf_families, hf_training


def main(mode: str, *wanted: str) -> None:
    torch.set_num_threads(1)
    folder, rank = Path(os.environ["JOB_FOLDER"]), os.environ["RANK"]
    results: dict[str, Any] = {}
    begin = time.perf_counter()
    if mode == "plain":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]  # no distributed training at all
        results["training"] = hf_training.run_all(folder / "plain", stages=None)
    else:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        results["families"] = hf_families.run_all(
            [name for name in hf_families.CASES if not wanted or name in wanted], folder
        )
        results["refusals"] = hf_families.refusals()
        results["families_seconds"] = time.perf_counter() - begin
        if not wanted or "training" in wanted:
            results["training"] = hf_training.run_all(folder / "pipeline", stages=3)
    results["seconds"] = time.perf_counter() - begin
    path = folder / f"{rank}.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
