"""The cache on disk: whose it is, what may be missing or damaged, and that a student learns from it
as from the teacher itself."""

import dataclasses

import numpy as np
import pytest
import torch

from capgap.corpus.text import Text
from capgap.corpus.tokens import Corpus
from capgap.distill.cache import CachedTeacher, CacheFormat, CacheIdentity, CacheWriter, write_cache
from capgap.distill.teacher import OnlineTeacher
from capgap.errors import UserError
from capgap.models.build import build_model
from capgap.models.shape import ladder_shape
from capgap.train.learner import Learner
from capgap.train.loop import LoopSettings, train

SETTINGS = LoopSettings(batch_windows=8, micro_batch_windows=8, data_seed=5)
CPU = torch.device("cpu")


def model_of(size, seed):
    return build_model(ladder_shape("llama", size, vocabulary=300, positions=16), seed=seed)


def changed(text, **values):
    """The text with other entries in its manifest."""
    (source,) = text.sources
    return Text.of([Corpus(source.directory, source.manifest | values, source.window)])


@pytest.fixture(scope="module")
def teacher(small_corpus):
    model = model_of(20_000, 1)
    train([Learner("teacher", model, 60, learning_rate=5e-3)], small_corpus, SETTINGS)
    return OnlineTeacher(model)


def writer_of(folder, corpus, kept=None, **changes):
    identity = CacheIdentity.of("t", "abc", "float32", corpus, document_mask=False)
    return CacheWriter(folder, dataclasses.replace(identity, **changes), kept or CacheFormat(300))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("capgap.distill.cache.SHARD_BYTES", 1 << 17)


