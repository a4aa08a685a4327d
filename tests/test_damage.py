"""Files that the tool wrote and reads again: a byte that changed is refused in one line that names
the file, or it is a byte that says nothing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from capgap.artifact import begun, read_json, write_json
from capgap.corpus.tokenizer import tokenizer_hash
from capgap.corpus.tokens import load_corpus
from capgap.distill.cache import CachedTeacher, CacheFormat, CacheIdentity, CacheWriter, write_cache
from capgap.distill.teacher import OnlineTeacher
from capgap.errors import UserError
from capgap.models.build import build_model, load_model, save_model
from capgap.models.identity import model_hash
from capgap.models.shape import ladder_shape
from capgap.prune.importance import load_importance, save_importance, score
from capgap.records import read_record
from law_surface import run

ODD = [b"", b"null", b"[]", b"[" * 100_000, b'{"schema": 2}', b'{"a": ']
FLIPS = 24


def read_corpus(folder):
    corpus = load_corpus(folder, window=16)
    documents = corpus.heldout_documents()
    windows = corpus.train.windows_at(np.arange(corpus.windows))
    tokens = b"".join(one.tokens.tobytes() for one in documents)
    return windows.tobytes(), tokens, tokenizer_hash(corpus.tokenizer)


def read_scores(folder):
    found = load_importance(folder / "scores.safetensors")
    tensors = (found.heads, found.neurons, found.hidden, found.layers)
    return [one.numpy().tobytes() for one in tensors], found.tokens, found.provenance


def read_model(folder):
    windows = torch.arange(16)[None]
    with torch.no_grad():
        return load_model(folder)(windows).logits.numpy().tobytes(), model_hash(folder)


def read_run(folder):
    with begun(folder / "run.json", {"seed": 1}) as found:
        return found["asked"], found["finished"]


@pytest.fixture(scope="module")
def made(small_corpus, tmp_path_factory):
    """A folder of every kind, and how it is read."""
    root = tmp_path_factory.mktemp("made")
    (source,) = small_corpus.sources
    shutil.copytree(source.directory, root / "corpus")
    model = build_model(ladder_shape("llama", 8_000, vocabulary=300, positions=16), seed=0)
    save_model(model, root / "model", small_corpus.tokenizer)
    (root / "scores").mkdir()
    save_importance(root / "scores" / "scores.safetensors", score(model, [], method="norm"))
    identity = CacheIdentity.of("t", "abc", "float32", small_corpus, document_mask=False)
    writer = CacheWriter(root / "cache", identity, CacheFormat(300))
    write_cache(writer, OnlineTeacher(model), small_corpus, device=torch.device("cpu"))
    read_run(root / "run")
    heldout = {"document_losses": [3.0, 3.5], "document_tokens": [100, 200]}
    (root / "record").mkdir()
    teacher = run("teacher", "t", size=100, seed=0, teacher_size=100, **heldout)
    write_json(root / "record" / "record.json", teacher)

    def read_cache(folder):
        cached = CachedTeacher(folder, small_corpus)
        return cached.fetch(np.arange(small_corpus.windows)).numpy().tobytes()

    readers = {
        "corpus": read_corpus,
        "model": read_model,
        "scores": read_scores,
        "cache": read_cache,
        "run": read_run,
        "record": read_record,
    }
    return root, readers


FILES = {
    "corpus": ["manifest.json", "train-00000.bin", "heldout.bin", "tokenizer/tokenizer.json"],
    "model": ["capgap.json", "config.json", "model.safetensors"],
    "scores": ["scores.safetensors"],
    "cache": ["manifest.json", "shard-00000.bin"],
    "run": ["run.json"],
    "record": ["record.json"],
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in FILES.items() for n in names])
def test_damage_is_noticed(made, kind, name):
    root, readers = made
    path: Path = root / kind / name
    read = readers[kind]
    whole, expected = path.read_bytes(), read(root / kind)
    places = np.random.default_rng(0).integers(0, len(whole), FLIPS)
    flipped = [
        whole[:place] + bytes([whole[place] ^ 1 << int(place) % 8]) + whole[place + 1 :]
        for place in places
    ]
    problems: list[str] = []
    try:
        for number, data in enumerate([*flipped, whole[: len(whole) // 2], *ODD]):
            path.write_bytes(data)
            try:
                found = read(root / kind)
            except UserError as error:
                problems.append(str(error))
            else:
                assert number < FLIPS, f"{name} may hold {data[:20]!r}"
                assert found == expected
    finally:
        path.write_bytes(whole)
    assert all("\n" not in one and str(root) in one for one in problems)
    assert len(problems) > FLIPS / 2
    assert read(root / kind) == expected


def test_a_manifest_without_checksum_still_needs_its_keys(made, tmp_path):
    root, _ = made
    shutil.copytree(root / "corpus", tmp_path / "corpus")
    manifest = read_json(root / "corpus" / "manifest.json")
    write_json(tmp_path / "corpus" / "manifest.json", manifest | {"train": None})
    with pytest.raises(UserError, match="is damaged"):
        load_corpus(tmp_path / "corpus", window=16)
