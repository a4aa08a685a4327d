"""Mixtures of corpora, and training without a teacher, as a user types them."""

import json
import re
import signal

import numpy as np
import pytest
import torch

import processes
from capgap.artifact import read_json
from capgap.corpus.names import Weighted, parse_mixture
from capgap.corpus.prepare import prepare_corpus
from capgap.corpus.text import PATTERN, Text, batch_indices
from capgap.errors import UserError
from capgap.evaluate.measured import HeldoutLoss, MixedLoss, mixed_loss
from capgap.models.build import build_model, load_model, save_model
from capgap.models.shape import ladder_shape
from capgap.stages.inputs import open_text, warn_of_epochs
from conftest import made_up_text, wait_for_steps


@pytest.fixture(scope="module")
def other(small_corpus, tmp_path_factory):
    """Less text in the same tokens, much of it digits."""
    place = tmp_path_factory.mktemp("other")
    documents = made_up_text(60, seed=1).split("<|endoftext|>\n")
    numbers = [
        " ".join(str(len(word) * sum(map(ord, word)) % 97) for word in one.split())
        for one in documents
    ]
    (place / "numbers.txt").write_text("\n<|endoftext|>\n".join(numbers))
    corpus = prepare_corpus(
        str(place / "numbers.txt"),
        place / "numbers",
        tokenizer=small_corpus.tokenizer,
        window=16,
        heldout_fraction=0.1,
        heldout_tokens=500,
    )
    return Text.of([corpus])


def mix(texts, weights):
    return Text.of([source for text in texts for source in text.sources], weights)


@pytest.fixture(scope="module")
def mixture(small_corpus, other):
    return mix([small_corpus, other], [3, 1])


@pytest.fixture(scope="module")
def models(small_corpus, tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for name, size in (("teacher", 20_000), ("small", 8_000)):
        shape = ladder_shape("llama", size, vocabulary=300, positions=16)
        save_model(build_model(shape, seed=1), place / name, small_corpus.tokenizer)
    return place


def batches(mixture, steps, *, seed=0, batch_windows=8):
    return np.concatenate(
        [mixture.batch(seed=seed, step=s, batch_windows=batch_windows) for s in range(steps)]
    )


def test_shares_are_met_by_every_stretch_and_windows_come_once_an_epoch(mixture, small_corpus):
    assert mixture.shares == (0.75, 0.25)
    first = small_corpus.windows
    numbers = batches(mixture, 1000)
    is_first = numbers < first
    for start in range(0, 8000, 100):
        assert abs(is_first[start : start + 100].mean() - 0.75) <= 0.02
    for own in (numbers[is_first], numbers[~is_first] - first):
        size = len(set(own.tolist()))
        for epoch in range(len(own) // size):
            part = own[epoch * size : (epoch + 1) * size]
            assert sorted(part) == list(range(size))
    assert not np.array_equal(batches(mixture, 3), batches(mixture, 3, seed=1))
    # the batch size cuts the same walk in other places
    np.testing.assert_array_equal(batches(mixture, 6), batches(mixture, 4, batch_windows=12))


def test_windows_have_one_number_over_all_sources(mixture, small_corpus, other):
    first = small_corpus.windows
    assert len(mixture.train) == mixture.windows == first + other.windows
    found = mixture.train.windows_at([first + 3, 5, first - 1, first])
    np.testing.assert_array_equal(found[[1, 2]], small_corpus.train.windows_at([5, first - 1]))
    np.testing.assert_array_equal(found[[0, 3]], other.train.windows_at([3, 0]))
    with pytest.raises(IndexError):
        mixture.train.windows_at([mixture.windows])


def test_far_steps_and_uneven_weights_stay_a_pure_function(small_corpus, other):
    uneven = mix([small_corpus, other], [1.0, 2.0])
    assert sum(uneven.shares) == pytest.approx(1, abs=1e-12)
    far = 10**9
    once = uneven.batch(seed=3, step=far, batch_windows=30_000)
    again = uneven.batch(seed=3, step=far * 30_000 + 17, batch_windows=1)
    assert once[17] == again[0]
    assert (once >= small_corpus.windows).mean() == pytest.approx(2 / 3, abs=1 / PATTERN)


def test_a_source_that_is_read_too_often_is_told(mixture, other):
    said = []
    warn_of_epochs(mixture, 20 * other.windows * 16, said.append)
    assert said[-1].startswith("warning: numbers is read 5.0 times, more than 4")
    said.clear()
    warn_of_epochs(mixture, 8 * other.windows * 16, said.append)
    assert not said


def test_weights_as_they_are_typed(tmp_path):
    (tmp_path / "a=2").mkdir()
    assert parse_mixture([str(tmp_path / "a=2")]) == (Weighted(tmp_path / "a=2"),)
    found = parse_mixture(["x=0.7", f"{tmp_path}/a=2=0.3"])
    assert [one.weight for one in found] == [0.7, 0.3]
    assert found[1].folder == tmp_path / "a=2"
    assert parse_mixture(["x", "y"])[1:] == parse_mixture(["y"])


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["x=0", "y=1"], "'0' is no number above 0"),
        (["x=-1", "y=1"], "'-1' is no number above 0"),
        (["x=nan", "y=1"], "'nan' is no number above 0"),
        (["x=inf", "y=1"], "'inf' is no number above 0"),
        (["x=half", "y=1"], "'half' is no number above 0"),
        (["=1", "y=1"], "is no number above 0"),
        (["x=1", "y"], "y has no weight"),
        (["x=1", "x=2"], "x is named twice"),
    ],
)
def test_wrong_weights_are_told(texts, told):
    with pytest.raises(UserError, match=re.escape(told)):
        parse_mixture(texts)


