"""The commands `score` and `prune`: files, provenance, streaming, mistakes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from capgap.errors import Interrupted, UserError
from capgap.models import stored
from capgap.models.build import (
    build_model,
    checkpoint_activations,
    load_model,
    save_model,
    shape_of,
    to_config,
)
from capgap.models.families import FAMILIES
from capgap.models.identity import model_hash
from capgap.models.parts import Parts
from capgap.models.shape import Shape, ladder_shape
from capgap.models.stored import StoredWeights
from capgap.prune.importance import UNITS, load_importance, save_importance, score, scoring_batches
from capgap.prune.surgery import cut, score_lost
from capgap.stages.prune import Prune
from capgap.stages.score import Score
from lively import lively

MINIMA = {"hidden": 3072, "heads": 24, "ffn": 8192, "layers": 24}
LLAMA_2_7B = Shape("llama", 4096, 32, 32, 32, 128, 11008, 49216, 4096, False)


@pytest.fixture(scope="module")
def teacher(small_corpus, tmp_path_factory):
    """A model folder with tokenizer and generation config."""
    place = tmp_path_factory.mktemp("models") / "teacher"
    model = build_model(ladder_shape("llama", 60_000, vocabulary=300, positions=32), seed=1)
    model.generation_config.max_new_tokens = 7
    save_model(model, place, small_corpus.tokenizer)
    (place / "LICENSE").write_text("do what you like\n")
    return place


@pytest.fixture(scope="module")
def scores(teacher, small_corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    asked(teacher, small_corpus, path).run()
    return path


def asked(teacher, corpus, out, **values):
    given = {"tokens": 1024, "window": 16} | values
    return Score(teacher=str(teacher), corpus=corpus.directory, out=out, **given)


def assert_same_scores(first, second):
    for name in UNITS:
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_scores_say_where_they_come_from(typed, teacher, small_corpus, scores, tmp_path):
    asked = (
        *("score", teacher, "--corpus", small_corpus.directory, "--window", 16),
        *("--tokens", 1024, "--out", tmp_path / "scores.safetensors"),
    )
    found = typed(*asked, "--json")
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert told["teacher_hash"] == model_hash(teacher)
    assert told["corpus_hash"] == small_corpus.corpus_hash
    assert (told["method"], told["tokens"]) == ("activation", 1024)
    importance = load_importance(tmp_path / "scores.safetensors")
    assert_same_scores(importance, load_importance(scores))
    direct = score(load_model(teacher), scoring_batches(small_corpus, 1024))
    assert_same_scores(importance, direct)
    assert importance.provenance["teacher"] == str(teacher)
    # the same again is done already; something else has no place there
    before = (tmp_path / "scores.safetensors").stat().st_mtime_ns
    assert typed(*asked).code == 0
    assert (tmp_path / "scores.safetensors").stat().st_mtime_ns == before
    other = typed(*asked, "--method", "weights")
    assert other.code == 2
    assert "other scores (method is weights, was activation)" in other.err
    assert other.err.count("\n") == 1


@pytest.mark.parametrize("method", ["first_order", "weights", "activation"])
def test_a_stopped_scoring_goes_on_to_the_same_scores(teacher, small_corpus, tmp_path, method):
    def request(name):
        out = tmp_path / name
        return asked(teacher, small_corpus, out, method=method, depth="influence")

    request("whole").run()
    calls = 0

    def stop_after_three():
        nonlocal calls
        calls += 1
        return calls == 3

    with pytest.raises(Interrupted):
        request("stopped").run(should_stop=stop_after_three)
    assert not (tmp_path / "stopped").exists()
    with safe_open(tmp_path / ".stopped.partial", framework="pt") as partial:
        assert json.loads(partial.metadata()["capgap"])["batches"] == 3
    batches = []
    request("stopped").run(should_stop=lambda: batches.append(1) is not None)
    assert len(batches) == 8 - 3
    assert_same_scores(load_importance(tmp_path / "whole"), load_importance(tmp_path / "stopped"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]


def test_a_partial_scoring_of_something_else_is_not_gone_on_with(teacher, small_corpus, tmp_path):
    request = asked(teacher, small_corpus, tmp_path / "scores", tokens=512)
    with pytest.raises(Interrupted):
        request.but(seed=5).run(should_stop=lambda: True)
    request.run()
    direct = score(load_model(teacher), scoring_batches(small_corpus, 512))
    assert_same_scores(load_importance(tmp_path / "scores"), direct)


def test_scores_in_bf16_are_nearly_those_in_fp32(teacher, small_corpus, scores, tmp_path):
    asked(teacher, small_corpus, tmp_path / "half", dtype="bf16").run()
    half, whole = load_importance(tmp_path / "half"), load_importance(scores)
    for name in UNITS:
        torch.testing.assert_close(getattr(half, name), getattr(whole, name), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("method", ["first_order", "weights"])
def test_checkpointed_activations_change_no_score(architecture, method):
    shape = Shape(architecture, 32, 3, 4, 4, 8, 40, 53, 24, True)
    batches = [torch.randint(53, (2, 9), generator=torch.Generator().manual_seed(1))]
    plain = score(lively(shape), batches, method=method)
    model = lively(shape)
    checkpoint_activations(model)
    inner = model.get_submodule(f"{shape.family.layers}.0.{shape.family.neuron_inputs}")
    calls = []
    Parts(model)
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same_scores(score(model, batches, method=method), plain)
    # forward, and once more in the backward pass
    assert len(calls) == 2
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_streamed_cut_is_the_cut_in_memory(
    architecture, small_corpus, tmp_path, monkeypatch, typed
):
    """From a teacher in many files to a student in many files."""
    monkeypatch.setattr(stored, "SHARD_BYTES", 10_000)
    shape = Shape(architecture, 32, 3, 4, 4, 8, 40, 300, 32, True)
    model = lively(shape).to(torch.bfloat16)
    small_corpus.tokenizer.save_pretrained(tmp_path / "teacher")
    model.save_pretrained(tmp_path / "teacher", max_shard_size=30_000)
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 1
    made = typed(
        *("score", tmp_path / "teacher", "--method", "norm", "--depth", "ends"),
        *("--out", tmp_path / "scores"),
    )
    assert made.code == 0, made.err
    found = typed(
        *("prune", tmp_path / "teacher", "--scores", tmp_path / "scores"),
        *("--out", tmp_path / "student", "--shape", "hidden=24,heads=3,ffn=27,layers=2", "--json"),
    )
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert len(list((tmp_path / "student").glob("*.safetensors"))) > 1
    small = replace(shape, hidden=24, heads=3, kv_heads=3, ffn=27, layers=2)
    expected = cut(model, load_importance(tmp_path / "scores"), small)
    student, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", dtype="auto", output_loading_info=True
    )
    assert not any(report.values())
    assert student.dtype == torch.bfloat16
    assert shape_of(student.config) == small
    weights = expected.state_dict()
    assert student.state_dict().keys() == weights.keys()
    assert all(torch.equal(one, weights[name]) for name, one in student.state_dict().items())
    assert student.num_parameters() == told["parameters"]["total"] == small.parameters().total
    # saved and loaded by transformers alone, the logits stay
    student.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    windows = torch.arange(20).unsqueeze(0)
    assert torch.equal(again(windows).logits, student(windows).logits)


def test_the_result_is_a_folder_that_says_what_it_is(teacher, scores, tmp_path):
    own = shape_of(load_model(teacher).config)
    asked = {"teacher": str(teacher), "out": tmp_path / "student", "scores": scores}
    told = Prune(**asked, keep=0.5, multiple=1).run()
    assert told["written"]
    wanted = 0.5 * own.parameters().non_embedding
    assert told["parameters"]["non_embedding"] == pytest.approx(wanted, rel=0.01)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "student").decode([40]) is not None
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (tmp_path / "student" / name).read_bytes() == (teacher / name).read_bytes()
    said = json.loads((tmp_path / "student" / "pruning.json").read_text())
    assert said["teacher_hash"] == model_hash(teacher)
    assert said["scores"]["method"] == "activation"
    assert said["scores"]["tokens"] == 1024
    # the kept indices are those of the weights
    kept, layer = said["kept"], said["kept"]["layers"][0]
    whole = load_model(teacher).state_dict()
    own_weights = student.state_dict()
    down = whole[f"model.layers.{layer}.mlp.down_proj.weight"]
    expected = down[kept["hidden"]][:, kept["neurons"][0]]
    assert torch.equal(own_weights["model.layers.0.mlp.down_proj.weight"], expected)
    assert [len(row) for row in kept["heads"]] == [student.config.num_key_value_heads] * own.layers


def test_everything_kept_is_the_teacher_bit_for_bit(teacher, scores, tmp_path):
    Prune(teacher=str(teacher), out=tmp_path / "same", scores=scores, keep=1).run()
    first = load_file(teacher / "model.safetensors")
    second = load_file(tmp_path / "same" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(one, second[name]) for name, one in first.items())


def test_a_checkpoint_of_a_bare_backbone(small_corpus, tmp_path):
    """As GPT-2's own on the Hub: no first word, masks of attention among the weights."""
    shape = ladder_shape("gpt2", 20_000, vocabulary=300, positions=32)
    model = lively(shape)
    save_model(model, tmp_path / "teacher", small_corpus.tokenizer)
    file = tmp_path / "teacher" / "model.safetensors"
    weights = {name.removeprefix("transformer."): one for name, one in load_file(file).items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    save_file(weights, file, metadata={"format": "pt"})
    (tmp_path / "teacher" / "capgap.json").unlink()
    importance = score(model, [], method="norm")
    save_importance(tmp_path / "scores", importance)
    paths = {name: tmp_path / name for name in ("teacher", "scores")}
    Prune(
        **paths | {"teacher": str(paths["teacher"])}, out=tmp_path / "student", shape="layers=1"
    ).run()
    expected = cut(model, importance, replace(shape, layers=1))
    windows = torch.arange(20).unsqueeze(0)
    found = load_model(tmp_path / "student")
    assert torch.equal(found(windows).logits, expected(windows).logits)


def test_the_shape_of_minima_3b_without_weights(typed, tmp_path):
    to_config(LLAMA_2_7B).save_pretrained(tmp_path / "llama-2-7b")
    asked = ("prune", tmp_path / "llama-2-7b", "--out", tmp_path / "minima", "--dry-run")
    shape = ",".join(f"{name}={size}" for name, size in MINIMA.items())
    found = json.loads(typed(*asked, "--shape", shape, "--json").out)
    assert found["parameters"]["total"] == 3_020_442_624
    assert found["teacher_parameters"]["total"] == 6_879_449_088
    # by its size alone, a shape of as many parameters
    found = typed(*asked, "--params", "3.02B total", "--multiple", 128, "--json")
    found = json.loads(found.out)
    assert found["parameters"]["total"] == pytest.approx(3.02e9, rel=0.01)
    assert found["shape"]["hidden"] % 128 == found["shape"]["ffn"] % 128 == 0
    assert found["shape"]["head_size"] == 128
    assert found["num_candidates"] > len(found["candidates"]) > 1
    told = typed(*asked, "--keep", 0.4).out
    assert re.search(r"non-embedding parameters \((39\.[89]|40\.[012])% of the teacher's\)", told)
    assert "hidden, and heads with ffn, cut alike" in told
    assert list(tmp_path.iterdir()) == [tmp_path / "llama-2-7b"]


def test_what_is_preferred(teacher, scores, tmp_path):
    own = shape_of(load_model(teacher).config)
    common = {"keep": 0.4, "multiple": 2}
    common |= {"teacher": str(teacher), "out": tmp_path / "x", "dry_run": True}
    axes = Prune(**common).run()
    shape = Shape(**axes["shape"])
    assert shape.layers == own.layers
    assert shape.hidden / own.hidden == pytest.approx(0.4**0.5, rel=0.2)
    assert shape.ffn / own.ffn == pytest.approx(0.4**0.5, rel=0.2)
    by_score = Prune(**common, scores=scores, prefer="score").run()
    distances = [one["distance"] for one in by_score["candidates"]]
    assert distances == sorted(distances)
    lost = score_lost(load_importance(scores))
    assert lost(own) == pytest.approx(0, abs=1e-6)
    assert distances[0] == lost(Shape(**by_score["shape"])) < lost(shape)


def test_the_score_that_a_shape_gives_up_by_hand():
    shape = Shape("llama", 16, 2, 2, 2, 8, 4, 53, 24, True)
    importance = score(lively(shape), [], method="norm")
    small = replace(shape, layers=1, ffn=3)
    layers = importance.layers.max() / importance.layers.sum()
    rows = importance.neurons.sort(-1, descending=True).values
    neurons = (rows[:, :3].sum(-1) / rows.sum(-1)).mean()
    expected = -(layers.log() + neurons.log()).item()
    assert score_lost(importance)(small) == pytest.approx(expected, rel=1e-5)


def test_a_stopped_cut_leaves_nothing(teacher, scores, tmp_path, monkeypatch):
    def stop(self, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(StoredWeights, "__getitem__", stop)
    with pytest.raises(KeyboardInterrupt):
        Prune(teacher=str(teacher), out=tmp_path / "student", scores=scores, keep=1).run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--params", "2M"], "the teacher has"),
        (["--params", "300 total"], "the smallest cut of this teacher has"),
        (["--keep", "1.5"], "--keep '1.5': Input should be less than or equal to 1"),
        (["--keep", "0.5", "--multiple", "0"], "--multiple '0' is no count"),
        (["--keep", "0.5", "--params", "30k"], "not keep and params"),
        ([], "give one of keep"),
        (["--params", "30k", "--multiple", "128"], "or a smaller multiple"),
        (["--shape", "hidden=32"], "hidden 32 is no multiple"),
        (["--shape", "heads=0"], "heads is 0"),
        (["--shape", "hidden=4800"], "the model has only"),
        (["--shape", "width=3"], "no size 'width'"),
        (["--shape", "vocabulary=299"], "has 300 tokens"),
        (["--shape", "hidden:3"], "not of the form hidden=3072"),
        (["--params", "three"], "'three' is no count"),
        (["--keep", "0.5", "--prefer", "luck"], "Input should be 'axes', 'ladder' or 'score'"),
    ],
)
def test_sizes_that_cannot_be(typed, teacher, scores, tmp_path, asked, told):
    found = typed("prune", teacher, "--scores", scores, "--out", tmp_path / "student", *asked)
    assert found.code == 2
    assert told in found.err
    assert found.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_heads_go_in_whole_groups():
    own = Shape("llama", 32, 2, 8, 4, 8, 40, 53, 24, True)
    from capgap.prune.shape import changed_shape

    assert changed_shape(own, {"heads": 4}).kv_heads == 2
    with pytest.raises(UserError, match="3 heads do not divide into the model's groups of 2"):
        changed_shape(own, {"heads": 3})
    with pytest.raises(UserError, match="4 heads on 4 kv_heads"):
        changed_shape(own, {"heads": 4, "kv_heads": 4})
    asked = Prune(teacher="x", out=Path("y"), shape="hidden=24, layers=2")
    assert asked.sizes == {"hidden": 24, "layers": 2}


