"""Model folders of others: read by one rule, their logits checked, or refused in one line."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from capgap.errors import UserError
from capgap.models.build import build_model, load_model, save_model
from capgap.models.families import FAMILIES
from capgap.models.identity import model_hash
from capgap.models.parts import Parts
from capgap.models.shape import Shape, ladder_shape
from capgap.models.stored import INDEX, SINGLE, StoredWeights, copy_companions, read_config
from capgap.prune.importance import score
from capgap.prune.shape import LARGE, Target, changed_shape, suited
from capgap.prune.surgery import check_cut_config, cut
from capgap.stages.export import Export
from capgap.stages.prune import Prune
from capgap.stages.score import Score

ROOT = Path(__file__).parents[1]


def architectures():
    spec = importlib.util.spec_from_file_location(
        "architectures", ROOT / "benchmarks" / "architectures.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A sample; all of them: python benchmarks/architectures.py. Who scales or caps by names of its own,
# who also sees, who has experts, who has no attention.
EQUAL = (
    "cohere falcon_h1 gemma2 gemma3 gemma3_text gpt_oss granite hyperclovax llama4 llama4_text "
    "mamba minicpm3 nanochat qwen3_5 qwen3_moe recurrent_gemma bloom opt"
)


@pytest.mark.parametrize("kind", EQUAL.split())
def test_logits_of_the_parts_are_the_models_own(kind):
    module = architectures()
    if kind not in module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    state, why = module.reads(kind)
    if state == "not built":
        pytest.skip(f"this transformers builds no tiny {kind}: {why}")
    assert state == "equal", why


@pytest.mark.parametrize("kind", ["modernbert-decoder", "roberta"])
def test_who_does_more_before_its_head_is_refused(kind):
    assert architectures().reads(kind) == (
        "refused",
        "its head reads other states than its backbone gives",
    )


# Tensors under other names than the model's, experts, buffers that count, a model that also sees
@pytest.mark.parametrize(
    "kind", ["bloom", "mamba", "mixtral", "deepseek_v3", "llama4", "cohere", "gemma4_text", "lfm3"]
)
def test_a_model_of_no_family_is_exported(tmp_path, kind):
    module = architectures()
    if kind not in module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    model = module.built(kind)
    model.save_pretrained(tmp_path / "model")
    words = {f"w{number}": number for number in range(90)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w2"
    ).save_pretrained(tmp_path / "model")
    found = Export(model=str(tmp_path / "model"), out=tmp_path / "out").run()
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "model"))
    assert found["logits_not_compared"] is None
    assert found["parameters"] == sum(weight.numel() for weight in model.parameters())
    written, own = (read_config(tmp_path / one).to_dict() for one in ("out", "model"))
    assert written.get("rope_parameters") == own.get("rope_parameters")
    assert 0 < found["non_embedding"] < found["parameters"]
    assert found["vllm"] == {"architecture": None, "checked": [], "problems": []}


def test_documents_that_see_each_other_are_told():
    module = architectures()
    for kind in ("llama", "gemma3_text"):
        Parts(module.built(kind)).check_documents()
    for kind in ("bloom", "mamba"):
        with pytest.raises(UserError, match="does not keep the documents of a row apart"):
            Parts(module.built(kind)).check_documents()


def test_experts_count_as_often_as_they_are_chosen():
    model = architectures().built("qwen3_moe")
    config = model.config
    parts = Parts(model)
    total = sum(weight.numel() for weight in model.parameters())
    experts = sum(w.numel() for name, w in model.named_parameters() if ".experts." in name)
    share = config.num_experts_per_tok / config.num_experts
    assert parts.active_parameters == total - (1 - share) * experts
    plain = build_model(ladder_shape("llama", 8000, vocabulary=50, positions=16), seed=0)
    assert Parts(plain).active_parameters == sum(w.numel() for w in plain.parameters())


@pytest.fixture
def folder(tmp_path, small_corpus):
    path = tmp_path / "model"
    save_model(
        build_model(ladder_shape("llama", 20_000, vocabulary=300, positions=32), seed=0),
        path,
        small_corpus.tokenizer,
    )
    (path / "capgap.json").unlink()  # as others' models are: tests change them
    return path


IDS = torch.arange(3, 15)[None]


def logits(path):
    with torch.no_grad():
        return load_model(path).eval()(IDS).logits


def test_a_head_of_its_own_beats_a_config_that_ties_it(folder, tmp_path, small_corpus, caplog):
    """By every way through: loading, a cut of everything, an export."""
    weights = load_file(folder / SINGLE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 1.3 + 0.01
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    own = logits(folder)
    assert "hold another head" in caplog.text
    assert not read_config(folder).tie_word_embeddings
    Export(model=str(folder), out=tmp_path / "exported").run()
    assert torch.equal(logits(tmp_path / "exported"), own)
    scores = tmp_path / "scores.safetensors"
    given = {"corpus": small_corpus.directory, "window": 16, "tokens": 64}
    Score(teacher=str(folder), out=scores, **given).run()
    Prune(teacher=str(folder), out=tmp_path / "cut", scores=scores, keep=1, multiple=1).run()
    assert torch.equal(logits(tmp_path / "cut"), own)


def test_a_head_that_is_stored_and_the_table_stays_tied(folder):
    weights = load_file(folder / SINGLE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    assert read_config(folder).tie_word_embeddings


def test_a_single_file_beside_an_index_is_read_by_both_readers(folder, caplog):
    before = logits(folder)
    other = build_model(ladder_shape("llama", 20_000, vocabulary=300, positions=32), seed=1)
    other.save_pretrained(folder / "other", max_shard_size=20_000)
    for path in (folder / "other").iterdir():
        if path.name != "config.json":
            shutil.move(path, folder / path.name)
    shutil.rmtree(folder / "other")
    assert (folder / INDEX).exists()
    assert torch.equal(logits(folder), before)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(StoredWeights(folder)[name], load_file(folder / SINGLE)[name])
    assert "is read, and not the files" in caplog.text
    # files that are not read have no part in what the model is
    known = model_hash(folder)
    (folder / "model-00001-of-00002.safetensors").unlink(missing_ok=True)
    assert model_hash(folder) == known


def test_an_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"merge it with merge_and_unload"):
        load_model(folder)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("vocab_size", 320, r"model.embed_tokens.weight as \[320"),
        ("intermediate_size", 24, r"gate_proj.weight as \[24"),
        ("num_key_value_heads", 1, "k_proj.weight as"),
        ("hidden_size", 51, "multiple of the number of attention heads"),
        ("attn_implementation", "someone/kernels", "code of another repository"),
        ("num_hidden_layers", "two", "config"),
        ("rope_parameters", [], "config"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(folder, typed, key, value, told):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=told):
        load_model(folder)
    found = typed("sample", folder, "Kaba", "--tokens", 2)
    assert (found.code, found.err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "text", ["[]", "null", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "{"]
)
def test_an_odd_index_is_one_line(folder, text):
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(text)
    with pytest.raises(UserError, match="download it again"):
        load_model(folder)


def test_whole_numbers_are_no_weights(folder):
    weights = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.int8)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match="quantised weights are not supported"):
        load_model(folder)


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("nobody's business")
    (folder / "LICENSE").symlink_to(secret)
    with pytest.raises(UserError, match="a link out of the model's folder"):
        Export(model=str(folder), out=tmp_path / "exported").run()
    assert not (tmp_path / "exported").exists()


def test_links_to_the_hubs_own_blobs_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    assert logits(snapshot).shape == (1, 12, 300)


def test_every_companion_is_kept(folder, tmp_path):
    (folder / "additional_chat_templates").mkdir()
    names = [
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "merges.txt",
        "x.tiktoken",
    ]
    for name in names:
        (folder / name).write_text("a")
    (tmp_path / "out").mkdir()
    assert set(names) <= set(copy_companions(folder, tmp_path / "out"))
    assert (tmp_path / "out" / names[0]).read_text() == "a"


def test_a_million_beams_are_not_searched(folder, typed):
    (folder / "generation_config.json").write_text('{"num_beams": 1000000, "max_length": 9}')
    found = typed("sample", folder, "Kaba", "--tokens", 3)
    assert found.code == 0, found.err


def test_a_folder_without_tokenizer_has_none(folder, typed, tmp_path):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    found = typed("export", folder, "--out", tmp_path / "out")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert "no tokenizer in" in found.err


# --- cuts that others can load ------------------------------------------------------------------


def test_shapes_of_large_students_suit_kernels_and_vllm():
    qwen = Shape("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, 32768, True)
    for shape in suited(qwen, Target(round(0.6 * qwen.parameters().non_embedding)))[:3]:
        assert shape.hidden == shape.heads * shape.head_size
        assert shape.ffn % 128 == 0
        assert shape.kv_heads % 2 == 0
    llama = Shape("llama", 2048, 16, 32, 8, 64, 8192, 128256, 4096, True)
    target = Target(LARGE + 100_000_000)
    for shape in suited(llama, target)[:3]:
        assert shape.hidden % 128 == shape.ffn % 128 == shape.kv_heads % 2 == 0


def test_a_small_teachers_own_widths_are_no_obstacle():
    stories = Shape("llama", 64, 5, 8, 4, 8, 172, 512, 512, True)
    shape = suited(stories, Target(stories.parameters().non_embedding // 2))[0]
    assert shape.parameters().non_embedding == pytest.approx(113_632, rel=0.01)


def test_a_cut_that_transformers_does_not_take_is_told_before_any_work():
    rope = {
        "rope_type": "longrope", "partial_rotary_factor": 1.0, "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8, "original_max_position_embeddings": 16,
    }  # fmt: skip
    shape = Shape("phi3", 64, 2, 4, 2, 16, 96, 300, 64, True)
    from capgap.models.build import to_config

    config = to_config(shape)
    config.original_max_position_embeddings = 16
    config.rope_parameters = rope
    check_cut_config(config, shape)
    with pytest.raises(UserError, match="transformers takes no phi3 model of hidden 48"):
        check_cut_config(config, changed_shape(shape, {"hidden": 48}))


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if FAMILIES[kind].square])
def test_default_cuts_of_square_families_are_square(kind):
    shape = Shape(kind, 64, 3, 8, 4, 8, 96, 300, 64, True)
    best = suited(shape, Target(shape.parameters().non_embedding // 2))[0]
    assert best.hidden == best.heads * best.head_size


def test_a_cut_keeps_which_layers_have_rotary_positions():
    shape = Shape("smollm3", 32, 4, 4, 2, 8, 40, 53, 24, True)
    model = build_model(shape, seed=0)
    model.config.no_rope_layers = [1, 1, 1, 0]
    importance = score(model, [torch.randint(53, (2, 9))], method="random")
    student = cut(model, importance, changed_shape(shape, {"layers": 3}))
    assert len(student.config.no_rope_layers) == 3


def test_a_model_that_also_sees_is_measured_by_its_text_part(tmp_path, small_corpus, typed):
    """A nested config has its sizes one level down; Mistral Small's has no causal class at all."""
    module = architectures()
    for kind in ("gemma3", "mistral3"):
        model = module.built(kind) if kind != "mistral3" else _mistral_small()
        path = tmp_path / kind
        model.save_pretrained(path)
        small_corpus.tokenizer.save_pretrained(path)
        rows = model.get_input_embeddings().weight.shape[0]
        asked = ("evaluate", path, "--tasks", "heldout", "--corpus", small_corpus.directory)
        found = typed(*asked, "--window", 16, "--out", tmp_path / f"{kind}.json", "--json")
        if rows < small_corpus.vocabulary:
            assert (found.code, found.err.count("\n")) == (2, 1)
            assert f"has {rows} tokens" in found.err
            continue
        assert found.code == 0, found.err
        (loss,) = json.loads(found.out)["heldout"].values()
        assert 4 < loss["loss"] < 8


def _mistral_small():
    from transformers import AutoModelForImageTextToText, Mistral3Config

    config = Mistral3Config(
        text_config={
            "model_type": "mistral", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 64,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        },
    )  # fmt: skip
    return AutoModelForImageTextToText.from_config(config)
