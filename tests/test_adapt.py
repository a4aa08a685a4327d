"""Tokenizers with more pieces, models with rows for them, and the command that trains on."""

import dataclasses
import itertools
import json
import random
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import processes
from capgap.artifact import read_json
from capgap.corpus.extend import compare_fertility, extend_tokenizer
from capgap.corpus.tokenizer import TokenCodec, compare_tokenizers, load_tokenizer, train_tokenizer
from capgap.errors import UserError
from capgap.models.build import build_model, extend_model, extended_rows, load_model, save_model
from capgap.models.shape import ARCHITECTURES, ladder_shape
from conftest import made_up_text, part_of_library

SYLLABLES = [*"学生模型从教师中习容量差距定律"]


def foreign_text(documents: int, *, seed: int = 0) -> str:
    """Another script, and words of the old one's letters that the old text has not."""
    chooser = random.Random(seed)
    words = ["".join(chooser.choices(SYLLABLES, k=3)) for _ in range(20)]
    words += ["zorvex", "quizzle", "xylowym"]
    texts = [
        "。".join("".join(chooser.choices(words, k=8)) for _ in range(12)) + f" zorvex {place}\n"
        for place in range(documents)
    ]
    return "<|endoftext|>\n".join(texts)


OLD = [text.encode() for text in made_up_text(120).split("<|endoftext|>\n")]
NEW = [text.encode() for text in foreign_text(80).split("<|endoftext|>\n")]
FRESH = [text.encode() for text in foreign_text(20, seed=1).split("<|endoftext|>\n")]
ODD = "a\n\n b\u2581c  d\t学生\U0001f600 it's 12<|endoftext|>\n".encode()


