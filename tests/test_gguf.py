"""GGUF files: what transformers reads from one is the model that was written."""

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from capgap.corpus.tokenizer import num_words
from capgap.export.gguf_file import LAYOUTS, SPACE, missing_splits, tokenizer_keys
from capgap.machine import install_command
from capgap.models.build import build_model, save_model
from capgap.models.families import FAMILIES
from capgap.models.shape import Shape
from capgap.stages.export import Export
from conftest import made_up_text

gguf = pytest.importorskip("gguf")
TEXT = "Kaba lofi, mi ren.\n  x = 12 \u00e9\u4e2d it's"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def shape(architecture="llama", *, tied=False, kv_heads=2, vocabulary=320, positions=64, layers=2):
    return Shape(architecture, 32, layers, 4, kv_heads, 8, 48, vocabulary, positions, tied)


def save(folder, tokenizer, *, dtype=torch.float32, changes=None, **sizes):
    model = build_model(shape(**sizes), seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    for name, value in (changes or {}).items():
        setattr(model.config, name, value)
    save_model(model.to(dtype), folder, tokenizer)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(24).reshape(2, 12) * 7 % 300).logits


def merged_everywhere(vocab):
    """All ways to join two pieces to a third, as a sentencepiece model has them."""
    found = []
    for piece, number in vocab.items():
        for place in range(1, len(piece)):
            parts = piece[:place], piece[place:]
            if re.fullmatch(r"<.*>", piece) is None and all(part in vocab for part in parts):
                found.append((number, vocab[parts[0]], vocab[parts[1]], parts))
    return [parts for _, _, _, parts in sorted(found)]


