"""The Trainer of transformers, with a guarded DeepSpeed pipeline as its engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import deepspeed
import numpy as np
import torch
from accelerate.utils import DistributedType, DummyOptim, DummyScheduler
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper, DeepSpeedSchedulerWrapper
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, TrainerControl, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_init, deepspeed_load_checkpoint
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from deepspeed_sentinel.engine import access
from deepspeed_sentinel.engine.launch import initialize
from deepspeed_sentinel.engine.tied import reduce_rightly
from deepspeed_sentinel.hf.batches import ALLOWED, announce_shapes, label_tokens
from deepspeed_sentinel.hf.by_replica import TrainerByReplica
from deepspeed_sentinel.hf.callback import has_news, log_entries, tell
from deepspeed_sentinel.hf.compute_loss import ComputeLoss
from deepspeed_sentinel.hf.data import prepare_by_replica
from deepspeed_sentinel.hf.evaluation import evaluate_batch, gather_replicas, share_logits
from deepspeed_sentinel.hf.groups import align_groups
from deepspeed_sentinel.hf.options import check_arguments, check_config, engine_config, given_config
from deepspeed_sentinel.hf.overrides import check_overrides
from deepspeed_sentinel.hf.pipeline import to_pipeline
from deepspeed_sentinel.hf.saving import save_pretrained
from deepspeed_sentinel.hf.steps import MicroBatch, evaluation_batch, training_batches

if TYPE_CHECKING:
    from peft import PeftModel

_REFUSED = {
    "model_init": "pass model",
    "optimizers": "set TrainingArguments(optim=..., lr_scheduler_type=...) or pass optimizer_cls_and_kwargs: an "
    "optimizer made before the split does not have a stage's parameters",
}


class SentinelTrainer(TrainerByReplica):
    """``transformers.Trainer`` for a causal LM in pipeline stages.

    Two keys of the DeepSpeed config in ``TrainingArguments.deepspeed`` are all that is new:
    ``"pipeline": {"stages": 4}`` and, to be guarded, ``"sentinel": {"enabled": true}``. Processes are stages times
    replicas. ``gradient_accumulation_steps`` is the number of micro-batches in flight; the more, the better the
    stages are used.

    Args:
        model: a causal LM, a PeftModel with LoRA around one, its config (for random weights), or the name or folder
            of a pretrained one (each stage then reads only its own weights). A model is taken over: pieces of other
            stages are removed from it.
        args: must have a DeepSpeed config with a pipeline.
        data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func, others: as for Trainer.

    Attributes:
        pipeline: the PipelineModule; ``model`` is this stage's part of the model, and with several stages refuses to be
            used as the whole (PartialModel).
        sentinel: the Sentinel, from the start of training, or None if the config has it off.

    Raises:
        ValueError: something that a pipeline cannot do; names it, its value and what to do.
    """

    control: TrainerControl
    _created_lr_scheduler: bool

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | PreTrainedConfig | str | os.PathLike[str],
        args: TrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        **others: Any,
    ) -> None:
        for name, advice in _REFUSED.items():
            given = others.get(name)
            if any(part is not None for part in given) if isinstance(given, tuple) else given is not None:
                raise ValueError(f"SentinelTrainer does not support {name}: {advice}.")
        config = given_config(args)
        check_overrides(type(self), SentinelTrainer, set(config))
        check_arguments(args)
        self.mesh = check_config(config, args)
        # transformers counts samples by processes; the config we hand to the engine counts by replicas
        filled = args.hf_deepspeed_config
        filled.mismatches = [line for line in filled.mismatches if not line.startswith("- ds train_batch_size=")]
        self.pipeline = to_pipeline(
            model,
            self.mesh.stages,
            partition_method=config["pipeline"].get("partition"),
            seed=args.seed,
        )
        # compute_loss is looked up when it is called, as the Trainer does
        self._loss = ComputeLoss(
            self.pipeline.loss_fn, self.pipeline.stage_model, lambda *given, **named: self.compute_loss(*given, **named)
        )
        self.pipeline.loss_fn = self._loss
        self._held: list[MicroBatch] = []
        self._rate = 0.0
        super().__init__(
            self.pipeline.stage_model if self.pipeline.peft_model is None else self.pipeline.peft_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_loss_func=compute_loss_func,
            **others,
        )
        self._signature_columns = [*ALLOWED, "label", "label_ids"]

    @property
    def sentinel(self) -> Any:
        return getattr(self.deepspeed, "sentinel", None)

    # ---- data: by replica ----

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_data_loader = self._prepare_data_loader
        if self.args.use_cpu:
            # accelerate knows DeepSpeed on accelerators only, but the pipeline engine runs on CPUs too
            state = self.accelerator.state
            state.distributed_type = DistributedType.DEEPSPEED
            state.deepspeed_plugins = self.args.deepspeed_plugin
            self.is_deepspeed_enabled = True

    def _prepare_data_loader(self, data_loader: DataLoader, *_: Any, **__: Any) -> DataLoader:
        replica = self.pipeline.mpu().get_data_parallel_id()
        return prepare_by_replica(self.accelerator, data_loader, replica, self.mesh.replicas)

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(*args)
        if self.args.train_sampling_strategy == "group_by_length" and sampler is not None:
            # all stages must draw the same order, however much randomness each has used up
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler.generator = torch.Generator().manual_seed(seed)
        return sampler

    def get_tp_size(self) -> int:
        """Ranks that work on the same batch: here the stages. Trainer divides by it what it counts over processes."""
        return self.mesh.stages

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Label tokens of the step: of all replicas, or with ``average_tokens_across_devices=False`` of this one."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            return None
        count = label_tokens(batch_samples).to(device)
        if self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum() // self.mesh.stages
        return count

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.mesh.stages

    # ---- engine ----

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[Any, DataLoader]:
        if self._created_lr_scheduler:
            self.lr_scheduler = None
            self._created_lr_scheduler = False
        self._release_engine()
        self._held = []
        self.optimizer, self.lr_scheduler = deepspeed_init(self, num_training_steps=max_steps)
        given: dict[str, Any] = {}
        if isinstance(self.optimizer, DummyOptim):  # the config has an "optimizer"
            given["model_parameters"] = self.optimizer.params or [self.pipeline.placeholder(0)]
        else:
            align_groups(self.optimizer.param_groups, self.pipeline.placeholder)
            given["optimizer"] = self.optimizer
        if isinstance(self.lr_scheduler, DummyScheduler):  # so it has, or a "scheduler"
            if self.lr_scheduler.lr_scheduler_callable is not None:
                given["lr_scheduler"] = self.lr_scheduler.lr_scheduler_callable
        else:
            given["lr_scheduler"] = self.create_scheduler(max_steps, self.optimizer)
        engine, optimizer, scheduler = self._start_engine(initialize, **given)
        self.optimizer = DeepSpeedOptimizerWrapper(optimizer)
        self.lr_scheduler = DeepSpeedSchedulerWrapper(scheduler, self.optimizer)
        self.accelerator._optimizers.append(self.optimizer)
        if resume_from_checkpoint is not None:
            # with adapters the frozen weights are in no checkpoint
            strict = self.pipeline.peft_model is None
            deepspeed_load_checkpoint(engine, resume_from_checkpoint, load_module_strict=strict)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return engine, train_dataloader

    def _start_engine(self, start: Callable[..., Any], trains: bool = True, **given: Any) -> tuple[Any, Any, Any]:
        filled = self.accelerator.state.deepspeed_plugin.hf_ds_config.config
        config = engine_config(filled, self.args, self.mesh, trains)
        engine, optimizer, _, scheduler = start(model=self.pipeline, config=config, **given)
        access.keep_gradient_norm(engine)
        self._loss.gradient_over = access.gradient_divisor(engine)
        access.keep_universal_info(engine, self.pipeline.universal_checkpoint_info)
        if not hasattr(engine, "sentinel"):
            reduce_rightly(engine)
        self.deepspeed = self.model_wrapped = engine
        self.accelerator.deepspeed_engine_wrapped = DeepSpeedEngineWrapper(engine)
        self.accelerator._models.append(engine)
        return engine, optimizer, scheduler

    def _release_engine(self) -> None:
        if self.deepspeed is None:
            return
        if self.sentinel is not None:
            self.sentinel.detach()
        self.deepspeed.destroy()
        self.deepspeed, self.model_wrapped = None, self.model

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hold a micro-batch back; with the last of a step run them all through the pipeline.

        What an epoch leaves over, fewer micro-batches than a step takes, is run with the next step, as the Trainer
        adds up their gradients.

        Returns:
            The step's loss with its last micro-batch, zero before.
        """
        self._held.append(MicroBatch(inputs, num_items_in_batch, self.current_gradient_accumulation_steps))
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=self.args.device)
        held, self._held = self._held, []
        engine = self.deepspeed
        if len(held) != engine.micro_batches:  # the last step of an epoch, and after what is left of one
            engine.set_train_batch_size(len(held) * engine.micro_batch_size * self.mesh.replicas)
        self._rate = super()._get_learning_rate()
        batches = training_batches(self, self._loss, held, self.mesh.replicas)
        announce_shapes(engine, batches)
        loss = engine.train_batch(iter(batches))
        if self.sentinel is not None and has_news(verdict := self.sentinel.last_verdict):
            told = (self.callback_handler, self.args, self.state, self.control)
            self.control = tell(*told, verdict, self.sentinel.who)
        return loss.detach().to(self.args.device)

    def _get_learning_rate(self) -> float:
        """The rate of the step just made; the engine has already moved its scheduler on."""
        return self._rate if self.is_in_train else super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.sentinel is not None and "loss" in logs:
            logs.update(log_entries(self.sentinel))
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluation_loop(self, dataloader: DataLoader, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's; rows of columns that a convicted worker serves are in no evaluation, but are predicted."""
        if self.deepspeed is None:
            self._start_engine(deepspeed.initialize, trains=False)
        out_C = np.zeros(self.mesh.replicas, bool)
        if self.sentinel is not None and description != "Prediction":
            out_C = self.sentinel.leave_out_of_evaluation()
        self.gather_function = lambda tensor: gather_replicas(self.accelerator, tensor, self.mesh.stages, out_C)
        return super().evaluation_loop(dataloader, description, *args, **kwargs)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """This replica's loss on one batch, on all its stages; logits and labels too unless only the loss is wanted.

        Without labels there are logits alone.
        """
        engine = self.deepspeed
        labels = [inputs.get(name) for name in self.label_names]
        has_labels = bool(labels) and all(part is not None for part in labels)
        batch = evaluation_batch(self, self._loss, inputs, has_labels, self.mesh.replicas)
        announce_shapes(engine, [batch])
        own_loss, outputs = evaluate_batch(engine, batch)
        loss = engine._bcast_pipe_scalar(own_loss) if has_labels else None
        if prediction_loss_only:
            return loss, None, None
        given = self._prepare_input(labels[0] if len(labels) == 1 else tuple(labels)) if has_labels else None
        return loss, share_logits(engine, self.pipeline, outputs, inputs["input_ids"]), given

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a ``save_pretrained`` folder: weights in one file a stage. To be called on every rank."""
        folder = output_dir if output_dir is not None else self.args.output_dir
        save_pretrained(self.pipeline, folder)
        if not self.args.should_save:
            return
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))
