"""Part of jobs/hf.py: every family as a pipeline of 3 x 2 and 2 x 3, and the same model trained in one piece.

Each rank records the largest differences of its own part from the whole model: of the first step's gradients before
clipping, and of the weights after ``STEPS`` steps.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch

from deepspeed_sentinel import hf
from integration_tests import groups
from integration_tests.hf_models import batches, build, configs

STEPS = 2
MICRO_BATCHES = 6  # of a step, over all replicas
OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
CLIP = 1.0
HELD_OUT = 99  # a step that is not trained on
# Attention ignores an offset common to all keys: the gradient of a key's bias is rounding noise, which Adam blows up.
KEY_BIASES = ("k_proj.bias", "query_key_value.bias")
EXTRA = ("gemma2",)
CHECKPOINTED = {"activation_checkpoint_interval": 1}
# name: (family, stages, kind of batches, options of to_pipeline)
CASES: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    **{f"{family}/3": (family, 3, "padded", {}) for family in configs()},
    **{f"{family}/2": (family, 2, "padded", {}) for family in configs() if family not in EXTRA},
    "llama/plain": ("llama", 3, "plain", {}),
    "llama/packed": ("llama", 3, "packed", {}),
    "qwen2/packed": ("qwen2", 3, "packed", {}),
    "llama/checkpointed": ("llama", 3, "padded", CHECKPOINTED),
    "mixtral/checkpointed": ("mixtral", 3, "padded", CHECKPOINTED),
    # the last stage holds the head alone
    "llama/uniform": ("llama", 3, "padded", {**CHECKPOINTED, "partition_method": "uniform"}),
    "gemma/1": ("gemma", 1, "padded", {}),
}


def unsplit(model: Any, kind: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train the whole model as the Trainer does; losses of each step and the first step's gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    losses, gradients = [], {}
    for step in range(STEPS):
        given = batches(step, MICRO_BATCHES, kind)
        items = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in given)
        total = 0.0
        for batch in given:
            loss = model(**batch, use_cache=False, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, gradients


def largest(mine: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of any tensor from the expected one, relative to the expected one's largest entry."""
    worst = 0.0
    for name, tensor in mine.items():
        if name.endswith(KEY_BIASES):
            continue
        scale = float(expected[name].abs().max()) or 1.0
        worst = max(worst, float((tensor - expected[name]).abs().max()) / scale)
    return worst


def reference(family: str, kind: str, folder: Path) -> None:
    """Train the model in one piece and leave what came of it in a file, for all ranks."""
    whole = build(configs()[family])
    losses, gradients = unsplit(whole, kind)
    whole.eval()
    with torch.no_grad():
        outputs = [whole(**batch, use_cache=False) for batch in batches(HELD_OUT, MICRO_BATCHES, kind)]
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    evaluation = sum(float(output.loss) for output in outputs) / MICRO_BATCHES
    found = {"losses": losses, "gradients": gradients, "weights": weights, "evaluation": evaluation}
    found["logits"] = outputs[0].logits
    torch.save(found, folder / f"{family}-{kind}.pt")


def run(
    family: str, stages: int, kind: str, options: dict[str, Any], expected: dict[str, Any], saved: Path
) -> dict[str, Any]:
    before = groups.known()
    pipeline = hf.to_pipeline(build(configs()[family]), stages, **options)
    optimizer = torch.optim.AdamW(pipeline.parameters(), **OPTIMIZER)
    gradients: dict[str, torch.Tensor] = {}
    engine, *_ = deepspeed.initialize(
        model=pipeline,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": MICRO_BATCHES * stages // torch.distributed.get_world_size(),
            "gradient_clipping": CLIP,
            "steps_per_print": 10**9,
        },
    )
    names = pipeline.hf_names()

    def keep(*_: Any) -> None:
        if not gradients:
            gradients.update({names[name]: p.grad.clone() for name, p in pipeline.named_parameters()})

    # The gradients are complete when the engine is about to clip them.
    clip, engine.clip_fp32_gradients = engine.clip_fp32_gradients, lambda: (keep(), clip())
    replica, replicas = engine.grid.get_data_parallel_id(), engine.grid.data_parallel_size
    losses = []
    for step in range(STEPS):
        own = batches(step, MICRO_BATCHES, kind)[replica::replicas]
        losses.append(float(engine.train_batch(hf.step_batches(engine, own))))
    own = [hf.to_batch(batch) for batch in batches(HELD_OUT, MICRO_BATCHES, kind)[replica::replicas]]
    hf.announce_shapes(engine, own)
    evaluated = float(engine.eval_batch(iter(own), num_micro_batches=len(own)))
    weights = {names[name]: parameter.detach() for name, parameter in pipeline.named_parameters()}
    result = {
        "losses": losses,
        "loss": max(abs(a - b) / b for a, b in zip(losses, expected["losses"], strict=True)),
        "evaluation": abs(evaluated - expected["evaluation"]) / expected["evaluation"],
        "gradient": largest(gradients, expected["gradients"]),
        "weight": largest(weights, expected["weights"]),
        "names": sorted(weights),
        "all_names": sorted(expected["weights"]),
        "layers": [int(part) for part in pipeline.parts],
    }
    hf.save_pretrained(pipeline, saved)
    engine.destroy()
    groups.end(before)
    return result


def refusals() -> dict[str, str]:
    """What is said of pipelines that cannot be, with 6 processes."""
    llama = configs()["llama"]
    asked: dict[str, tuple[Any, int, dict[str, Any]]] = {
        "stages": (llama, 4, {}),
        "layers": (llama, 6, {}),
        "interval": (llama, 3, {"activation_checkpoint_interval": 2}),
        "partition": (llama, 3, {"partition_method": "best"}),
    }
    said = {}
    for name, (config, stages, options) in asked.items():
        try:
            hf.to_pipeline(config, stages, **options)
            said[name] = "no error"
        except ValueError as error:
            said[name] = str(error)
    return said


def run_all(wanted: Sequence[str], folder: Path) -> dict[str, Any]:
    """All cases, one after the other, on every rank; the references are shared out over the ranks."""
    rank, results = torch.distributed.get_rank(), {}
    references = sorted({(CASES[name][0], CASES[name][2]) for name in wanted})
    for family, kind in references[rank :: torch.distributed.get_world_size()]:
        reference(family, kind, folder)
    torch.distributed.barrier()
    for name in wanted:
        clock = time.perf_counter()
        family, _, kind, _ = CASES[name]
        results[name] = run(*CASES[name], torch.load(folder / f"{family}-{kind}.pt"), folder / f"saved-{name}")
        results[name]["seconds"] = time.perf_counter() - clock
        gc.collect()
    return results