def test_corpora_that_do_not_mix_are_told(small_corpus, other, tmp_path, text_file):
    with pytest.raises(UserError, match="less than 1 in 10000"):
        mix([small_corpus, other], [1e9, 1])
    strange = prepare_corpus(str(text_file), tmp_path / "strange", vocabulary=280, window=16)
    with pytest.raises(UserError, match=r"different tokenizers \(token "):
        Text.of([*small_corpus.sources, strange], [1, 1])


def mixture_of(sources, shares):
    parts = ("document_losses", "document_tokens", "document_bytes")
    joined = ([x for one in sources.values() for x in getattr(one, part)] for part in parts)
    return MixedLoss(*joined, sources=sources, shares=shares)


def test_the_whole_is_the_mean_of_the_sources_by_their_shares():
    one = HeldoutLoss([10.0, 20.0, 9.0], [5, 8, 4], [20, 30, 18])
    two = HeldoutLoss([8.0, 5.0], [2, 3], [4, 7])
    both = mixture_of({"one": one, "two": two}, {"one": 0.75, "two": 0.25})
    assert both.loss == pytest.approx(0.75 * one.loss + 0.25 * two.loss)
    told = both.as_dict()
    assert told["loss_stderr"] == pytest.approx(
        np.hypot(0.75 * one.loss_stderr, 0.25 * two.loss_stderr)
    )
    assert (told["tokens"], told["bytes"]) == (22, 79)
    assert told["document_tokens"] == [5, 8, 4, 2, 3]
    assert told["sources"]["two"]["bits_per_byte"] == two.bits_per_byte
    # a mixture of one is that one
    alone = mixture_of({"one": one}, {"one": 1.0}).as_dict()
    for key, value in one.as_dict().items():
        assert alone[key] == pytest.approx(value)


def asked(corpora, out, *more, tokens="16k"):
    return (
        *(word for corpus in corpora for word in ("--corpus", corpus)),
        *("--window", 16, "--tokens", tokens, "--out", out),
        *("-s", "training.batch_tokens=256", *more),
    )


def test_a_mixture_is_distilled_online_and_from_a_cache_alike(
    typed, small_corpus, other, models, tmp_path
):
    both = (f"{small_corpus.directory}=3", f"{other.directory}=1")
    names = (models / "teacher", models / "small")
    online = typed("distill", *names, *asked(both, tmp_path / "online"), "--json")
    assert online.code == 0, online.err
    found = json.loads(online.out)
    assert [one["name"] for one in found["sources"]] == ["tokens", "numbers"]
    assert [one["share"] for one in found["sources"]] == [0.75, 0.25]
    read = 62 * 256 * 0.25 / (other.windows * 16)
    assert found["sources"][1]["epochs"] == pytest.approx(read)
    after = found["after"]["small"]["heldout"]
    assert set(after["sources"]) == {"tokens", "numbers"}
    for name, one in found["before"]["small"]["sources"].items():
        assert after["sources"][name]["loss"] < one["loss"] - 0.3
    kept = typed(
        *("cache", models / "teacher", small_corpus.directory, other.directory),
        *("--window", 16, "--out", tmp_path / "cache"),
    )
    assert kept.code == 0, kept.err
    cached = typed(
        "distill",
        *names,
        *asked(both, tmp_path / "cached"),
        *("--cache", tmp_path / "cache", "--json"),
    )
    assert cached.code == 0, cached.err
    loss = json.loads(cached.out)["after"]["small"]["heldout"]["loss"]
    assert loss == pytest.approx(after["loss"], rel=5e-3)
    # other weights are another run
    others = (small_corpus.directory, other.directory)
    wrong = typed("distill", *names, *asked(others, tmp_path / "online"))
    assert wrong.code == 2
    assert "another run (shares is [0.5, 0.5], was [0.75, 0.25])" in wrong.err


