"""One training run inside a job: what to build, how long to train, what to record. JSON both ways."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32_zero1": {"zero_optimization": {"stage": 1}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1000}},
    "fp16_zero1": {
        "fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1000},
        "zero_optimization": {"stage": 1},
    },
    # Without ZeRO DeepSpeed accumulates in bf16 only, with ZeRO-1 in fp32 if told so.
    # The first two end up with BF16_Optimizer, the third with DeepSpeedZeroOptimizer.
    "bf16": {"bf16": {"enabled": True}},
    "bf16_zero1": {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
    },
    "bf16_zero1_bf16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
}
MASKS = (None, "int", "bool", "bool_cast", "float")


@dataclass(frozen=True)
class Scenario:
    """A run of ``steps`` training steps from a fresh model.

    Attributes:
        name: key of the results; also the name of the files that hold the weights.
        precision: a key of ``PRECISIONS``.
        sentinel: the "sentinel" block, or None for plain ``deepspeed.initialize``.
        steps: the global step to train up to.
        seed: of the weights; the data have ``data_seed``, which is the same unless given.
        micro_batches, micro_batch_size, lengths, hidden, layers_per_stage: sizes; ``lengths`` holds the
            sequence length of each step, from the start again after the last.
        models: module whose ``build_model`` and ``micro_batches`` are used.
        kind: which of its models, where it has several.
        tuple_messages: send (hidden, positions, mask) with a mask of this kind in place of hidden alone:
            "int", "bool" (sent as it is), "bool_cast" (DeepSpeed's ``has_bool_tensors``: sent as half) or
            "float" (a learnt additive bias, which has a gradient).
        tied: share the embedding with the head (TiedLayerSpec).
        dynamic_shape: PipelineModule's flag.
        reset_shape: call ``engine.reset_activation_shape()`` before each step.
        activation_checkpoint_interval: PipelineModule's.
        data_replicas: data of these replicas, one for each replica of the mesh; by default 0, 1, 2, ...
        other_text_from: of each replica, the step from which on its text is of another kind (JSON in place of Python);
            by default none ever is.
        optimizer, learning_rate, gradient_clipping: "adam" or "sgd" of torch.
        evaluate_every: run ``eval_batch`` after every this many steps; 0 is never.
        save: {"directory": ..., "after_step": n}, or several; load: {"directory": ...} before the first step.
        hook: "module:function", called as function(engine, step) before each step on each rank.
        expect_error: an error that every rank raises is what is wanted: go on with the next scenario.
        config: merged over the DeepSpeed config, top-level keys only.
    """

    name: str
    precision: str = "fp32"
    sentinel: dict[str, Any] | None = None
    steps: int = 4
    seed: int = 0
    data_seed: int | None = None
    micro_batches: int = 2
    micro_batch_size: int = 2
    lengths: tuple[int, ...] = (16,)
    hidden: int = 32
    layers_per_stage: int = 1
    models: str = "integration_tests.models"
    kind: str = ""
    tuple_messages: str | None = None
    tied: bool = False
    dynamic_shape: bool = False
    reset_shape: bool = False
    activation_checkpoint_interval: int = 0
    data_replicas: tuple[int, ...] | None = None
    other_text_from: tuple[int, ...] | None = None
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    gradient_clipping: float = 0.0
    evaluate_every: int = 0
    save: dict[str, Any] | tuple[dict[str, Any], ...] | None = None
    load: dict[str, Any] | None = None
    hook: str | None = None
    expect_error: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, allowed: {sorted(PRECISIONS)}.")
        if self.tuple_messages not in MASKS:
            raise ValueError(f"tuple_messages is {self.tuple_messages!r}, allowed: {MASKS}.")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Scenario:
        lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        return Scenario(**{**fields, **lists})

    def with_(self, **changes: Any) -> Scenario:
        """A copy with other values, as in ``plain.with_(name="guarded", sentinel={"enabled": True})``."""
        return dataclasses.replace(self, **changes)

    def deepspeed_config(self) -> dict[str, Any]:
        """The whole DeepSpeed config of this run, the sentinel block included."""
        optimizer: dict[str, Any] = {"type": "SGD", "params": {"lr": self.learning_rate}}
        if self.optimizer == "adam":
            # torch's own: DeepSpeed's needs a compiled op
            optimizer = {"type": "Adam", "params": {"lr": self.learning_rate, "torch_adam": True}}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.micro_batches,
            "optimizer": optimizer,
            "gradient_clipping": self.gradient_clipping,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1_000_000,
            **PRECISIONS[self.precision],
        }
        if self.sentinel is not None:
            config["sentinel"] = self.sentinel
        return {**config, **self.config}