def llama_tokenizer(documents):
    """As Llama's own: no words, a mark for every space, bytes for what is no piece."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    special = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=special + pieces, show_progress=False
    )
    backend.train_from_iterator([document.decode() for document in documents], trainer)
    description = json.loads(backend.to_str())
    description["pre_tokenizer"] = None
    description["added_tokens"] = [
        token for token in description["added_tokens"] if token["content"] in special
    ]
    backend = Tokenizer.from_str(json.dumps(description))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template="{{ messages }}",
    )


@pytest.fixture(scope="module", params=["byte_level", "llama"])
def tokenizer(request):
    return train_tokenizer(OLD, 300) if request.param == "byte_level" else llama_tokenizer(OLD)


@pytest.fixture(scope="module")
def extension(tokenizer):
    return extend_tokenizer(tokenizer, NEW, 60, old=OLD)


def test_old_ids_stay_and_new_ones_follow_without_a_hole(tokenizer, extension):
    before, after = tokenizer.get_vocab(), extension.tokenizer.get_vocab()
    assert {name: after[name] for name in before} == before
    assert len(extension.origins) == 60
    assert sorted(after.values()) == list(range(extension.first + 60))
    assert extension.words == len(after)


def test_every_text_comes_back_as_before(tokenizer, extension, tmp_path):
    extension.tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert compare_tokenizers(extension.tokenizer, loaded) is None
    codec, before = TokenCodec(loaded), TokenCodec(tokenizer)
    assert codec.is_byte_level == before.is_byte_level
    for text in [*OLD[:20], *FRESH, ODD]:
        assert codec.decode(codec.encode(text)) == before.decode(before.encode(text))
    assert loaded.eos_token == tokenizer.eos_token
    assert loaded.chat_template == tokenizer.chat_template
    text = NEW[0].decode()
    assert loaded(text)["input_ids"] == extension.tokenizer(text)["input_ids"]


def test_new_tokens_are_old_ones_joined_and_their_origins_say_which(tokenizer, extension):
    before, after = TokenCodec(tokenizer), TokenCodec(extension.tokenizer)
    for text in [*OLD[:20], *FRESH, ODD]:
        spelled = []
        for token in after.encode(text).tolist():
            new = token >= extension.first
            spelled += extension.origins[token - extension.first] if new else [token]
        assert spelled == before.encode(text).tolist()


def test_new_text_takes_fewer_tokens_and_old_text_the_same(tokenizer, extension):
    new = compare_fertility(tokenizer, extension.tokenizer, FRESH)
    assert new["after"]["tokens"] < 0.6 * new["before"]["tokens"]
    assert new["before"]["changed_documents"] == new["after"]["changed_documents"] == 0
    old = compare_fertility(tokenizer, extension.tokenizer, OLD)
    assert old["joined_share"] == 0
    assert old["after"] == old["before"]
    # a piece that is none of a longer one's beginnings is of use
    codec = TokenCodec(extension.tokenizer)
    used = np.unique(np.concatenate(codec.encode_many(NEW)))
    assert (used >= extension.first).sum() > 30


def test_pairs_of_old_text_are_refused_only_where_it_is_given(tokenizer):
    mixed = [text + b"\n" + old for text, old in zip(NEW, OLD, strict=False)]
    careful = extend_tokenizer(tokenizer, mixed, 60, old=OLD)
    careless = extend_tokenizer(tokenizer, mixed, 60)
    assert careful.refused > 0
    assert careless.refused == 0
    shares = [
        compare_fertility(tokenizer, one.tokenizer, OLD)["joined_share"]
        for one in (careful, careless)
    ]
    assert shares[0] < 0.01 < shares[1]


def test_the_same_text_gives_the_same_pieces(tokenizer, extension):
    again = extend_tokenizer(tokenizer, NEW, 60, old=OLD)
    assert again.origins == extension.origins
    assert compare_tokenizers(again.tokenizer, extension.tokenizer) is None


def test_what_cannot_be_extended_is_told(tokenizer):
    with pytest.raises(UserError, match="no use for new pieces"):
        extend_tokenizer(tokenizer, [b"x"], 5)
    with pytest.raises(UserError, match="0 new pieces"):
        extend_tokenizer(tokenizer, NEW, 0)
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    strange = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    with pytest.raises(UserError, match=r"cannot extend this tokenizer \(WordLevel\)"):
        extend_tokenizer(strange, NEW, 5)


def test_rows_are_means_of_old_rows_and_padding_is_filled():
    table = torch.arange(12.0).reshape(6, 2)
    # five words, and a row that pads
    longer = extended_rows(table, 9, 5, [(0, 2), (4,)])
    assert torch.equal(longer[:5], table[:5])
    assert longer[5].tolist() == [2.0, 3.0]
    assert torch.equal(longer[6], table[4])
    assert longer[7:].tolist() == [[4.0, 5.0]] * 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_models_of_all_families_get_rows_and_stay_what_they_were(architecture, tied, tmp_path):
    tokenizer = train_tokenizer(OLD, 300)
    extension = extend_tokenizer(tokenizer, NEW, 30)
    shape = ladder_shape(architecture, 12_000, vocabulary=310, positions=32)
    model = build_model(dataclasses.replace(shape, tied=tied), seed=1)
    save_model(model, tmp_path / "old", tokenizer)
    rows = extend_model(tmp_path / "old", tmp_path / "new", extension)
    assert rows == 384
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.config.vocab_size == rows
    assert len(AutoTokenizer.from_pretrained(tmp_path / "new")) == extension.words
    head, old_head = (one.get_output_embeddings().weight for one in (found, model))
    table = found.get_input_embeddings().weight
    assert (head is table) == tied
    ids = torch.from_numpy(TokenCodec(tokenizer).encode(OLD[0])[None, :30])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits[..., :300], model(ids).logits[..., :300])
    for place, origin in enumerate(extension.origins, start=extension.first):
        for new, old in ((table, model.get_input_embeddings().weight), (head, old_head)):
            torch.testing.assert_close(new[place], old[list(origin)].mean(0))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    (place / "old.txt").write_text(made_up_text(200))
    (place / "new.txt").write_text(foreign_text(200))
    return place


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory):
    """One that has learnt nothing, with Llama's kind of tokenizer."""
    tokenizer = llama_tokenizer(OLD)
    shape = ladder_shape("llama", 8_000, vocabulary=448, positions=32)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(build_model(shape, seed=1), folder, tokenizer)
    (folder / "LICENSE").write_text("free")
    return folder


