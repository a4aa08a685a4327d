"""`capgap export`: a folder that others load, and a card that tells the truth."""

import json
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import processes
from capgap.artifact import read_json, write_json
from capgap.cli import main
from capgap.export import card as cards
from capgap.export.card import (
    Card,
    Licence,
    Loss,
    card_of_student,
    card_text,
    find_licence,
    front_matter,
)
from capgap.export.folder import check_vllm
from capgap.export.lineage import find_lineage
from capgap.models.build import build_model, load_model, save_model, shape_of
from capgap.models.families import FAMILIES
from capgap.models.shape import ladder_shape
from capgap.stages.distill import Distill
from capgap.stages.export import Export
from capgap.stages.prune import Prune
from capgap.stages.score import Score
from report_data import write_output
from test_docs import assert_told, code_blocks, keys

APACHE = (
    "\n                                 Apache License\n                           Version 2.0\n"
)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# model_type -> the class that vLLM's registry has for it, as read there
VLLM_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def save(folder, corpus, architecture="llama", *, size=12_000, dtype=torch.float32, template=None):
    shape = ladder_shape(architecture, size, vocabulary=304, positions=32)
    tokenizer = corpus.tokenizer
    tokenizer.chat_template = template
    save_model(build_model(shape, seed=1).to(dtype), folder, tokenizer)
    tokenizer.chat_template = None
    return folder


def logits(folder, **loading):
    """The same words through whatever was stored, as plain transformers reads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, **loading).eval()
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12) * 7 % 300).logits


def in_this_process(*words):
    """A command of capgap, outside of a test."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["capgap", *map(str, words), "--quiet"])
        with pytest.raises(SystemExit) as ended:
            main()
    signal.signal(signal.SIGTERM, before)
    assert not ended.value.code


@pytest.fixture(scope="module")
def student(small_corpus, tmp_path_factory):
    """A student that was cut out of a teacher and distilled: OUT/students/cut."""
    place = tmp_path_factory.mktemp("made")
    teacher = save(place / "teacher", small_corpus, size=20_000)
    (teacher / "LICENSE").write_text(APACHE)
    scores, corpus = place / "scores.safetensors", small_corpus.directory
    Score(teacher=str(teacher), out=scores, corpus=corpus, tokens=512, window=16).run()
    Prune(teacher=str(teacher), out=place / "cut", scores=scores, params=9_000).run()
    Distill(
        teacher=str(teacher),
        students=[str(place / "cut")],
        corpus=corpus,
        out=place / "run",
        tokens=2048,
        window=16,
        training={"batch_tokens": 256},
    ).run()
    evaluated = {
        "schema": 1,
        "tasks": {
            "piqa": {
                "score": 0.53125,
                "score_stderr": 0.01,
                "metric": "acc",
                "shots": 0,
                "questions": 64,
            },
            "lambada": {"score": 812.5, "score_stderr": 30.0, "metric": "perplexity", "shots": 0},
            "ceval": {"score": None, "missing": f"no local copy in {place}, and no network"},
        },
        "mean_percent": None,
    }
    (place / "run/students/cut/evaluate.json").write_text(json.dumps(evaluated))
    return place / "run/students/cut"