def llama_tokenizer():
    """Byte fallback, spaces as part of words, all merges of a sentencepiece model."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(SPACE), "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    trained.train_from_iterator([f" {made_up_text(40)}"], trainer)
    vocab = json.loads(trained.to_str())["model"]["vocab"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    # the trainer's ids are in the order of its merges
    return like_llama([*pieces, *sorted(vocab, key=vocab.get)], None)


def like_llama(pieces, merges):
    """`merges` None: all that the pieces allow."""
    vocab = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    merges = merged_everywhere(vocab) if merges is None else merges
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("architecture", "tied", "kv_heads"),
    [
        ("llama", False, 2),
        ("llama", True, 4),
        ("mistral", False, 1),
        ("qwen2", True, 2),
        ("qwen3", True, 2),
        ("gemma3_text", True, 2),
    ],
)
def test_transformers_reads_the_same_model(
    typed, small_corpus, tmp_path, architecture, tied, kv_heads, dtype
):
    source = save(
        tmp_path / "model",
        small_corpus.tokenizer,
        architecture=architecture,
        tied=tied,
        kv_heads=kv_heads,
    )
    place = tmp_path / "file"
    path = place / "mini.gguf"
    out = tmp_path / "out"
    done = typed("export", source, "--out", out, "--gguf", path, "--dtype", dtype, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)["gguf"]
    assert told["architecture"] == LAYOUTS[architecture].architecture
    assert told["compared_tensors"] == len(gguf.GGUFReader(path).tensors)
    assert [path.name for path in place.iterdir()] == ["mini.gguf"]

    dtype_of = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    wanted = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    # of Qwen3 and Gemma transformers does not read the size of heads, which is in the file
    config = {"config": wanted.config} if architecture in ("qwen3", "gemma3_text") else {}
    read = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=path.name, dtype=torch.float32, **config
    )
    if architecture == "gemma3_text":  # norms are written with 1 added, which rounds
        assert torch.allclose(logits(read), logits(wanted), atol=1e-5)
    else:
        assert torch.equal(logits(read), logits(wanted))
    fields = gguf.GGUFReader(path).fields
    size = wanted.config.head_dim if hasattr(wanted.config, "head_dim") else None
    told = fields[f"{LAYOUTS[architecture].architecture}.attention.key_length"].contents()
    assert size in (None, told)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]
    assert kinds["output_norm.weight"] == "F32"
    assert wanted.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(out).dtype == dtype_of


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA_KINDS = [
    "full_attention" if layer in (6, 12) else "sliding_attention" for layer in range(1, 14)
]
GEMMA = {
    "sliding_window": 16,
    "layer_types": GEMMA_KINDS,
    "num_hidden_layers": 13,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    },
}


@pytest.mark.parametrize(
    ("architecture", "changes", "within"),
    [
        ("llama", {}, 2e-5),
        ("llama", {"rope_parameters": ROPE}, 2e-5),
        ("qwen2", {}, 2e-5),
        ("qwen3", {}, 2e-5),
        # llama.cpp looks GELU up in a table of half precision; another window, rotary base or
        # order of layers makes a difference of 0.6
        ("gemma3_text", GEMMA, 5e-3),
    ],
)
def test_llama_cpp_computes_the_same_logits(small_corpus, tmp_path, architecture, changes, within):
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not here")
    tokenizer = llama_tokenizer() if architecture != "qwen2" else small_corpus.tokenizer
    words = len(tokenizer)
    source = save(
        tmp_path / "model",
        tokenizer,
        architecture=architecture,
        layers=changes.get("num_hidden_layers", 2),
        vocabulary=words,
        positions=256,
        changes=changes,
    )
    path = tmp_path / "file/mini.gguf"
    Export(model=str(source), out=tmp_path / "out", gguf=path).run()
    asked = xllamacpp.CommonParams()
    asked.model.path = str(path)
    asked.n_ctx, asked.n_parallel, asked.cpuparams.n_threads = 256, 1, 1
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    tokens = torch.randint(4, words, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    answer = xllamacpp.Server(asked).handle_completions(
        {"prompt": tokens, "n_predict": 1, "n_probs": words, "temperature": 0.0}
    )
    told = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = {one["id"]: one["logprob"] for one in told}
    assert len(found) == words
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    assert torch.tensor([found[word] for word in range(words)]) == pytest.approx(wanted, abs=within)


def test_gemmas_that_llama_cpp_would_read_otherwise_are_refused(typed, tmp_path):
    tokenizer = llama_tokenizer()

    def refused(name, changes):
        source = save(
            tmp_path / name,
            tokenizer,
            architecture="gemma3_text",
            layers=13,
            vocabulary=len(tokenizer),
            changes=GEMMA | changes,
        )
        done = typed("export", source, "--out", tmp_path / "out", "--gguf", tmp_path / "a.gguf")
        assert (done.code, done.err.count("\n")) == (2, 1)
        return done.err

    shifted = {"layer_types": GEMMA_KINDS[1:] + GEMMA_KINDS[:1]}
    assert "full attention in layers 5, 11 of 13" in refused("shifted", shifted)
    assert "query_pre_attn_scalar=24, for llama.cpp takes the head size" in refused(
        "scaled", {"query_pre_attn_scalar": 24}
    )
    assert "final_logit_softcapping=30.0" in refused("capped", {"final_logit_softcapping": 30.0})


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_the_tokenizer_is_read_back_with_its_template(small_corpus, tmp_path, kind):
    is_llama = kind == "llama"
    tokenizer = llama_tokenizer() if is_llama else small_corpus.tokenizer
    tokenizer.chat_template = TEMPLATE
    words = len(tokenizer)
    source = save(tmp_path / "model", tokenizer, vocabulary=words + 20)
    tokenizer.chat_template = None
    path = tmp_path / "file/mini.gguf"
    found = Export(model=str(source), out=tmp_path / "out", gguf=path).run()
    assert found["gguf"]["tokenizer"] == ("llama" if is_llama else "gpt2")
    assert found["gguf"]["missing_splits"] == 0
    wanted = AutoTokenizer.from_pretrained(source)
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert read(TEXT)["input_ids"] == wanted(TEXT)["input_ids"]
    # in the file, since transformers 5.17 reads the end of a llama tokenizer wrongly
    fields = gguf.GGUFReader(path).fields
    for name, wanted_id in (("bos", wanted.bos_token_id), ("eos", wanted.eos_token_id)):
        assert fields[f"tokenizer.ggml.{name}_token_id"].contents() == wanted_id
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[-20:] == [5] * 20
    assert types[wanted.eos_token_id] == 3
    if is_llama:
        assert types[0] == 2
        assert types[3:259] == [6] * 256
        assert fields["tokenizer.ggml.add_space_prefix"].contents()


def test_joins_that_only_llama_cpp_makes_are_counted(typed, tmp_path):
    """Merges learnt one by one lack ways to the same piece, which llama.cpp would take."""
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    tokenizer = like_llama(["a", "b", "c", "ab", "bc", "abc"], merges)
    assert missing_splits(tokenizer) == 1
    source = save(tmp_path / "model", tokenizer, vocabulary=len(tokenizer))
    done = typed("export", source, "--out", tmp_path / "out", "--gguf", tmp_path / "a.gguf")
    assert done.code == 0, done.err
    assert "it knows 1 joins of pieces" in done.out


def test_what_is_beyond_a_sliding_window_is_not_promised(small_corpus, tmp_path):
    source = save(
        tmp_path / "model",
        small_corpus.tokenizer,
        architecture="mistral",
        changes={"sliding_window": 48},
    )
    request = Export(model=str(source), out=tmp_path / "out", gguf=tmp_path / "a.gguf", name="mini")
    assert request.run()["gguf"]["context"] == 48
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["general.name"].contents() == "mini"
    assert "general.license" not in fields


@pytest.mark.parametrize(
    ("cutting", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            "smollm",
        ),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(
                        Regex(
                            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                        ),
                        "isolated",
                    ),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            "llama-bpe",
        ),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Whitespace(), None),
    ],
)
def test_the_way_of_cutting_text_has_its_name(small_corpus, cutting, name):
    backend = Tokenizer.from_str(small_corpus.tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = cutting
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    if name is None:
        with pytest.raises(Exception, match=r"has no name in llama\.cpp"):
            tokenizer_keys(tokenizer, 320)
    else:
        assert tokenizer_keys(tokenizer, 320)["tokenizer.ggml.pre"] == name


def test_what_cannot_be_a_gguf_file_is_one_line(typed, small_corpus, tmp_path, monkeypatch):
    tokenizer = small_corpus.tokenizer

    def refused(source):
        done = typed("export", source, "--out", tmp_path / "out", "--gguf", tmp_path / "a.gguf")
        assert done.code == 2
        assert done.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "a.gguf").exists()
        return done.err

    for architecture in set(FAMILIES) - set(LAYOUTS):
        source = tmp_path / architecture
        heads = 4 if architecture in ("gpt_neox", "gpt2") else 2
        save(source, tokenizer, architecture=architecture, kv_heads=heads)
        told = refused(source)
        assert (
            "--gguf writes llama, mistral, qwen2, qwen3, gemma3_text models, and this is a "
            f"{architecture}" in told
        )
    inside = save(tmp_path / "inside", tokenizer)
    done = typed("export", inside, "--out", tmp_path / "out", "--gguf", tmp_path / "out/a.gguf")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"lies within {tmp_path / 'out'}: put it beside" in done.err
    scaled = save(
        tmp_path / "qwen", tokenizer, architecture="qwen3", changes={"rope_parameters": ROPE}
    )
    assert "type 'llama3'" in refused(scaled)
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    assert "type 'linear'" in refused(save(tmp_path / "scaled", tokenizer, changes=scaled))
    odd = save(tmp_path / "odd", tokenizer, changes={"hidden_act": "gelu"})
    assert "hidden_act=gelu" in refused(odd)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert install_command("gguf") in refused(save(tmp_path / "plain", tokenizer))


def test_a_file_that_was_written_wrong_is_not_kept(small_corpus, tmp_path, monkeypatch):
    from capgap.export import gguf_file

    source = save(tmp_path / "model", small_corpus.tokenizer)
    write = gguf_file._bytes

    def spoilt(tensor):
        data = write(tensor).copy()
        data.reshape(-1)[0] ^= np.uint8(1)
        return data

    monkeypatch.setattr(gguf_file, "_bytes", spoilt)
    request = Export(model=str(source), out=tmp_path / "out", gguf=tmp_path / "file/a.gguf")
    with pytest.raises(OSError, match=r"token_embd\.weight was not read back"):
        request.run()
    assert list((tmp_path / "file").iterdir()) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoilt", ["folder", "file"])
def test_what_computes_other_logits_is_not_kept(typed, small_corpus, tmp_path, monkeypatch, spoilt):
    """Its tensors are read back as they were written: it is the logits that tell."""
    from capgap.export import folder, gguf_file

    source = save(tmp_path / "model", small_corpus.tokenizer)
    if spoilt == "folder":
        write = folder.write_weights

        def other(place, skeleton, make, **options):
            write(place, skeleton, lambda name: make(name) * 1.5, **options)

        monkeypatch.setattr(folder, "write_weights", other)
    else:
        monkeypatch.setattr(gguf_file, "_turned", lambda tensor, heads: tensor.flip(0))
    done = typed("export", source, "--out", tmp_path / "out", "--gguf", tmp_path / "a.gguf")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "computes other logits than the model" in done.err
    assert ("a.gguf computes" in done.err) == (spoilt == "file")
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_token_for_pictures_needs_no_row(typed, tmp_path):
    """As of Gemma 3's text models: it stands in no text. Any other token needs one."""
    tokenizer = llama_tokenizer()
    words = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert num_words(tokenizer) == words
    source = save(tmp_path / "model", tokenizer, vocabulary=words)
    done = typed("export", source, "--out", tmp_path / "out", "--gguf", tmp_path / "a.gguf")
    assert done.code == 0, done.err
    assert len(gguf.GGUFReader(tmp_path / "a.gguf").fields["tokenizer.ggml.tokens"].data) == words
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    assert num_words(tokenizer) == words + 2
    source = save(tmp_path / "other", tokenizer, vocabulary=words)
    done = typed("export", source, "--out", tmp_path / "second")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"has {words} tokens, its tokenizer {words + 2}" in done.err


def test_a_tokenizer_that_changes_text_first_is_refused(typed, small_corpus, tmp_path):
    tokenizer = small_corpus.tokenizer
    source = save(tmp_path / "model", tokenizer)
    path = source / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}
    path.write_text(json.dumps(fields))
    done = typed("export", source, "--out", tmp_path / "out", "--gguf", tmp_path / "a.gguf")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "changes text before it cuts it" in done.err


def test_double_precision_is_written_in_single(small_corpus, tmp_path):
    source = save(tmp_path / "model", small_corpus.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(source).double()
    model.save_pretrained(source)
    (source / "capgap.json").unlink()  # the change is ours
    path = tmp_path / "file" / "a.gguf"
    Export(model=str(source), out=tmp_path / "out", gguf=path).run()
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == {"F32"}