def asked(model, texts, out, *more, tokens="32k"):
    return (
        *("adapt", model, "--new", texts / "new.txt", "--pieces", 40, "--tokens", tokens),
        *("--out", out, "--window", 32, "-s", "training.batch_tokens=256", *more),
    )


def test_a_token_for_pictures_needs_no_row(typed, texts, tmp_path):
    tokenizer = llama_tokenizer(OLD)
    words = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    shape = ladder_shape("llama", 8_000, vocabulary=words, positions=32)
    save_model(build_model(shape, seed=1), tmp_path / "tiny", tokenizer)
    done = typed(*asked(tmp_path / "tiny", texts, tmp_path / "run", "--json", tokens="0"))
    assert done.code == 0, done.err
    assert json.loads(done.out)["tokenizer"]["words_before"] == words + 1


def test_a_model_is_adapted_and_done_only_once(typed, model, texts, tmp_path):
    out = tmp_path / "run"
    old = ("--old", texts / "old.txt", "--new-share", "0.6", "--json")
    done = typed(*asked(model, texts, out, *old))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == read_json(out / "adapt.json")
    assert found["tokenizer"]["pieces"] == 40
    assert found["tokenizer"]["rows"] == 448
    for name in ("new", "old"):
        bits = [found["heldout"][name][when]["bits_per_byte"] for when in ("before", "after")]
        assert bits[1] < bits[0] - 0.2
        sizes = {found["heldout"][name][when]["bytes"] for when in ("before", "extended", "after")}
        assert len(sizes) == 1
    assert [one["share"] for one in found["training"]["sources"]] == [0.6, 0.4]
    assert sorted(path.name for path in out.iterdir()) == [
        *(".lock", "adapt.json", "corpora", "model", "training")
    ]
    assert (out / "model/LICENSE").read_text() == "free"
    trained = load_model(out / "model")
    assert trained.config.vocab_size == 448
    record = json.loads((out / "training/train.json").read_text())
    assert record["after"]["extended"]["folder"] == str(out / "model")
    # the same command again has nothing to do, another has another place
    changed = (out / "adapt.json").stat().st_mtime_ns
    again = typed(*asked(model, texts, out, *old))
    assert (again.code, json.loads(again.out)) == (0, found)
    assert (out / "adapt.json").stat().st_mtime_ns == changed
    wrong = typed(*asked(model, texts, out, *old, tokens="64k"))
    assert wrong.code == 2
    assert "another run (tokens is 64000, was 32000)" in wrong.err


@pytest.mark.parametrize(("precision", "micro"), [("fp32", 256), ("bf16", 128)])
def test_two_processes_share_the_training(model, texts, tmp_path, precision, micro):
    """In bf16 the sums of two micro-batches differ from those of one, on one process as on two."""
    bits = []
    for count in (1, 2):
        out = tmp_path / str(count)
        settings = ["-s", f"training.precision={precision}"]
        settings += ["-s", f"training.micro_batch_tokens={micro}"] * (count == 1)
        words = asked(model, texts, out, *settings, tokens="4096")
        done = processes.run_ranks(count, *words)
        assert done.returncode == 0, done.stderr
        found = json.loads((out / "adapt.json").read_text())
        bits.append(found["heldout"]["new"]["after"]["bits_per_byte"])
    assert bits[1] == pytest.approx(bits[0], rel=1e-4)