def test_a_student_is_handed_on_with_its_story(typed, student, tmp_path):
    out = tmp_path / "handed"
    done = typed("export", student, "--out", out, "--shard-size", "30kB", "--name", "Mini 9k")
    assert done.code == 0, done.err
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(out), logits(student))
    assert "logits: those of the model" in done.out
    assert (out / "LICENSE").read_text() == APACHE
    assert GenerationConfig.from_pretrained(out).eos_token_id == 0

    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": name, "type": name, "args": {"num_few_shot": 0}},
            "metrics": [{"type": metric, "value": score}],
        }
        for name, metric, score in (("piqa", "acc", 0.53125), ("lambada", "perplexity", 812.5))
    ]
    fields = front_matter(out / "README.md")
    assert fields == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["distillation", "capgap"],
        "model-index": [{"name": "Mini 9k", "results": results}],
    }
    text = (out / "README.md").read_text()
    record = json.loads((student.parents[1] / "distill.json").read_text())
    after = record["after"]["cut"]["heldout"]
    for told in (
        "# Mini 9k",
        "distilled from `teacher` (",
        "cut: out of `teacher`, ",
        "what to keep: by activation scores on 512 tokens",
        "training: 2.05k tokens in windows of 16",
        f"{record['flops']:.3g} FLOPs",
        f"{after['loss']:.3f} | {after['bits_per_byte']:.3f}",
        "| piqa | acc | 0 | 64 | 53.1% ± 1.0% |",
        "| lambada | perplexity | 0 |  | 812.5 ± 30 |",
        "| ceval |  |  |  | not measured: no local copy |",
        "apache-2.0, inherited; read from LICENSE of the teacher 'teacher'",
    ):
        assert told in text, told
    # where it was made is nobody's business
    assert str(tmp_path.parent) not in text
    assert "licence: apache-2.0, from LICENSE of the teacher" in done.out

    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace('folder = "Mini 9k"', f"folder = {str(out)!r}")
    ran = processes.run_code(code)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("architecture", list(FAMILIES))
def test_every_family_comes_back_as_it_was(small_corpus, tmp_path, architecture):
    source = save(tmp_path / "model", small_corpus, architecture)
    found = Export(model=str(source), out=tmp_path / "out", dtype="bf16").run()
    assert found["vllm"]["architecture"] == VLLM_CLASSES[architecture]
    # the ladder gives so small models of these heads of 12, and of those a free width
    told = [re.split(" in |:", told)[0] for told in found["vllm"]["problems"]]
    expected = [] if FAMILIES[architecture].free_width else ["heads of size 12"]
    if FAMILIES[architecture].square:
        expected = [f"vLLM takes hidden / heads for the head size of {architecture}"]
    assert told == expected
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [VLLM_CLASSES[architecture]]
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"

    Export(model=str(source), out=tmp_path / "same").run()
    assert torch.equal(logits(tmp_path / "same"), logits(source))
    first, second = (load_model(tmp_path / name) for name in ("out", "same"))
    assert first.dtype == torch.bfloat16
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other.bfloat16())
    assert shape_of(first.config) == shape_of(second.config)


def test_older_readers_find_the_rotary_base_under_its_old_names(small_corpus, tmp_path):
    def exported(architecture, **rope):
        model = build_model(
            ladder_shape(architecture, 12_000, vocabulary=304, positions=32), seed=1
        )
        model.config.rope_parameters |= rope
        save_model(model, tmp_path / architecture, small_corpus.tokenizer)
        out = tmp_path / f"{architecture}-out"
        Export(model=str(tmp_path / architecture), out=out).run()
        again = load_model(out).config.rope_parameters
        assert again == load_model(tmp_path / architecture).config.rope_parameters
        return json.loads((out / "config.json").read_text())

    assert exported("llama", rope_theta=500_000.0)["rope_theta"] == 500_000.0
    scaled = exported("qwen2", rope_type="linear", factor=2.0)
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    old = exported("gpt_neox", rope_theta=1234.0)
    assert (old["rotary_emb_base"], old["rotary_pct"]) == (1234.0, 1.0)
    both = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
    }
    gemma = exported("gemma3_text", **both)
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (5e5, 2e4)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_what_vllm_would_refuse_is_told(small_corpus, tmp_path):
    shape = ladder_shape("gemma2", 12_000, vocabulary=304, positions=32)
    config = {"architectures": ["Gemma2ForCausalLM"], "auto_map": {}}
    told = " ".join(check_vllm(shape, torch.float16, config)["problems"])
    assert "refuses fp16 for gemma2" in told
    assert "auto_map" in told
    config = {"architectures": ["Gemma2Model"]}
    told = " ".join(check_vllm(shape, torch.float32, config)["problems"])
    assert "Gemma2Model" in told
    assert f"heads of size {shape.head_size} in float32" in told


