"""A transformers causal LM as a DeepSpeed pipeline of its own, unmodified modules.

Every stage holds the whole model with the pieces of other stages left out (see plan.py) and runs the model's own
forward: the base model's on all stages, the causal LM's on the last. What the pipeline adds is which pieces are here,
where their weights come from, and how a message is laid out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.constants import PIPELINE_REPLICATED_PARAMETER_PATTERNS
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from deepspeed_sentinel.hf.adapters import taken_apart
from deepspeed_sentinel.hf.compat import CHECKPOINTING
from deepspeed_sentinel.hf.groups import Joined
from deepspeed_sentinel.hf.loss import CausalLMLoss
from deepspeed_sentinel.hf.partial import refuse_as_whole
from deepspeed_sentinel.hf.plan import PassThrough, Plan
from deepspeed_sentinel.hf.router import Router
from deepspeed_sentinel.hf.weights import Source, resolve

if TYPE_CHECKING:
    from peft import PeftModel

Message = torch.Tensor | tuple[torch.Tensor, ...]
_TIE = "embedding"


class _Tied(TiedLayerSpec):
    """The token embedding, at its own place and, with the same weight, at the head's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(_TIE, type(module), tied_weight_attr=["weight"])
        self._module = module

    def build(self, log: bool = False) -> nn.Module:
        return self._module


