"""Texts begin and end as the model's own: in shards, windows, held-out text, losses and samples."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from capgap.artifact import read_json, write_json
from capgap.config import find_recipe, load_recipe
from capgap.corpus.prepare import prepare_corpus
from capgap.corpus.tokenizer import TokenCodec, load_tokenizer, tokenizer_hash, train_tokenizer
from capgap.corpus.tokens import HeldoutDocument, Marks, load_corpus
from capgap.distill.cache import CachedTeacher
from capgap.errors import UserError
from capgap.evaluate import beginning
from capgap.evaluate.beginning import better_beginning
from capgap.evaluate.measured import HeldoutLoss
from capgap.evaluate.sample import sample_text
from capgap.models.build import build_model, load_model, save_model
from capgap.models.parts import Parts
from capgap.models.shape import ladder_shape
from capgap.stages.evaluate import Evaluate
from capgap.stages.measure import run_measure
from capgap.sweep.checks import claimed

BEGIN, TURN = "<s>", "<|im_end|>"


def beginning_with(name=BEGIN):
    """Our own tokenizer, but that it puts a token of its own before a text, as Llama's does."""
    tokenizer = train_tokenizer([b"kabalo fimu rasine toduge " * 50], 300)
    tokenizer.add_special_tokens({"bos_token": name})
    begin = tokenizer.convert_tokens_to_ids(name)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, begin)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return beginning_with()


@pytest.fixture(scope="module")
def corpora(tokenizer, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return {
        begun: prepare_corpus(
            str(text_file),
            folder / str(begun),
            tokenizer=tokenizer,
            window=16,
            heldout_fraction=0.1,
            begin_windows=begun,
        )
        for begun in (False, True)
    }


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    shape = ladder_shape("llama", 20_000, vocabulary=len(tokenizer), positions=64)
    save_model(build_model(shape, seed=0), folder, tokenizer)
    return folder


def test_marks_are_what_the_tokenizer_itself_writes(tokenizer):
    own = train_tokenizer([b"text"], 257)
    assert Marks.of(own, begin_windows=True) == Marks(0, 0, begin_windows=False)
    assert Marks.of(own).between.tolist() == [0]
    marks = Marks.of(tokenizer, begin_windows=True)
    assert marks == Marks(tokenizer.bos_token_id, 0, begin_windows=True)
    assert marks.between.tolist() == [0, tokenizer.bos_token_id]
    assert tokenizer_hash(tokenizer) != tokenizer_hash(own)
    # known, but not put first
    own.add_special_tokens({"bos_token": BEGIN})
    assert Marks.of(own).begin == 0


@pytest.mark.parametrize(
    ("special", "eos", "end"),
    [
        ([TURN], TURN, "<|endoftext|>"),  # Qwen, SmolLM2 and Phi for conversations
        (["<|eot_id|>", "<|end_of_text|>"], "<|eot_id|>", "<|endoftext|>"),
        ([TURN], "<|endoftext|>", "<|endoftext|>"),
        (["</s>"], "</s>", "</s>"),
    ],
)
def test_a_text_ends_with_the_end_of_text_and_not_of_a_turn(special, eos, end):
    tokenizer = train_tokenizer([b"text"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.eos_token = eos
    assert Marks.of(tokenizer).end == tokenizer.convert_tokens_to_ids(end)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = train_tokenizer([b"text"], 300)
    tokenizer.eos_token = None
    # our own still has its end of text by its name
    assert Marks.of(tokenizer).end == 0
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(UserError, match="no eos token"):
        Marks.of(tokenizer)


def test_documents_lie_between_their_marks_in_shards_and_held_out_text(corpora, tokenizer):
    corpus = corpora[False]
    marks = corpus.marks
    assert corpus.manifest["marks"] == {
        "begin": tokenizer.bos_token_id,
        "end": 0,
        "begin_windows": False,
    }
    shard = corpus.manifest["train"]["shards"][0]["name"]
    ids = np.fromfile(corpus.directory / shard, dtype=corpus.manifest["dtype"]).astype(np.int64)
    assert ids[0] == marks.begin
    ends = np.flatnonzero(ids == marks.end)
    begins = np.flatnonzero(ids == marks.begin)
    np.testing.assert_array_equal(begins[1:], ends[: len(begins) - 1] + 1)
    codec = TokenCodec(tokenizer)
    for document in corpus.heldout_documents():
        text = codec.decode(document.tokens)
        assert document.tokens.tolist() == [marks.begin, *codec.encode(text), marks.end]
        # what transformers gives for the text, and the end
        assert document.tokens.tolist() == [*tokenizer(text.decode())["input_ids"], marks.end]


def test_windows_begin_anew_where_they_are_asked_to(corpora):
    begin = corpora[True].marks.begin
    plain, begun = (corpora[key].train.windows_at(range(50)) for key in (False, True))
    np.testing.assert_array_equal(plain[:, 1:], begun[:, 1:])
    is_cut = plain[:, 1] != begin
    assert (begun[is_cut, 0] == begin).all()
    assert not (begun[:, :-1] == begin)[:, :2].all(1).any()
    assert corpora[True].corpus_hash != corpora[False].corpus_hash


def test_a_window_whose_second_token_begins_a_document_has_one_first_token():
    marks = Marks(9, 0, begin_windows=True)
    windows = np.array([[5, 6, 7], [0, 9, 6], [9, 3, 0]])
    assert marks.begun(windows).tolist() == [[9, 6, 7], [0, 9, 6], [9, 3, 0]]


def test_positions_count_from_the_token_that_begins_a_document():
    inputs = np.array([[4, 5, 0, 9, 6, 7], [9, 4, 0, 9, 0, 9]])
    marks = Marks(9, 0, begin_windows=False)
    assert marks.positions(inputs).tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 0]]
    marks = Marks(0, 0, begin_windows=False)
    assert marks.positions(inputs).tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1]]