def test_no_tokens_only_extend(typed, model, texts, tmp_path):
    done = typed(*asked(model, texts, tmp_path / "run", tokens="0"))
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "run/adapt.json").read_text())
    assert found["training"] is None
    assert found["heldout"]["new"]["after"] is None
    assert "old" not in found["heldout"]
    assert load_model(tmp_path / "run/model").config.vocab_size == 448
    assert "40 new tokens" in done.out
    assert (tmp_path / "run/model/LICENSE").read_text() == "free"


def test_stopped_anywhere_it_goes_on_to_the_same_end(model, texts, tmp_path):
    from capgap.errors import Interrupted
    from capgap.stages.adapt import Adapt

    def request(out):
        sources = {"new": str(texts / "new.txt"), "old": str(texts / "old.txt")}
        return Adapt(
            model=str(model),
            out=out,
            pieces=40,
            tokens=4096,
            window=32,
            training={"batch_tokens": 256},
            running={"checkpoint_seconds": 0, "checkpoint_share": 0.9},
            **sources,
        )

    whole = request(tmp_path / "whole").run()
    times = 0
    while True:
        # every time it goes on a little longer
        answers = itertools.chain([False] * (3 + times), itertools.repeat(True))
        try:
            found = request(tmp_path / "often").run(should_stop=answers.__next__)
            break
        except Interrupted:
            times += 1
            assert times < 30
    assert times > 2
    assert found["heldout"] == whole["heldout"]
    one, two = (load_model(tmp_path / name / "model").state_dict() for name in ("whole", "often"))
    for name, value in one.items():
        assert torch.equal(value, two[name])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--new-share", "0.5"), "new_share 0.5 is of the new text beside old"),
        (("--old", "stdlib", "--new-share", "1"), "--new-share '1': Input should be less than 1"),
        (("--old", "nowhere.txt"), "nowhere.txt"),
        (("--window", "64"), "reads at most 32 tokens, the window has 64"),
        (("--tokens", "100"), "tokens 100 is less than one batch of 256"),
        (("--pieces", "0"), "'0' is no count"),
        (("-s", "training.alpha=1"), "training.alpha is about a teacher"),
        (("-s", "training.batch_tokens=100"), "not a multiple of window 32"),
    ],
)
def test_mistakes_are_told_in_a_line_before_any_work(typed, model, texts, tmp_path, more, told):
    done = typed(*asked(model, texts, tmp_path / "run"), *more)
    assert done.code == 2
    assert told in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_one_document_is_told(typed, model, texts, tmp_path):
    (tmp_path / "new.txt").write_text("one document")
    for folder, more in ((tmp_path, ()), (texts, ("--separator", "", "--max-documents", 9))):
        done = typed(*asked(model, folder, tmp_path / f"run{len(more)}"), *more)
        assert done.code == 2
        assert "has 1 documents: 2 or more are needed" in done.err


def test_the_commands_of_the_page_run(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/adaptation.md").read_text()
    block = re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[0]
    library = part_of_library(tmp_path / "library", "asyncio", "encodings")
    commands = [line for line in block.replace("\\\n", " ").splitlines() if "capgap" in line]
    assert len(commands) == 4
    for line in commands:
        words = shlex.split(line.replace("$LIB", str(library)), comments=True)
        assert words[0] == "capgap"
        done = typed(*words[1:])
        assert done.code == 0, done.err
    found = json.loads(Path("adapted/adapt.json").read_text())
    after = found["heldout"]["new"]
    assert after["after"]["bits_per_byte"] < after["before"]["bits_per_byte"]


def test_special_tokens_of_a_chat_template_stay_special(tmp_path):
    from capgap.tune.template import special_in

    trained = train_tokenizer(OLD, 300)
    chatting = PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        eos_token=trained.eos_token,
        extra_special_tokens=["<|im_start|>"],
    )
    extended = extend_tokenizer(chatting, NEW, 10).tokenizer
    extended.save_pretrained(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert "<|im_start|>" in found.all_special_tokens
    assert special_in(found, "so <|im_start|>system") == "<|im_start|>"