def test_without_memory_logits_are_not_compared_and_it_is_said(
    typed, small_corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("capgap.export.folder.free_memory", lambda: 10_000)
    source = save(tmp_path / "model", small_corpus)
    done = typed("export", source, "--out", tmp_path / "out")
    assert done.code == 0
    assert "not compared with the model's (" in done.out
    assert "10 kB free" in done.out


def test_broken_weights_are_refused_by_name_and_nothing_is_left(typed, small_corpus, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    for value, dtype, told in (
        (float("nan"), (), "holds NaN or infinite weights"),
        (1e6, ("--dtype", "fp16"), "too large for fp16: take bf16"),
    ):
        model = build_model(ladder_shape("llama", 12_000, vocabulary=304, positions=32), seed=1)
        with torch.no_grad():
            model.get_parameter(name)[0, 0] = value
        save_model(model, tmp_path / "model", small_corpus.tokenizer)
        done = typed("export", tmp_path / "model", "--out", tmp_path / "out", *dtype)
        assert done.code == 2
        assert name in done.err
        assert told in done.err
        assert done.err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlicense: mit\n---\n# x"}, ("mit", None)),
        ({"LICENSE": APACHE}, ("apache-2.0", None)),
        ({"LICENSE.txt": "LLAMA 2 COMMUNITY LICENSE AGREEMENT\n"}, ("llama2", None)),
        (
            {"README.md": "---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\n---\n"},
            ("other", "house"),
        ),
        (
            {"LICENSE": "\n\nHouse Rules, 2nd edition\n"},
            ("other", "house-rules-2nd-edition"),
        ),
        ({"README.md": "no front matter\nlicense: mit"}, (None, None)),
        ({"README.md": "---\n: : [\n---\n"}, (None, None)),
        ({"README.md": "---\nlicense: [mit, gpl-3.0]\n---\n"}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_a_licence_is_read_and_never_made_up(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = find_licence([("the teacher", str(tmp_path))])
    assert (found.id, found.name) == expected
    assert tmp_path.name in found.source


def test_a_licence_from_the_hub_is_that_of_a_model_that_was_loaded(tmp_path, monkeypatch):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\n")
    assert find_licence([("the teacher", "teachers/big")]).id is None
    monkeypatch.setattr(cards, "cached_file", lambda name, file: card)
    found = find_licence([("the teacher", "org/big")])
    assert (found.id, found.source) == ("apache-2.0", "the model card of the teacher 'org/big'")


def test_a_card_of_an_unknown_licence_says_so():
    card = Card(
        name='a: "model"',
        architecture="llama",
        non_embedding=9_000,
        total=12_000,
        licence=Licence(None, "the teacher 'x' tells none"),
        base_model="org/x",
        benchmarks={"a|b": {"score": 0.25}},
        six_benchmark_mean=0.25,
    )
    text = card_text(card)
    fields = yaml.safe_load(re.match("---\n(.*?)\n---", text, re.DOTALL)[1])
    assert "license" not in fields
    assert fields["base_model"] == "org/x"
    assert "Unknown (the teacher 'x' tells none)." in text
    assert "| a/b |  |  |  | 25.0% |" in text
    assert "| mean of the six |  |  |  | 25.0% |" in text


def test_the_student_of_a_sweep_keeps_its_story(small_corpus, tmp_path):
    out = write_output(tmp_path / "sweep")
    marker = read_json(out / "sweep.json")
    marker["recipe"]["corpus"] = {"source": str(tmp_path / "texts")}
    write_json(out / "sweep.json", marker)
    student = save(out / "student", small_corpus)
    card = card_of_student(student)
    assert card is not None
    assert card.name == marker["best"]["cell"]
    Export(model=str(student), out=tmp_path / "out").run()
    text = (tmp_path / "out/README.md").read_text()
    assert "the same student by cross-entropy alone" in text
    assert "text: `texts`, " in text
    assert str(tmp_path) not in text
    assert f"# {card.name}" in text
    assert card_of_student(save(tmp_path / "student", small_corpus)) is None


def test_records_can_be_given_and_those_of_other_models_are_left(typed, small_corpus, tmp_path):
    source = save(tmp_path / "models/mine", small_corpus)
    other = {"tasks": {"piqa": {"score": 0.1}}, "model": "some/other"}
    (tmp_path / "models/evaluate.json").write_text(json.dumps(other))
    found = Export(model=str(source), out=tmp_path / "one").run()
    assert found["records"] == []
    given = tmp_path / "models/evaluate.json"
    found = Export(model=str(source), out=tmp_path / "two", record=(given,)).run()
    assert len(found["records"]) == 1
    assert "| piqa |" in (tmp_path / "two/README.md").read_text()


def test_a_tuned_model_tells_the_whole_way(student, tmp_path):
    """Through the models that it began as."""
    before = student
    for name, told in (
        ("instruct", {"lora": {"rank": 8}}),
        ("prefer", {"lora": None}),
    ):
        place = tmp_path / name
        shutil.copytree(before, place / "model")
        for record in place.glob("model/*.json"):
            if record.name in ("pruning.json", "evaluate.json", "distill.json"):
                record.unlink()
        counted = {"training": 1200}
        losses = {"before": {"loss": 2.0}, "after": {"loss": 1.5}}
        record = {"asked": {"model": str(before), **told}, "data": counted, **losses}
        (place / f"{name}.json").write_text(json.dumps(record))
        before = place / "model"
    found = Export(model=str(before), out=tmp_path / "out").run()
    assert [Path(path).name for path in found["records"]] == [
        "prefer.json",
        "instruct.json",
        "distill.json",
        "pruning.json",
    ]
    text = (tmp_path / "out/README.md").read_text()
    assert (
        "conversations, 1,200 of them, LoRA of rank 8, merged; held-out loss 2.000 -> 1.5" in text
    )
    assert "DPO on pairs of answers, 1,200 of them; held-out" in text
    assert "| after distilling |" in text
    assert "cut: out of `teacher`" in text

    given = tuple(tmp_path / f"{name}/{name}.json" for name in ("instruct", "prefer"))
    again = Export(model=str(before), out=tmp_path / "again", record=given).run()
    assert sorted(again["records"]) == sorted(found["records"])


def write(path, **record):
    path.write_text(json.dumps(record))
    return path


def test_records_of_another_model_of_the_same_name_are_left(small_corpus, tmp_path):
    """adapt, instruct and prefer all call their folder `model`."""
    mine, other = (save(tmp_path / f"{name}/model", small_corpus) for name in ("mine", "other"))
    tasks = {"piqa": {"score": 0.5}}
    write(tmp_path / "evaluate.json", tasks=tasks, model=str(other))
    write(tmp_path / "instruct.json", asked={"model": "gone"}, folder=str(other))
    write(tmp_path / "pruning.json", teacher="x", teacher_shape={}, shape={})
    assert Export(model=str(mine), out=tmp_path / "one").run()["records"] == []
    # a name alone tells nothing either where its folder is gone
    write(tmp_path / "evaluate.json", tasks=tasks, model=str(tmp_path / "gone/model"))
    assert Export(model=str(mine), out=tmp_path / "two").run()["records"] == []
    write(tmp_path / "evaluate.json", tasks=tasks, model=str(mine))
    assert len(Export(model=str(mine), out=tmp_path / "three").run()["records"]) == 1
    named = save(tmp_path / "mine/named", small_corpus)
    write(tmp_path / "evaluate.json", tasks=tasks, model=str(tmp_path / "before/named"))
    assert len(Export(model=str(named), out=tmp_path / "four").run()["records"]) == 1


def test_cut_out_of_one_model_and_taught_by_another(tmp_path):
    """Both are teachers; a copy of a run is told by its own records."""
    student = tmp_path / "run/students/small"
    student.mkdir(parents=True)
    write(student / "pruning.json", teacher="org/large", teacher_shape={}, shape={})
    asked = {"teacher": "org/other", "students": ["cut/small"]}
    write(tmp_path / "run/distill.json", asked=asked, after={"small": {"folder": str(student)}})
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for folder in (student, tmp_path / "copy/students/small"):
        found = find_lineage(folder)
        assert [path.name for path in found.paths] == ["distill.json", "pruning.json"]
        assert found.teacher == "org/other"
        assert found.origins == [
            ("the teacher", "org/other"),
            ("the teacher", "org/large"),
            ("the model that it began as", "cut/small"),
        ]


def test_a_model_that_was_tuned_twice_or_made_from_itself(tmp_path):
    """The nearest record of a kind is told, and every model once."""
    first, second = tmp_path / "first/model", tmp_path / "second/model"
    for folder, began in ((first, "org/base"), (second, str(first))):
        folder.mkdir(parents=True)
        write(folder.parent / "instruct.json", asked={"model": began}, folder=str(folder))
    write(tmp_path / "first/adapt.json", asked={"model": str(second)}, folder=str(first))
    found = find_lineage(second)
    assert found.values("instruct.json")["asked"] == {"model": str(first)}
    assert [place for _, place in found.origins] == [str(first), "org/base"]


def test_a_given_evaluation_of_an_earlier_model_is_told_as_such(small_corpus, tmp_path):
    first = save(tmp_path / "first", small_corpus)
    tuned = save(tmp_path / "instruct/model", small_corpus)
    write(tmp_path / "instruct/instruct.json", asked={"model": str(first)}, folder=str(tuned))
    early = write(tmp_path / "early.json", tasks={"piqa": {"score": 0.25}}, model=str(first))
    late = write(tmp_path / "late.json", tasks={"piqa": {"score": 0.75}}, model=str(tuned))
    for number, (given, heading, score) in enumerate(
        (
            ((early,), "## Benchmarks of a model that this one began as\n", "25.0%"),
            ((late, early), "## Benchmarks\n", "75.0%"),
            ((early, late), "## Benchmarks\n", "75.0%"),
        )
    ):
        Export(model=str(tuned), out=tmp_path / f"out{number}", record=given).run()
        text = (tmp_path / f"out{number}/README.md").read_text()
        assert heading in text
        assert score in text


def test_licence_and_adaptation_come_through_all_stages(small_corpus, tmp_path):
    """A licence that only the first model's card tells: adapt, distill, instruct, prefer."""
    first = save(tmp_path / "first", small_corpus)
    (first / "README.md").write_text("---\nlicense: mit\n---\n")
    adapted, instructed, preferred = (
        save(tmp_path / f"{name}/model", small_corpus) for name in ("adapt", "instruct", "prefer")
    )
    student = save(tmp_path / "distill/students/small", small_corpus)
    heldout = {
        "new": {"before": {"bits_per_byte": 2.5}, "after": {"bits_per_byte": 1.25}},
        "old": {"before": {"bits_per_byte": 1.0}, "after": {"bits_per_byte": 1.125}},
    }
    told = {"tokenizer": {"pieces": 20}, "heldout": heldout, "folder": str(adapted)}
    write(tmp_path / "adapt/adapt.json", asked={"model": str(first), "tokens": 4096}, **told)
    asked = {"teacher": str(adapted), "students": [], "tokens": 64, "window": 16}
    after = {"small": {"folder": str(student), "heldout": {"loss": 3.0}}}
    write(tmp_path / "distill/distill.json", asked=asked, after=after)
    for name, before, folder in (
        ("instruct", student, instructed),
        ("prefer", instructed, preferred),
    ):
        asked = {"model": str(before)}
        write(tmp_path / name / f"{name}.json", asked=asked, folder=str(folder))
    line = (
        "20 new pieces, 4.1k tokens; bits per byte of new text 2.500 -> 1.250; "
        "bits per byte of old text 1.000 -> 1.125"
    )
    for model, what, of in (
        (adapted, "the model that it began as", ""),
        (student, "the model that the teacher began as", " of the teacher"),
        (preferred, "the model that the teacher began as", " of the teacher"),
    ):
        out = tmp_path / f"out-{model.parent.parent.name}-{model.parent.name}"
        found = Export(model=str(model), out=out).run()
        assert found["licence"] == {"id": "mit", "source": f"the model card of {what} 'first'"}
        assert f"- adaptation{of}: {line}\n" in (out / "README.md").read_text()


def test_the_base_model_is_the_first_of_the_hub(small_corpus, tmp_path, monkeypatch):
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(
        cards, "cached_file", lambda name, file: card if name == "org/big" else None
    )
    tuned = save(tmp_path / "instruct/model", small_corpus)
    write(tmp_path / "instruct/instruct.json", asked={"model": "org/big"}, folder=str(tuned))
    Export(model=str(tuned), out=tmp_path / "out").run()
    fields = front_matter(tmp_path / "out/README.md")
    assert (fields["base_model"], fields["license"]) == ("org/big", "mit")


def test_a_chat_template_goes_along(small_corpus, tmp_path):
    source = save(tmp_path / "chat", small_corpus, template=TEMPLATE)
    found = Export(model=str(source), out=tmp_path / "out").run()
    assert found["chat_template"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "Kaba?"}]
    written = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert written == "user: Kaba?\nassistant: "
    assert "apply_chat_template" in (tmp_path / "out/README.md").read_text()


def test_a_tokenizer_config_tells_nothing_of_the_machine(small_corpus, tmp_path):
    source = save(tmp_path / "model", small_corpus)
    Export(model=str(source), out=tmp_path / "out").run()
    fields = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "name_or_path"} & fields.keys()
    first, second = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("model", "out"))
    text = "Kaba lofi, mi ren.\n  x = 1"
    assert first(text)["input_ids"] == second(text)["input_ids"]


def test_mistakes_are_one_line(typed, small_corpus, tmp_path):
    source = save(tmp_path / "model", small_corpus)
    taken = tmp_path / "taken"
    taken.mkdir()
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    shutil.copytree(source, tmp_path / "unlike")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "unlike/config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    new = ("--out", tmp_path / "new")
    for arguments, told in (
        ((source, "--out", taken), f"--out {taken} exists: choose another, or delete it"),
        ((source, *new, "--dtype", "int8"), "--dtype 'int8': Input should be 'stored', 'fp32', "),
        ((source, *new, "--shard-size", "big"), "'big' is no amount of bytes"),
        ((source, *new, "--record", broken), "broken.json is none of prefer.json"),
        ((source, *new, "--record", tmp_path / "none.json"), "none.json is none of prefer.json"),
        ((source, *new, "--gguf", broken), "broken.json exists: choose another, or delete it"),
        ((tmp_path / "none", *new), "is no model folder"),
        ((tmp_path / "unlike", *new), "its config says [8, "),
    ):
        done = typed("export", *arguments)
        assert done.code == 2, arguments
        assert told in done.err, done.err
        assert done.err.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_trl_trains_what_was_exported(student, tmp_path):
    """And saves something that plain transformers loads again."""
    pytest.importorskip("trl")
    Export(model=str(student), out=tmp_path / "out").run()
    code = f"""
import os
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
settings = SFTConfig(
    output_dir={str(tmp_path / "sft")!r}, max_length=16, max_steps=1, use_cpu=True, bf16=False,
    report_to="none", save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2,
    dataloader_pin_memory=False,
)
data = Dataset.from_list([{{"text": "Kaba lofi mi ren."}}] * 4)
trainer = SFTTrainer(model={str(tmp_path / "out")!r}, args=settings, train_dataset=data)
assert trainer.train().training_loss > 0
trainer.save_model()
"""
    done = processes.run_code(code)
    assert done.returncode == 0, done.stderr
    assert logits(tmp_path / "sft").isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lm_eval_scores_what_was_exported(student, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    Export(model=str(student), out=tmp_path / "out").run()
    harness = HFLM(pretrained=str(tmp_path / "out"), device="cpu", batch_size=1)
    asked = Instance("loglikelihood", {}, ("Kaba", " lofi"), 0)
    ((score, _),) = harness.loglikelihood([asked])
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = load_model(student).eval()
    first, whole = (tokenizer(text)["input_ids"] for text in ("Kaba", "Kaba lofi"))
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    by_hand = sum(float(log_p[place - 1, whole[place]]) for place in range(len(first), len(whole)))
    assert score == pytest.approx(by_hand, abs=1e-4)


def test_the_page_runs_as_it_is_written(typed, text_file, tmp_path, monkeypatch):
    """The commands of docs/export.md; what it shows is what they print, but for the digits of
    sizes."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/export.md").read_text()
    (block,), (shown,) = code_blocks(page, "sh"), code_blocks(page, "text")
    shutil.copy(text_file, tmp_path / "text.txt")
    first, code, more = re.split(r"^python - <<'END'\n(.*?)^END\n", block, flags=re.M | re.S)
    commands = [shlex.split(line) for line in more.replace("\\\n", "").splitlines()]
    assert [words[1] for words in commands] == ["score", "prune", "distill", "export"]
    for words in (shlex.split(first), *commands):
        done = typed(*words[1:])
        assert done.code == 0, done.err
        if words[1] == "corpus":
            exec(code, {})
    printed = "\n".join(done.out.splitlines()[-7:]) + "\n"
    sizes = r"[\d.]+ kB"
    assert re.sub(sizes, "", printed) == re.sub(sizes, "", shown)
    assert (tmp_path / "handed/README.md").is_file()
    assert any((tmp_path / "run/trackers/tensorboard").iterdir())


def test_what_the_command_tells_is_told(small_corpus, tmp_path):
    source = save(tmp_path / "model", small_corpus)
    request = Export(model=str(source), out=tmp_path / "out", gguf=tmp_path / "a.gguf")
    found = request.run()
    assert_told(found, keys("cli.md", "`--json` of export"))


def test_a_name_with_markup_is_text_in_the_card():
    name = "a\n# Heading\n<script>[x](y)`|"
    unknown = Licence(None, "nothing")
    card = Card(
        name=name,
        architecture="llama",
        non_embedding=1000,
        total=2000,
        licence=unknown,
        teacher="t\n\n# Other",
        made=("cut\n# Third",),
        losses=(Loss(what="x|y\nz", loss=1.0),),
    )
    text = card_text(card)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[0] == r"# a \# Heading \<script\>\[x\](y)\`\|"
    assert headings[1:] == ["## How it was made", "## Held-out loss", "## Use", "## Licence"]
    assert "| x/y z |" in text
    assert f"folder = {json.dumps(name)}" in text


def test_a_folder_that_was_moved_by_itself_tells_where_it_comes_from(student, tmp_path):
    shutil.copytree(student, tmp_path / "renamed")
    (tmp_path / "renamed/evaluate.json").unlink(missing_ok=True)
    found = Export(model=str(tmp_path / "renamed"), out=tmp_path / "out").run()
    assert [Path(path).name for path in found["records"]] == ["distill.json", "pruning.json"]
    text = (tmp_path / "out/README.md").read_text()
    assert "training: 2.05k tokens in windows of 16" in text
    assert "| this student |" in text