def heldout_of(model, corpus, window):
    """What `evaluate` tells of one corpus."""
    asked = {"corpus": [corpus.directory], "window": window, "device": "cpu", "out": None}
    (found,) = Evaluate(model=str(model), tasks="heldout", **asked).run()["heldout"].values()
    return found


@pytest.mark.parametrize("begun", [False, True])
def test_held_out_loss_is_that_of_plain_transformers_and_of_measure(corpora, model, begun):
    """The same documents, a first token before each, an end behind; by three ways."""
    corpus = corpora[begun]
    window = 32
    found = heldout_of(model, corpus, window)
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = load_tokenizer(model)
    codec = TokenCodec(tokenizer)
    total = tokens = 0.0
    for document in corpus.heldout_documents():
        text = codec.decode(document.tokens).decode()
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, window):
            piece = torch.tensor(ids[start : start + window + 1])
            if begun:
                piece[0] = tokenizer.bos_token_id
            with torch.no_grad():
                logits = plain(input_ids=piece[None, :-1]).logits[0].double()
            total += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
            tokens += len(piece) - 1
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-6)


def test_measure_reads_what_evaluate_reads(corpora, model, monkeypatch):
    from capgap.stages import measure

    monkeypatch.setattr(measure, "WINDOW", 32)
    for corpus in corpora.values():
        found = heldout_of(model, corpus, 32)
        text, models = str(corpus.directory), {"it": str(model)}
        measured = run_measure(text, models, num_bytes=10**9, device="cpu").models["it"]
        assert measured.tokens == found["tokens"]
        assert measured.loss == pytest.approx(found["loss"], rel=1e-6)


def test_a_sample_begins_like_a_text_and_keeps_the_first_space(model, tokenizer, monkeypatch):
    seen = []
    loaded = load_model(model).eval()
    forward = loaded.forward
    ends = False

    def watched(input_ids, **options):
        seen.append(input_ids)
        output = forward(input_ids, **options)
        if ends:
            output.logits[..., 0] = 1e9
        return output

    monkeypatch.setattr(loaded, "forward", watched)
    sample_text(loaded, tokenizer, "kabalo", max_new_tokens=3, temperature=0)
    assert seen[0][0].tolist() == tokenizer("kabalo")["input_ids"]
    assert len(seen) == 3
    del seen[:]
    sample_text(loaded, tokenizer, "kabalo " * 60, max_new_tokens=60, temperature=0)
    assert seen[0][0, 0] == tokenizer.bos_token_id
    assert seen[0].shape == (1, 4)
    del seen[:]
    ends = True
    assert sample_text(loaded, tokenizer, "kabalo", max_new_tokens=3, temperature=0) == ""
    assert len(seen) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_sample_is_that_of_generate(model, tokenizer, temperature):
    loaded = load_model(model).eval()
    inputs = torch.tensor([tokenizer("kabalo")["input_ids"]])
    drawn = {"temperature": temperature, "top_p": 0.9, "top_k": 0} if temperature else {}
    torch.manual_seed(5)
    written = loaded.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=12,
        do_sample=bool(drawn),
        eos_token_id=0,
        **drawn,
    )[0]
    before = torch.random.get_rng_state()
    options = {"max_new_tokens": 12, "temperature": temperature, "top_p": 0.9, "seed": 5}
    text = sample_text(loaded, tokenizer, "kabalo", **options)
    assert torch.equal(before, torch.random.get_rng_state())
    assert tokenizer.decode(written, skip_special_tokens=True) == "kabalo" + text


