"""Real text that is on every machine with Python: the source of its standard library, as tokens.

The held-out split is made of whole files, chosen by a hash of their name: no line of a held-out file is ever
trained on, and the choice does not depend on which other files exist.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

HELD_OUT_SHARE = 0.1
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_SMALLEST = 1_000_000
_BPE = "bpe_tokenizer.json"


def source_files(root: Path | None = None) -> list[Path]:
    """The standard library's source files, sorted, without its tests and what was installed into it."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    return sorted(
        path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )


def is_held_out(name: str) -> bool:
    """Whether the file with this path relative to the library's root belongs to the held-out split."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def split(files: Sequence[Path], root: Path) -> tuple[list[Path], list[Path]]:
    """(training files, held-out files): disjoint, in the order given."""
    held_out = [path for path in files if is_held_out(path.relative_to(root).as_posix())]
    chosen = set(held_out)
    return [path for path in files if path not in chosen], held_out


def prepare(folder: Path, tokenizer: str, vocabulary: int) -> dict[str, int]:
    """Tokenise both splits into ``folder`` unless that was done already.

    Returns:
        {"files", "train_tokens", "held_out_tokens"}.

    Raises:
        ValueError: there is next to no source text on this machine.
    """
    facts_file = folder / f"{tokenizer}.json"
    if facts_file.exists():
        facts = json.loads(facts_file.read_text(encoding="utf-8"))
        return {key: int(value) for key, value in facts.items()}
    root = Path(sysconfig.get_path("stdlib"))
    files = source_files(root)
    texts = {
        name: b"".join(path.read_bytes() for path in part)
        for name, part in zip(("train", "held_out"), split(files, root), strict=True)
    }
    if len(texts["train"]) < _SMALLEST:
        raise ValueError(
            f"Found {len(texts['train'])} bytes of Python source under {root}; the demo learns the standard "
            f"library's source and needs at least {_SMALLEST}. Use a Python that ships it as .py files."
        )
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"files": len(files)}
    encode = _byte_tokens if tokenizer == "byte" else _train_bpe(texts["train"], folder, vocabulary)
    for name, text in texts.items():
        tokens = encode(text)
        np.save(folder / f"{tokenizer}_{name}.npy", tokens)
        facts[f"{name}_tokens"] = int(tokens.size)
    facts_file.write_text(json.dumps(facts), encoding="utf-8")
    return facts


def _byte_tokens(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


def _train_bpe(text: bytes, folder: Path, vocabulary: int) -> Callable[[bytes], np.ndarray]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    lines = text.decode("utf-8", errors="replace").splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(folder / _BPE))
    return encoder(folder, "bpe")


def encoder(folder: Path, tokenizer: str) -> Callable[[bytes], np.ndarray]:
    """What turns text into tokens, shape [tokens], as the corpus in ``folder`` was once it is prepared."""
    if tokenizer == "byte":
        return _byte_tokens
    from tokenizers import Tokenizer

    trained = Tokenizer.from_file(str(folder / _BPE))

    def encode(part: bytes) -> np.ndarray:
        pieces = part.decode("utf-8", errors="replace").splitlines(keepends=True)
        encodings = trained.encode_batch_fast(pieces)
        return np.fromiter((token for one in encodings for token in one.ids), dtype=np.uint16)

    return encode


def load(folder: Path, tokenizer: str, name: str) -> np.ndarray:
    """Tokens of the split ``name`` ("train" or "held_out"), mapped into memory: shape [tokens]."""
    return np.load(folder / f"{tokenizer}_{name}.npy", mmap_mode="r")


def batches(
    tokens: np.ndarray, *, seed: int, replica: int, size: int, sequence: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless micro-batches of one replica: (inputs, labels), [size, sequence]; same arguments, same batches.

    Each replica draws its own windows of the corpus by chance. Labels are the inputs' next tokens.
    """
    generator = np.random.default_rng([seed, replica])
    while True:
        yield windows(tokens, generator, size, sequence)


def windows(
    tokens: np.ndarray, generator: np.random.Generator, size: int, sequence: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One micro-batch of windows drawn by chance: (inputs, labels), [size, sequence]; labels are the next tokens."""
    starts = generator.integers(0, tokens.size - sequence - 1, size=size)
    window = np.stack([tokens[start : start + sequence + 1] for start in starts]).astype(np.int64)
    window_BT = torch.from_numpy(window)
    return window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous()
