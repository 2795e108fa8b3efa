"""What the flag makes of each form of config, and what is called without a block. One process.

Writes JOB_FOLDER/0.json: {"lines": {form: lines of the log}, "refused": ..., "calls": ..., ...}; see test_flag.py.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType, DummyOptim
from deepspeed.utils import logger
from transformers.integrations import HfDeepSpeedConfig

FOLDER = Path(os.environ["JOB_FOLDER"])
PLAIN: dict[str, Any] = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "steps_per_print": 1_000_000,
    "zero_allow_untested_optimizer": True,
}
GUARDED = {**PLAIN, "sentinel": {"enabled": True}}


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "[sentinel]" in record.getMessage():
            self.lines.append(f"{record.levelname} {record.getMessage()}")


def initialize(config: Any = None, args: Any = None, **options: Any) -> Any:
    model = torch.nn.Linear(2, 2)
    return deepspeed.initialize(args, model=model, model_parameters=model.parameters(), config=config, **options)[0]


def by_accelerate() -> None:
    plugin = DeepSpeedPlugin(hf_ds_config={**GUARDED, "zero_optimization": {"stage": 1}})
    accelerator = Accelerator(cpu=True)
    state = accelerator.state  # accelerate has its plugin on accelerators only
    state.distributed_type, state.deepspeed_plugins = DistributedType.DEEPSPEED, plugin
    plugin.select(_from_accelerator_state=True)
    accelerator.deepspeed_engine_wrapped = None
    model = torch.nn.Linear(2, 2)
    accelerator.prepare(model, DummyOptim(model.parameters()))


def forms() -> dict[str, Callable[[], Any]]:
    text = json.dumps(GUARDED)
    (FOLDER / "plain.json").write_text(json.dumps(PLAIN), encoding="utf-8")
    (FOLDER / "config.json").write_text(text, encoding="utf-8")
    commented = FOLDER / "commented.json"
    commented.write_text(f"{{ // as people write them\n{text[1:-1]},\n}}", encoding="utf-8")
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    mistyped = {name: {**PLAIN, name: {"enabled": True}} for name in ("sentinal", "Sentinel", "sentinels")}
    return {
        "plain": lambda: initialize(PLAIN),
        "plain file": lambda: initialize(str(FOLDER / "plain.json")),
        "disabled": lambda: initialize({**PLAIN, "sentinel": {"enabled": False}}),
        "dict": lambda: initialize(GUARDED),
        "path": lambda: initialize(str(FOLDER / "config.json")),
        "comments": lambda: initialize(str(commented)),
        "base64": lambda: initialize(encoded),
        "args": lambda: initialize(args=SimpleNamespace(deepspeed_config=str(commented), local_rank=0)),
        "config_params": lambda: initialize(config_params=GUARDED),
        "zero 3": lambda: initialize({**GUARDED, "zero_optimization": {"stage": 3}}),
        "transformers": lambda: initialize(HfDeepSpeedConfig(encoded).config),
        "accelerate": by_accelerate,
        "unsaid": lambda: initialize({**PLAIN, "sentinel": {"action": "halt"}}),
        **{name: lambda name=name: initialize(mistyped[name]) for name in mistyped},
    }


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "was accepted"


def count_calls(config: Any) -> dict[str, dict[str, int]]:
    """Calls into the package while an engine is made, and while it trains."""
    here = str(Path(sys.modules["deepspeed_sentinel"].__file__ or "").parent)
    counts: dict[str, dict[str, int]] = {}
    counter: Counter[str] = Counter()

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(here):
            counter[frame.f_code.co_name] += 1

    sys.setprofile(profile)
    engine = initialize(config)
    counts["initialize"] = dict(counter)
    counter.clear()
    for _ in range(3):
        engine.backward(engine(torch.ones(2, 2)).sum())
        engine.step()
    sys.setprofile(None)
    counts["training"] = dict(counter)
    return counts


def main() -> dict[str, Any]:
    lines = Lines()
    logger.addHandler(lines)
    said = {}
    for name, make in forms().items():
        make()
        said[name], lines.lines = lines.lines, []
    kept = json.loads(json.dumps(PLAIN))
    initialize(kept)
    return {
        "lines": said,
        "calls": count_calls(dict(PLAIN)),
        "untouched": kept == PLAIN,
        "refused": {
            "no such file": refusal(lambda: initialize("no_such_file.json")),
            "two configs": refusal(lambda: initialize(GUARDED, SimpleNamespace(deepspeed_config="x", local_rank=0))),
            "a mistake": refusal(lambda: initialize({**PLAIN, "sentinel": {"enabled": True, "strike": 3}})),
        },
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    (FOLDER / "0.json").write_text(json.dumps(main()), encoding="utf-8")
    torch.distributed.destroy_process_group()