def test_corpora_of_the_version_before_are_refused(corpora, tmp_path):
    folder = corpora[False].directory
    write_json(tmp_path / "manifest.json", read_json(folder / "manifest.json") | {"schema": 1})
    with pytest.raises(UserError, match="run `capgap corpus` again with this --out"):
        load_corpus(tmp_path, window=16)


class _Reading:
    """Stands for a model's losses: by the token that a row begins with, and whether the document
    began there."""

    def __init__(self, monkeypatch, losses):
        def evaluate(parts, rows, ranks):
            found = [0.0] * len(rows.document_tokens)
            for owner, inputs in zip(rows.document.tolist(), rows.inputs, strict=True):
                found[owner] += losses.get(int(inputs[0]), losses[None])
            counts = rows.document_tokens
            return HeldoutLoss(
                [one * count for one, count in zip(found, counts, strict=True)], counts, counts
            )

        monkeypatch.setattr(beginning, "evaluate_heldout", evaluate)


def documents(begin):
    return [HeldoutDocument(np.r_[begin, np.arange(50, 60 + i)], 30) for i in range(12)]


def test_a_model_much_better_with_another_beginning_is_warned_of(monkeypatch):
    own = train_tokenizer([b"text"], 257)
    own.add_special_tokens({"bos_token": BEGIN})
    marks = Marks.of(own)
    parts = Parts(build_model(ladder_shape("llama", 8000, vocabulary=301, positions=64), seed=0))
    _Reading(monkeypatch, {0: 3.0, own.bos_token_id: 2.5, None: 9.0})
    found = better_beginning("m", parts, documents(0), marks, own)
    assert found is not None
    told = "warning: m reads this text at 3.000 nats a token, and at 2.500 where documents begin"
    assert found.startswith(f"{told} with <s>: ")
    _Reading(monkeypatch, {0: 2.5, own.bos_token_id: 2.5, None: 9.0})
    assert better_beginning("m", parts, documents(0), marks, own) is None


def test_windows_that_should_begin_anew_are_warned_of(monkeypatch, tokenizer):
    parts = Parts(build_model(ladder_shape("llama", 8000, vocabulary=301, positions=64), seed=0))
    marks = Marks.of(tokenizer)
    _Reading(monkeypatch, {tokenizer.bos_token_id: 2.0, None: 3.0})
    found = better_beginning("m", parts, documents(tokenizer.bos_token_id), marks, tokenizer)
    assert found is not None
    assert "with `--begin-windows`" in found
    assert (
        better_beginning(
            "m",
            parts,
            documents(tokenizer.bos_token_id),
            replace(marks, begin_windows=True),
            tokenizer,
        )
        is None
    )
    _Reading(monkeypatch, {tokenizer.bos_token_id: 3.0, 0: 3.0, None: 2.0})
    found = better_beginning(
        "m", parts, documents(tokenizer.bos_token_id), replace(marks, begin_windows=True), tokenizer
    )
    assert found is not None
    assert "without `--begin-windows`" in found


def test_documents_without_a_middle_are_no_windows(tokenizer):
    parts = Parts(build_model(ladder_shape("llama", 8000, vocabulary=301, positions=64), seed=0))
    short = [HeldoutDocument(np.array([tokenizer.bos_token_id, 60]), 1)]
    assert better_beginning("m", parts, short, Marks.of(tokenizer), tokenizer) is None


def test_caches_and_sweeps_of_the_version_before_are_refused(corpora, tmp_path):
    (tmp_path / "cache").mkdir()
    manifest = {"schema": 1, "teacher_hash": "a"}
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="prepare the corpus again and run `capgap cache`"):
        CachedTeacher(tmp_path / "cache", corpora[False])
    recipe = load_recipe(find_recipe("quickstart"))
    before = recipe.model_dump(mode="json")
    del before["corpus"]["begin_windows"]
    marker = {"recipe_hash": "another", "recipe": before}
    (tmp_path / "sweep.json").write_text(json.dumps(marker))
    with (
        pytest.raises(UserError, match="did not begin as the teachers' own do"),
        claimed(tmp_path, recipe),
    ):
        pass