def test_teachers_that_cannot_be_cut(typed, teacher, scores, tmp_path, monkeypatch):
    def prune(source, *more):
        asked = ("prune", source, "--scores", scores, "--out", tmp_path / "student", "--keep", 1)
        return typed(*asked, *more)

    cases = {}
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken, ignore=shutil.ignore_patterns("capgap.json"))
    weights = load_file(broken / "model.safetensors")
    cases["lack model.norm.weight"] = {
        name: one for name, one in weights.items() if name != "model.norm.weight"
    }
    codes = weights["model.norm.weight"].to(torch.int8)
    cases["as I8: quantised weights are not supported"] = weights | {"model.norm.weight": codes}
    for told, tensors in cases.items():
        save_file(tensors, broken / "model.safetensors")
        found = prune(broken)
        assert (found.code, found.err.count("\n")) == (2, 1)
        assert told in found.err
    save_file(weights, broken / "model.safetensors")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "download it again" in prune(broken).err
    (broken / "model.safetensors").unlink()
    assert "no *.safetensors weights" in prune(broken).err

    sharded = tmp_path / "sharded"
    load_model(teacher).save_pretrained(sharded, max_shard_size=100_000)
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    found = prune(sharded)
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert f"lacks {shards[1].name}, 1 of {len(shards)} shards" in found.err

    config = json.loads((teacher / "config.json").read_text())
    quantised = tmp_path / "quantised"
    shutil.copytree(teacher, quantised)
    changed = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (quantised / "config.json").write_text(json.dumps(changed))
    found = prune(quantised)
    assert found.code == 2
    assert "is quantised (gptq): give the unquantised model" in found.err

    (quantised / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    found = prune(quantised)
    assert found.code == 2
    assert "docs/families.md" in found.err
    assert "lacks" not in prune(tmp_path / "nowhere").err
    assert prune(tmp_path / "nowhere").code == 2
    assert not (tmp_path / "student").exists()
    assert not list(tmp_path.glob(".student*"))


def test_scores_that_do_not_belong(typed, teacher, scores, small_corpus, tmp_path):
    other = tmp_path / "other"
    save_model(build_model(shape_of(load_model(teacher).config), seed=9), other)
    larger = tmp_path / "larger"
    save_model(
        build_model(ladder_shape("llama", 70_000, vocabulary=300, positions=32), seed=1), larger
    )
    for source, file, told in (
        (other, scores, "scores of another model"),
        (larger, scores, "a model of another shape"),
        (teacher, tmp_path / "none", "no file of scores"),
        (teacher, teacher / "config.json", "is no file of scores"),
        (teacher, teacher / "model.safetensors", "holds no scores of units"),
    ):
        found = typed("prune", source, "--scores", file, "--out", tmp_path / "student", "--keep", 1)
        assert (found.code, found.err.count("\n")) == (2, 1)
        assert told in found.err
    found = typed("prune", teacher, "--out", tmp_path / "student", "--keep", 1)
    assert "needs scores: make some with `capgap score" in found.err
    (tmp_path / "student").mkdir()
    found = typed("prune", teacher, "--scores", scores, "--out", tmp_path / "student", "--keep", 1)
    assert f"{tmp_path / 'student'} exists: choose another folder" in found.err


def test_text_is_prepared_beside_its_scores(typed, teacher, text_file, tmp_path):
    asked = ("--window", 16, "--tokens", 1024)
    done = typed(
        *("score", teacher, "--corpus", text_file, "--out", tmp_path / "a.safetensors", *asked)
    )
    assert done.code == 0, done.err
    corpus = tmp_path / "a.corpus"
    assert f"tokens of {text_file} by the tokenizer of {teacher}, in {corpus}" in done.err
    # the same scores as of the folder that `capgap corpus` makes
    prepared = typed("corpus", text_file, "--tokenizer", teacher, "--out", tmp_path / "own")
    assert prepared.code == 0, prepared.err
    again = typed(
        *("score", teacher, "--corpus", tmp_path / "own", "--out", tmp_path / "b", *asked)
    )
    assert again.code == 0, again.err
    assert_same_scores(load_importance(tmp_path / "a.safetensors"), load_importance(tmp_path / "b"))


def test_what_cannot_be_scored(typed, teacher, small_corpus, tmp_path):
    def score_with(*more):
        return typed("score", teacher, "--out", tmp_path / "scores", *more)

    corpus = ("--corpus", small_corpus.directory, "--window", 16)
    for asked, told in (
        ([], "reads text: give --corpus"),
        ([*corpus, "--method", "luck"], "--method 'luck': Input should be 'first_order', "),
        ([*corpus, "--depth", "luck"], "--depth 'luck': Input should be"),
        ([*corpus, "--dtype", "int4"], "--dtype 'int4': Input should be 'stored', 'fp32'"),
        ([*corpus, "--batch-windows", 0], "--batch-windows '0' is no count"),
        ([*corpus, "--device", "cuda:9"], "cuda"),
        (["--corpus", tmp_path / "nothing"], "holds no prepared corpus"),
        (["--corpus", tmp_path], "holds no text, JSON"),
        (["--corpus", small_corpus.directory, "--window", 64], "reads at most 32 tokens"),
    ):
        found = score_with(*asked)
        assert (found.code, found.err.count("\n")) == (2, 1), found.err
        assert told in found.err
    from capgap.corpus.tokenizer import train_tokenizer

    stranger = tmp_path / "stranger"
    shutil.copytree(teacher, stranger)
    train_tokenizer([b"quite another text, with other words"], 280).save_pretrained(stranger)
    found = typed("score", stranger, "--out", tmp_path / "scores", *corpus)
    assert found.code == 2
    assert "is not that of the corpus" in found.err
    assert not (tmp_path / "scores").exists()