@pytest.fixture(scope="module")
def cache(small_corpus, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "teacher"
    writer = writer_of(folder, small_corpus)
    assert write_cache(writer, teacher, small_corpus, device=CPU) == 0
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_student_learns_from_a_cache_as_from_the_teacher(small_corpus, teacher, cache):
    losses = {}
    for name, source in (
        ("online", teacher),
        ("cached", CachedTeacher(cache, small_corpus, teacher_hash="abc")),
    ):
        students = [
            Learner("a", model_of(8_000, 0), 60, learning_rate=5e-3, alpha=1.0),
            Learner("b", model_of(11_000, 0), 60, learning_rate=5e-3, alpha=0.5),
        ]
        train(students, small_corpus, SETTINGS, teacher=source)
        losses[name] = students
    for online, cached in zip(*losses.values(), strict=True):
        for column in ("teacher_ce", "teacher_entropy"):
            assert cached.curve[column] == pytest.approx(online.curve[column], rel=2e-3)
        assert cached.curve["ce"][0] == pytest.approx(online.curve["ce"][0], rel=1e-6)
        assert cached.curve["ce"][-1] == pytest.approx(online.curve["ce"][-1], rel=5e-3)
        assert cached.curve["kl"][-1] == pytest.approx(online.curve["kl"][-1], abs=0.02)
        assert cached.curve["agreement"][-1] == pytest.approx(
            online.curve["agreement"][-1], abs=0.05
        )


def test_parts_and_restarts_write_the_same_bytes(
    small_corpus, teacher, tmp_path, small_shards, monkeypatch
):
    whole = writer_of(tmp_path / "whole", small_corpus)
    assert whole.num_shards > 3
    write_cache(whole, teacher, small_corpus, device=CPU)

    parted = writer_of(tmp_path / "parted", small_corpus)
    left = write_cache(parted, teacher, small_corpus, device=CPU, part=(1, 2))
    assert 0 < left < whole.num_shards
    with pytest.raises(UserError, match=r"not whole.*shard-00000.bin is missing"):
        CachedTeacher(tmp_path / "parted", small_corpus)

    class Killed(Exception):
        pass

    def kill(done, total):
        if done > 150:
            raise Killed

    with pytest.raises(Killed):
        write_cache(parted, teacher, small_corpus, device=CPU, on_batch=kill)
    again = writer_of(tmp_path / "parted", small_corpus)
    assert write_cache(again, teacher, small_corpus, device=CPU, batch_windows=5) == 0
    assert files(tmp_path / "whole") == files(tmp_path / "parted")


def test_document_mask_reaches_the_cached_teacher(small_corpus, teacher, tmp_path):
    tokens = small_corpus.train.windows_at(range(100))
    commonest = int(np.bincount(tokens.ravel()).argmax())
    marks = {"begin": commonest, "end": commonest, "begin_windows": False}
    corpus = changed(small_corpus, marks=marks)
    identity = CacheIdentity.of("t", "abc", "float32", corpus, document_mask=True)
    write_cache(
        CacheWriter(tmp_path / "cache", identity, CacheFormat(300)), teacher, corpus, device=CPU
    )
    found = {}
    settings = dataclasses.replace(SETTINGS, document_mask=True)
    for name, source in (
        ("online", teacher),
        ("cached", CachedTeacher(tmp_path / "cache", corpus, document_mask=True)),
    ):
        one = Learner("a", model_of(8_000, 0), 3, learning_rate=5e-3, alpha=1.0)
        train([one], corpus, settings, teacher=source)
        found[name] = one.curve["teacher_ce"]
    assert found["cached"] == pytest.approx(found["online"], rel=2e-3)
    with pytest.raises(UserError, match="another document_mask"):
        CachedTeacher(tmp_path / "cache", corpus)


def test_a_cache_serves_nothing_but_what_it_is_of(small_corpus, cache):
    with pytest.raises(UserError, match=r"another teacher \(abc, not xyz\)"):
        CachedTeacher(cache, small_corpus, teacher_hash="xyz")
    for field, name in (("corpus_hash", "corpus"), ("tokenizer_hash", "tokenizer")):
        other = changed(small_corpus, **{field: "f" * 64})
        with pytest.raises(UserError, match=f"another {name} "):
            CachedTeacher(cache, other)
    with pytest.raises(UserError, match=r"another window \(16, not 8\)"):
        CachedTeacher(cache, Text.open([(small_corpus.directory, None)], 8))
    with pytest.raises(UserError, match="holds no teacher cache"):
        CachedTeacher(cache.parent, small_corpus)
    with pytest.raises(UserError, match=r"another cache \(teacher_hash is xyz, was .*folder"):
        writer_of(cache, small_corpus, teacher_hash="xyz")
    with pytest.raises(UserError, match=r"another cache \(top_k is 4, was .*folder"):
        writer_of(cache, small_corpus, CacheFormat(300, 4, 4))
    with pytest.raises(UserError, match="holds something else"):
        writer_of(small_corpus.directory / "tokenizer", small_corpus)


@pytest.mark.parametrize("where", ["record", "checksum"])
def test_a_damaged_window_is_noticed_and_named(small_corpus, teacher, tmp_path, where):
    writer = writer_of(tmp_path / "cache", small_corpus)
    write_cache(writer, teacher, small_corpus, device=CPU)
    shard = tmp_path / "cache" / "shard-00000.bin"
    data = bytearray(shard.read_bytes())
    data[7 * writer.window_bytes + (5 if where == "record" else writer.window_bytes - 1)] ^= 1
    shard.write_bytes(data)
    source = CachedTeacher(tmp_path / "cache", small_corpus)
    source.fetch(np.array([6, 8]))
    with pytest.raises(UserError, match=r"window 7 in .*shard-00000.bin is damaged"):
        source.fetch(np.array([6, 7]))
    # and from the loop, whose batches are read in another thread
    one = Learner("a", model_of(8_000, 0), 400, learning_rate=5e-3, alpha=1.0)
    with pytest.raises(UserError, match="damaged"):
        train([one], small_corpus, SETTINGS, teacher=source)


def test_a_truncated_shard_is_noticed_and_written_again(small_corpus, teacher, tmp_path):
    writer = writer_of(tmp_path / "cache", small_corpus)
    write_cache(writer, teacher, small_corpus, device=CPU)
    before = files(tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00000.bin has \d+ of \d+ bytes"):
        CachedTeacher(tmp_path / "cache", small_corpus)
    assert write_cache(writer, teacher, small_corpus, device=CPU) == 0
    assert files(tmp_path / "cache") == before
