"""The text: what is held out is never trained on, and nothing depends on chance or on the machine's order."""

import itertools

import numpy as np
import pytest

from deepspeed_sentinel import corpus


@pytest.fixture
def library(tmp_path):
    """A small tree like the standard library's, with folders that must be left out."""
    root = tmp_path / "lib"
    for index in range(200):
        path = root / f"package{index % 7}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# file {index}\n")
    for folder in ("site-packages", "package0/test", "__pycache__"):
        (root / folder).mkdir(parents=True)
        (root / folder / "other.py").write_text("# not the library\n")
    return root


def test_split_is_disjoint_complete_and_deterministic(library):
    files = corpus.source_files(library)
    train, held_out = corpus.split(files, library)
    assert len(files) == 200
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == files
    assert 5 <= len(held_out) <= 40
    assert corpus.split(files, library) == (train, held_out)


def test_split_of_a_file_does_not_depend_on_the_others(library):
    files = corpus.source_files(library)
    _, held_out = corpus.split(files, library)
    _, fewer = corpus.split(files[::2], library)
    assert set(fewer) == set(held_out) & set(files[::2])


def test_installed_packages_and_tests_are_left_out(library):
    assert not [path for path in corpus.source_files(library) if path.name == "other.py"]


def test_prepare_writes_both_splits_once(library, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(library))
    monkeypatch.setattr(corpus, "_SMALLEST", 10)
    facts = corpus.prepare(tmp_path / "out", "byte", 256)
    train = corpus.load(tmp_path / "out", "byte", "train")
    held_out = corpus.load(tmp_path / "out", "byte", "held_out")
    assert facts == {"files": 200, "train_tokens": train.size, "held_out_tokens": held_out.size}
    assert bytes(train).startswith(b"# file ")
    (library / "new.py").write_text("x = 1\n")
    assert corpus.prepare(tmp_path / "out", "byte", 256) == facts


def test_bpe_is_trained_on_the_training_text_and_can_be_decoded(library, tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(library))
    monkeypatch.setattr(corpus, "_SMALLEST", 10)
    corpus.prepare(tmp_path / "out", "bpe", 300)
    train = corpus.load(tmp_path / "out", "bpe", "train")
    assert train.max() < 300
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "bpe_tokenizer.json"))
    first_file = corpus.split(corpus.source_files(library), library)[0][0]
    assert tokenizer.decode(train[:40].tolist()).startswith(first_file.read_text())


def test_too_little_text_is_an_error_that_says_where_it_looked(library, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(library))
    with pytest.raises(ValueError, match="at least 1000000"):
        corpus.prepare(tmp_path / "out", "byte", 256)


def test_batches_are_the_same_for_the_same_seed_and_differ_between_replicas():
    tokens = np.arange(5000) % 251

    def first(count, **change):
        arguments = {"seed": 3, "replica": 0, "size": 2, "sequence": 16, **change}
        return list(itertools.islice(corpus.batches(tokens, **arguments), count))

    for (inputs, labels), (again, _) in zip(first(3), first(3), strict=True):
        assert inputs.shape == labels.shape == (2, 16)
        assert inputs.equal(again)
        assert inputs[:, 1:].equal(labels[:, :-1])
    assert not first(1)[0][0].equal(first(1, replica=1)[0][0])
    assert not first(1)[0][0].equal(first(1, seed=4)[0][0])
