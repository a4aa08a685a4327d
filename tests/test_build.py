import math
import shutil
import socket
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig

from capgap.corpus.names import cached_file
from capgap.errors import UserError
from capgap.models.build import (
    Parts,
    build_model,
    load_model,
    save_model,
    shape_of,
    to_config,
)
from capgap.models.identity import model_hash
from capgap.models.shape import ARCHITECTURES, Shape, ladder_shape
from capgap.models.stored import local_folder


def unreachable(*_, **__):
    raise socket.gaierror("Name or service not known")


def tiny(architecture):
    return ladder_shape(architecture, 20_000, vocabulary=97, positions=32)


SHAPES = [
    ladder_shape(architecture, size, vocabulary=97, positions=32)
    for architecture in ARCHITECTURES
    for size in (6144, 50_000, 300_000)
] + [
    Shape("llama", 48, 3, 6, 2, 16, 77, 101, 40, False),
    Shape("llama", 48, 1, 4, 4, 8, 1, 101, 40, True),
    Shape("gpt_neox", 36, 2, 3, 3, 12, 50, 101, 40, False),
    Shape("gpt2", 35, 2, 5, 5, 7, 50, 101, 40, False),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_are_those_of_the_built_model(shape):
    model = build_model(shape, seed=0)
    parts = dict.fromkeys(("embedding", "attention", "ffn", "norms", "head"), 0)
    for name, weight in model.named_parameters():
        path = name.split(".")
        if "lm_head" in path:
            part = "head"
        elif {"embed_tokens", "embed_in", "wte", "wpe"} & set(path):
            part = "embedding"
        elif {"self_attn", "attention", "attn"} & set(path):
            part = "attention"
        elif "mlp" in path:
            part = "ffn"
        else:
            part = "norms"
        parts[part] += weight.numel()
    counts = shape.parameters().as_dict()
    assert {part: counts[part] for part in parts} == parts
    assert counts["total"] == model.num_parameters()
    assert shape_of(model.config) == shape


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_seed_decides_and_the_callers_random_state_stays(architecture):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_model(tiny(architecture), seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    again = build_model(tiny(architecture), seed=1).state_dict()
    other = build_model(tiny(architecture), seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_predictions_are_no_worse_than_a_little_over_uniform(architecture):
    shape = ladder_shape(architecture, 100_000, vocabulary=512, positions=32)
    windows = torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(0))
    logits = build_model(shape, seed=0)(windows).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    # logits of std 0.8 cost half their variance over the uniform guess
    assert loss.item() - math.log(512) == pytest.approx(0.8**2 / 2, abs=0.15)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_save_load_and_split(architecture, tied, tmp_path):
    model = build_model(replace(tiny(architecture), tied=tied), seed=0)
    path = tmp_path / "runs" / "model"
    save_model(build_model(tiny(architecture), seed=9), path)
    (path.parent / ".model.partial").mkdir()  # left by a killed run
    save_model(model, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]

    windows = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = model(windows).logits
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(plain(windows).logits, expected)
    loaded = load_model(path)
    assert loaded.dtype == torch.float32
    parts = Parts(loaded)
    assert isinstance(parts.head, nn.Linear)
    assert torch.equal(parts.logits(parts(windows)), expected)
    # generation with a key-value cache agrees with a fresh forward pass at each step
    text = loaded.generate(windows[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    for length in range(20, 24):
        assert text[0, length] == model(text[:, :length]).logits[0, -1].argmax()
    assert load_model(path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_errors_are_one_clear_line(tmp_path, monkeypatch):
    def message(path):
        with pytest.raises(UserError) as error:
            load_model(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no model folder" in message(tmp_path / "missing")
    assert "config.json" in message(tmp_path)

    path = tmp_path / "model"
    save_model(build_model(tiny("llama"), seed=0), path)
    config = path / "config.json"
    text = config.read_text()
    config.write_text(text[:-2] + ', "quantization_config": {"quant_method": "gptq", "bits": 4}}')
    assert "quantised" in message(path)
    config.write_text(text.replace("llama", "unheard-of"))
    assert "unheard-of" in message(path)
    config.write_text(text)

    weights = load_file(path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert "model.safetensors is damaged (not as it was written" in message(path)
    (path / "capgap.json").unlink()
    assert "model.norm.weight" in message(path)
    (path / "model.safetensors").write_bytes(b"cut short")
    assert str(path) in message(path)
    shutil.move(path / "model.safetensors", path / "pytorch_model.bin")
    assert "safetensors" in message(path)

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    assert "no file or folder of that name" in message("nobody/no-such-model")


def test_a_model_in_the_hubs_cache_is_that_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    # the Hub's client would wait, and try again
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "ab" * 20
    cached = tmp_path / "models--team--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit)
    save_model(build_model(tiny("llama"), seed=0), cached / f"snapshots/{commit}")
    assert local_folder("team/name") == cached / f"snapshots/{commit}"
    assert model_hash("team/name") == model_hash(cached / f"snapshots/{commit}")
    exact = f"team/name@{commit}"
    for name in ("team/name", "team/name@main", exact):
        assert cached_file(name, "config.json") == cached / f"snapshots/{commit}/config.json"
    # a branch would be looked up on the Hub, which takes its client a while to give up
    assert local_folder(exact) == cached / f"snapshots/{commit}"
    assert load_model(exact).config.model_type == "llama"
    assert cached_file("team/name", "tokenizer.json") is None
    assert cached_file("team/name@other", "config.json") is None
    with pytest.raises(UserError, match="no folder team/other"):
        model_hash("team/other")


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(attention_bias=True), GPT2Config(add_cross_attention=True), BloomConfig()],
)
def test_shape_of_refuses_what_a_shape_cannot_tell(config):
    with pytest.raises(UserError):
        shape_of(config)


def test_shape_of_reads_defaults():
    shape = shape_of(GPT2Config())
    assert (shape.ffn, shape.head_size, shape.tied) == (3072, 64, True)
    assert shape.parameters().total == 124_439_808


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_dropout(architecture):
    for name, value in to_config(tiny(architecture)).to_dict().items():
        # the two others belong to heads for classification
        if "drop" in name and name not in ("classifier_dropout", "summary_first_dropout"):
            assert value == 0, name