def test_scores_are_taken_on_a_mixture(typed, small_corpus, other, models, tmp_path):
    done = typed(
        *("score", models / "teacher", "--out", tmp_path / "scores.safetensors"),
        *("--corpus", small_corpus.directory, "--corpus", other.directory),
        *("--window", 16, "--tokens", 512, "--json"),
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["shares"] == [0.5, 0.5]


def test_a_new_model_and_an_old_one_learn_without_a_teacher(
    typed, small_corpus, other, models, tmp_path
):
    both = (small_corpus.directory, other.directory)
    more = ("--size", "11k", "--architecture", "gpt_neox", "--json")
    done = typed("train", models / "small", *asked(both, tmp_path / "run", *more, tokens="40k"))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert read_json(tmp_path / "run/train.json") == found
    assert list(found["after"]) == ["small", "gpt_neox-11k"]
    assert found["asked"]["teacher"] is None
    for name, one in found["after"].items():
        assert one["heldout"]["loss"] < found["before"][name]["loss"] - 0.5
        assert one["folder"] == str(tmp_path / "run/models" / name)
    new = load_model(tmp_path / "run/models/gpt_neox-11k")
    assert new.config.eos_token_id == small_corpus.marks.end
    # a new model has the whole rate, one that goes on the half of it
    assert found["after"]["gpt_neox-11k"]["learning_rate"] > (
        1.5 * found["after"]["small"]["learning_rate"]
    )
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["students"]["small"]["kl"] is None


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "nothing to train: name a model, or the size of a new one"),
        (("--size", "1k"), "too few for a llama model"),
        (("--size", "8k", "--architecture", "lama"), "unknown architecture 'lama'"),
        (("--size", "8k", "-s", "training.alpha=1"), "training.alpha is about a teacher"),
        (("--size", "8k", "--corpus", "nothing"), "nothing holds no prepared corpus"),
        (("./no/model",), "no such tokenizer folder"),
    ],
)
def test_what_cannot_be_trained_is_told_in_a_line(typed, small_corpus, tmp_path, more, told):
    done = typed("train", *asked([small_corpus.directory], tmp_path / "run"), *more)
    assert done.code == 2
    assert told in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_mixture_that_was_killed_goes_on_bit_for_bit(small_corpus, other, tmp_path):
    def start(out):
        both = (f"{small_corpus.directory}=0.8", f"{other.directory}=0.2")
        more = (
            "-s",
            "run.checkpoint_seconds=0.1",
            "-s",
            "run.checkpoint_share=0.9",
            "--size",
            "8k",
        )
        return processes.Started("train", *asked(both, out, *more, tokens="60k"))

    whole, stopped = start(tmp_path / "whole"), start(tmp_path / "stopped")
    wait_for_steps(tmp_path / "stopped", 20)
    stopped.send_signal(signal.SIGKILL)
    stopped.communicate(timeout=120)
    again = start(tmp_path / "stopped")
    for process in (whole, again):
        _, told = process.communicate(timeout=240)
        assert process.returncode == 0, told
    one, two = (
        load_model(tmp_path / name / "models/llama-8k").state_dict()
        for name in ("whole", "stopped")
    )
    for name, value in one.items():
        assert torch.equal(value, two[name])


@pytest.mark.parametrize(("precision", "micro"), [("fp32", 256), ("bf16", 128)])
def test_two_processes_share_the_batches_of_a_mixture(
    small_corpus, other, tmp_path, precision, micro
):
    """In bf16 the sums of two micro-batches differ from those of one, on one process as on two.

    The last bit of a weight is enough for another rounding: after some dozens of steps two runs in
    bf16 differ by as much, whatever made the first difference.
    """
    losses = []
    for count in (1, 2):
        out = tmp_path / str(count)
        both = (f"{small_corpus.directory}=0.8", f"{other.directory}=0.2")
        settings = ["--size", "8k", "-s", f"training.precision={precision}"]
        settings += ["-s", f"training.micro_batch_tokens={micro}"] * (count == 1)
        words = asked(both, out, *settings, tokens="4k")
        done = processes.run_ranks(count, "train", *words)
        assert done.returncode == 0, done.stderr
        losses.append(json.loads((out / "train.json").read_text())["after"]["llama-8k"]["heldout"])
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-4)
    for name, one in losses[0]["sources"].items():
        assert losses[1]["sources"][name]["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_a_single_corpus_is_a_mixture_of_one(small_corpus):
    text = open_text(parse_mixture([f"{small_corpus.directory}=0.3"]), 16)
    (source,) = text.sources
    assert text.shares == (1.0,)
    assert text.identity == {"corpus_hash": source.corpus_hash, "shares": None}
    for step in (0, 3, 10**7):
        numbers = text.batch(seed=5, step=step, batch_windows=8)
        alone = batch_indices(seed=5, step=step, batch_windows=8, num_windows=source.windows)
        np.testing.assert_array_equal(numbers, alone)
    np.testing.assert_array_equal(text.train.windows_at(numbers), source.train.windows_at(numbers))
    # its losses are those of the corpus, without any by source
    loss = HeldoutLoss([10.0, 20.0], [5, 8], [20, 30])
    assert mixed_loss(loss, text.heldout_counts(), text.share_of) is loss
