"""Which causal LMs of the installed transformers can be cut into stages, with their default configs.

    python benchmarks/hf_architectures.py

Builds each on the meta device and reads its plan; takes about a minute. "splits" means that the two checks of
deepspeed_sentinel/hf/plan.py pass, not that the model was trained.
"""

from __future__ import annotations

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deepspeed_sentinel.hf.plan import Plan


def verdict(kind: str) -> tuple[str, str] | None:
    """("splits" | "refused" | "not built", reason), or None for a model that declares no plan."""
    try:
        config = CONFIG_MAPPING[kind]()
        if not getattr(config, "base_model_pp_plan", None):
            return None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # default configs that need more than defaults fail in their own ways
        return "not built", f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        Plan.of(model)
    except ValueError as error:
        return "refused", str(error).split("stages: ")[-1]
    return "splits", ""


def main() -> None:
    transformers.logging.set_verbosity_error()
    found = {kind: verdict(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for outcome in ("splits", "refused", "not built"):
        kinds = {kind: result[1] for kind, result in found.items() if result and result[0] == outcome}
        print(f"\n{len(kinds)} {outcome}: {', '.join(kinds)}")
        for kind, reason in kinds.items():
            if reason:
                print(f"  {kind}: {reason[:160]}")
    without = sum(result is None for result in found.values())
    print(f"\n{without} declare no plan (transformers {transformers.__version__})")


if __name__ == "__main__":
    main()
