"""Train a causal LM in pipeline stages with the Trainer API, guarded by Sentinel.

A small Llama on this machine's own Python sources, 3 stages x 3 replicas. With fewer than three stages nobody but
trusted workers is there, with fewer than three replicas no majority that proves anything:

    torchrun --nproc_per_node 9 examples/hf_trainer.py
    accelerate launch --multi_gpu --num_processes 9 examples/hf_trainer.py

On GPUs the same lines use one GPU a process. A pretrained model and a data set of the hub:

    torchrun --nproc_per_node 12 examples/hf_trainer.py --stages 4 --model Qwen/Qwen3-0.6B \
        --dataset Salesforce/wikitext --dataset_config wikitext-2-raw-v1 --bf16 True

Any argument of transformers.TrainingArguments can be added, e.g. --max_steps 200 --save_steps 50.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from deepspeed_sentinel.hf import SentinelCallback, SentinelTrainer

FILES = 60


@dataclass
class ScriptArguments:
    """What this script adds to TrainingArguments."""

    stages: int = field(default=3, metadata={"help": "pipeline stages; must divide the number of processes"})
    model: str | None = field(default=None, metadata={"help": "name or folder of a pretrained model"})
    model_config: str | None = field(default=None, metadata={"help": "a config for random weights in its place"})
    tokenizer: str | None = field(default=None, metadata={"help": "name or folder; by default the model's"})
    dataset: str | None = field(default=None, metadata={"help": "name for datasets.load_dataset, with a text column"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    workers: int | None = field(default=None, metadata={"help": "processes a node that tokenise it, the first time"})
    text: str | None = field(default=None, metadata={"help": "a text file to train on"})
    sequence: int = field(default=128, metadata={"help": "tokens a row"})


class Report(SentinelCallback):
    """Prints who is blamed, where it happens."""

    def on_sentinel_verdict(self, args, state, control, *, verdict, who, **kwargs):
        if state.is_world_process_zero:
            for finding in verdict.findings:
                print(f"step {verdict.step}: {who.fill(str(finding))}")


def texts(options: ScriptArguments) -> list[str]:
    """The texts to train on without a data set; by default Python's own sources, which are on every machine."""
    if options.text:
        return [Path(options.text).read_text(encoding="utf-8")]
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:FILES]
    return [path.read_text(encoding="utf-8", errors="replace") for path in sources]


def small_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE learnt from the texts; the same on every process."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def rows(corpus: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, list[list[int]]]:
    """All texts one after the other, cut into rows of equal length; what is left at the end is dropped."""
    ids: list[int] = []
    for text in filter(str.strip, corpus):
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]}


def data_set(options: ScriptArguments, args: TrainingArguments) -> Any:
    """A data set of the hub or of a folder; one process of a node fetches it, the others find it in the cache."""
    from datasets import load_dataset  # pip install datasets

    with args.main_process_first():
        return load_dataset(options.dataset, options.dataset_config, split="train")


def rows_on_disk(
    corpus: Any, tokenizer: PreTrainedTokenizerBase, options: ScriptArguments, args: TrainingArguments
) -> Any:
    """``rows`` of every thousand texts, in a file that one process of a node makes and all map into their memory."""
    with args.main_process_first():
        return corpus.map(
            partial(rows, tokenizer=tokenizer, length=options.sequence),
            input_columns="text",
            batched=True,
            remove_columns=corpus.column_names,
            num_proc=options.workers,
        )


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="hf_trainer_out",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=60,
        learning_rate=1e-3,
        warmup_steps=10,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=30,
        save_strategy="no",
        report_to="none",
    )
    # the DeepSpeed config: transformers' own keys, and two that are new
    given = parser.parse_known_args()[0]
    parser.set_defaults(
        deepspeed={
            "zero_optimization": {"stage": 0},
            "bf16": {"enabled": "auto"},
            "pipeline": {"stages": given.stages},
            "sentinel": {"enabled": True, "output_dir": f"{given.output_dir}/sentinel"},
        }
    )
    options, args = parser.parse_args_into_dataclasses()

    corpus = data_set(options, args) if options.dataset else None
    some = texts(options) if corpus is None else corpus[:1000]["text"]
    if options.tokenizer or options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    else:
        tokenizer = small_tokenizer(some)
    model: str | PreTrainedConfig
    if options.model:
        model = options.model
    elif options.model_config:
        model = AutoConfig.from_pretrained(options.model_config)
    else:
        model = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=max(options.sequence, 512),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    if corpus is None:
        data = [{"input_ids": ids} for ids in rows(some, tokenizer, options.sequence)["input_ids"]]
    else:
        data = rows_on_disk(corpus, tokenizer, options, args)
    few = max(1, min(64, len(data) // 10))
    parts = range(few), range(few, len(data))
    held_out, train = ([data[at] for at in part] if corpus is None else data.select(part) for part in parts)

    trainer = SentinelTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[Report()],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main()