class CausalLMPipeline(PipelineModule):
    """What ``to_pipeline`` returns.

    Attributes:
        stage_model: the model with the pieces of other stages left out; its parameters are this stage's and have
            their usual names.
        plan: the pieces in order; layer i of the pipeline is ``plan.pieces[i]``.
        router: of a model with a router loss, else None.
        config: the model's.
        peft_model: what was given around the model, if it has adapters, else None.
        placeholders: zeros that the optimizer is given where it would have nothing to train on this stage.
    """

    _layer_specs: list[Any]

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        source: Source,
        num_stages: int,
        peft_model: Any = None,
        **options: Any,
    ) -> None:
        # plain attributes and not submodules: a stage's parameters are registered once, layer by layer
        self.__dict__["_model"] = (model, peft_model)
        self._runs = False
        self.plan = plan
        self.router = Router.of(model)
        self._source = source
        modules: list[Any] = [model.get_submodule(name) for name in plan.pieces]
        self._balance_by_layers = type(modules[plan.layers[0]]).__name__
        if plan.tied:
            modules[0] = modules[-1] = _Tied(modules[0])
        method = options.pop("partition_method", None) or f"type:^{self._balance_by_layers}$"
        loss = CausalLMLoss(model.loss_function, model.config.get_text_config().vocab_size, self.router)
        interval = options.pop("activation_checkpoint_interval", 0)
        super().__init__(modules, num_stages=num_stages, loss_fn=loss, partition_method=method, **options)
        self.stage_model.to(get_accelerator().device_name(self.local_rank))
        self.placeholders = nn.ParameterList()
        self._mark_for_clipping()
        if not any(parameter.requires_grad for parameter in self.parameters()):
            self.placeholder(0)
        if num_stages > 1:
            models = [model, model.base_model, *([] if peft_model is None else [peft_model])]
            refuse_as_whole(models, self.stage_id, num_stages, lambda: self._runs)
        if not set(self.plan.layers) & set(range(int(self._local_start), int(self._local_stop))):
            # a stage with embedding or head alone has nothing to recompute, where transformers raises an error
            for name in CHECKPOINTING:
                setattr(model, name, lambda *_, **__: None)
        if interval:
            # as set_checkpoint_interval() does, but for that of DeepSpeed 0.16.0
            self.activation_checkpoint_interval = interval
            self._precompute_checkpointable_values()

    @property
    def stage_model(self) -> PreTrainedModel:
        return self.__dict__["_model"][0]

    @property
    def peft_model(self) -> Any:
        return self.__dict__["_model"][1]

    @property
    def config(self) -> PreTrainedConfig:
        return self.stage_model.config

    @property
    def is_first(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last(self) -> bool:
        return self.stage_id == self.num_stages - 1

    def train(self, mode: bool = True) -> CausalLMPipeline:
        self.stage_model.train(mode)
        return super().train(mode)

    def forward(self, inputs: Message) -> Message:
        """The stage's part of the model.

        Args:
            inputs: on the first stage input ids, int64 [B, T], on the others the hidden state, [B, T, D]; alone or
                followed by the other parts of a message (see batches.py).

        Returns:
            On the last stage logits [B, T, V], on the others the hidden state; with the other parts of the message
            where there are any.
        """
        first, *others = inputs if isinstance(inputs, tuple) else (inputs,)
        if not self.is_first:
            first = self._with_placeholders(first)
        sums_N = next((part for part in others if part.is_floating_point()), None)
        mask_BT = next((part for part in others if part.dtype == torch.bool), None)
        positions_BT = next((part for part in others if part.dtype == torch.int64), None)
        arguments: dict[str, Any] = {"attention_mask": mask_BT, "position_ids": positions_BT, "use_cache": False}
        arguments["input_ids" if self.is_first else "inputs_embeds"] = first
        if self.router is not None:
            arguments["output_router_logits"] = True
        self._runs = True
        try:
            outputs = (self.stage_model if self.is_last else self.stage_model.base_model)(**arguments)
        finally:
            self._runs = False
        result = outputs.logits if self.is_last else outputs.last_hidden_state
        if self.is_first:
            result = self._with_placeholders(result)
        parts = [result]
        if self.router is not None:
            before_N = sums_N if sums_N is not None else self.router.nothing(result.device)
            parts.append(self.router.add(before_N, outputs.router_logits, mask_BT))
        if not self.is_last:
            parts += [part for part in (positions_BT, mask_BT) if part is not None]
        return parts[0] if len(parts) == 1 else tuple(parts)

    def hf_names(self) -> dict[str, str]:
        """Parameter names of this module to names in the transformers model."""
        names = {id(parameter): name for name, parameter in self.stage_model.named_parameters()}
        return {name: names[id(own)] for name, own in self.named_parameters() if id(own) in names}

    def placeholder(self, index: int) -> nn.Parameter:
        """A parameter that is no part of the model, for an optimizer's group that has nothing on this stage."""
        while len(self.placeholders) <= index:
            device = get_accelerator().device_name(self.local_rank)
            zero: Any = nn.Parameter(torch.zeros(1, dtype=self.stage_model.dtype, device=device))
            zero.ds_pipe_replicated, zero.model_parallel = False, True
            self.placeholders.append(zero)
        return self.placeholders[index]

    def _with_placeholders(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        for zero in self.placeholders:
            hidden_BTD = Joined.apply(hidden_BTD, zero)
        return hidden_BTD

    @property
    def universal_checkpoint_info(self) -> dict[str, Any]:
        """What DeepSpeed's universal checkpoint must know: the tied embedding is stored once."""
        return {PIPELINE_REPLICATED_PARAMETER_PATTERNS: [rf"tied_modules\.{_TIE}\.weight"] if self.plan.tied else []}

    def _build(self) -> None:
        """Called by PipelineModule when it knows which layers are local: drop the others, fill these with weights."""
        model, plan = self.stage_model, self.plan
        local = range(int(self._local_start), int(self._local_stop))
        here = {plan.pieces[index] for index in local}
        if plan.tied and plan.head in here:
            here.add(plan.embedding)
        for name in plan.pieces:
            if name not in here:
                model.set_submodule(name, PassThrough(model.get_submodule(name).to("meta")))
        self._source.fill(model, plan, local)
        if plan.tied and plan.head in here:
            model.get_submodule(plan.head).weight = model.get_submodule(plan.embedding).weight
        self._layer_specs = [
            spec if isinstance(spec, _Tied) else model.get_submodule(name)
            for name, spec in zip(plan.pieces, self._layer_specs, strict=True)
        ]
        super()._build()

    def _mark_for_clipping(self) -> None:
        # DeepSpeed's fp32 clipping takes the norm over stage 0 alone, unless parameters are marked like this.
        for parameter in self.parameters():
            parameter.model_parallel = not parameter.ds_pipe_replicated

    def _precompute_checkpointable_values(self) -> None:
        """Called by the engine and by ``set_checkpoint_interval``: the model checkpoints its own layers."""
        interval = self.activation_checkpoint_interval
        if interval not in (0, 1):
            raise ValueError(
                f"activation_checkpoint_interval is {interval}; allowed are 0 (off) and 1, which makes each decoder "
                "layer a checkpoint of its own."
            )
        enable, disable = (getattr(self.stage_model, name) for name in CHECKPOINTING)
        if interval:
            enable({"use_reentrant": False})
        else:
            disable()


def to_pipeline(
    model: PreTrainedModel | PeftModel | PreTrainedConfig | str | os.PathLike[str],
    num_stages: int,
    *,
    partition_method: str | None = None,
    activation_checkpoint_interval: int = 0,
    compute_loss_func: Callable[..., torch.Tensor] | None = None,
    seed: int = 42,
    **load_options: Any,
) -> CausalLMPipeline:
    """Turn a transformers causal LM into a DeepSpeed PipelineModule. To be called on every rank.

    Args:
        model: a model with its weights, which is taken over: pieces of other stages are removed from it; also a
            PeftModel with LoRA. Or a config, for random weights. Or the name or folder of a pretrained model, of which
            each stage reads its own weights.
        num_stages: number of stages; must divide the number of processes.
        partition_method: PipelineModule's; by default stages have equally many decoder layers, embedding and head
            come on top.
        activation_checkpoint_interval: 1 recomputes each decoder layer's activations in the backward pass.
        compute_loss_func: a loss in place of the model's own, called as transformers' Trainer does.
        seed: of random weights.
        load_options: with a name, what ``from_pretrained`` takes to find it (``revision``, ``token``, ``dtype``, ...).

    Raises:
        ValueError: the model cannot be split, or not into this many stages; names what and why.
    """
    if partition_method not in (None, "uniform", "parameters") and not partition_method.startswith("type:"):
        raise ValueError(
            f"partition_method is {partition_method!r}; allowed are 'parameters', 'uniform', 'type:REGEX' of module "
            "classes, or none, for equally many decoder layers a stage."
        )
    deepspeed.init_distributed(verbose=False)  # takes over a process group that torch has started
    world = dist.get_world_size()
    if num_stages < 1 or world % num_stages:
        fitting = [n for n in range(1, world + 1) if world % n == 0]
        raise ValueError(
            f"{num_stages} stages do not divide {world} processes; with so many, stages can be {fitting}. Change the "
            "number of stages or of processes."
        )
    given, peft_model = taken_apart(model)
    whole, source = resolve(given, seed, dict(load_options))
    plan = Plan.of(whole)
    if num_stages > len(plan.layers):
        raise ValueError(
            f"{num_stages} stages but only {len(plan.layers)} decoder layers: each stage needs at least one. Use at "
            f"most {len(plan.layers)} stages."
        )
    pipeline = CausalLMPipeline(
        whole,
        plan,
        source,
        num_stages,
        peft_model,
        partition_method=partition_method,
        activation_checkpoint_interval=activation_checkpoint_interval,
    )
    pipeline.loss_fn.custom = compute_loss_func
    return pipeline
