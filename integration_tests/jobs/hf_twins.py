"""Job script of test_hf_twins.py.

    hf_twins.py pipeline TWINS RUN...   SentinelTrainer in 2 stages, with a "twins" block in JSON
    hf_twins.py plain FILE              transformers' own Trainer, one process, on the micro-batches in a JSON file

Each rank writes JOB_FOLDER/<rank>.json: what the function of hf_twins.py returns.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from integration_tests import hf_twins


def main(mode: str, given: str, *names: str) -> None:
    torch.set_num_threads(1)
    folder, rank = Path(os.environ["JOB_FOLDER"]), os.environ["RANK"]
    if mode == "plain":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]  # no distributed training at all
        results = hf_twins.in_one_process(folder, json.loads(Path(given).read_text(encoding="utf-8")))
    else:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        results = hf_twins.in_pipeline(folder, names, json.loads(given))
    (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
