"""Instruction tuning: what is read, which tokens are trained, how a run stops and goes on."""

import json
import os
import re
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.trainer_pt_utils import safe_globals

from capgap.corpus.tokenizer import load_tokenizer
from capgap.errors import Interrupted, UserError
from capgap.machine import install_command
from capgap.models.build import load_model
from capgap.stages.instruct import Instruct
from capgap.tune import training
from capgap.tune.conversations import read_conversations
from capgap.tune.template import encode, fitted, prompt_ids, set_template
from talks import said, save_base, talks, write_lines
from test_docs import assert_told, keys

BASIC = [said("user", "hi"), said("assistant", "ho")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("instruct") / "base")


@pytest.fixture
def request_of(base, tmp_path):
    """A request of 3 epochs of 5 steps, on 18 conversations; tests change what they are about."""
    data = write_lines(tmp_path / "talks.jsonl", [{"messages": one} for one in talks()])

    def make(out="tuned", **changes):
        made = Instruct(
            model=str(base),
            data=data,
            out=tmp_path / out,
            batch=4,
            micro_batch=2,
            learning_rate=3e-3,
            heldout_fraction=0.1,
            device="cpu",
        )
        return made.but(**changes)

    return make


def weights(request):
    return load_file(request.out / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "line",
    [
        {"messages": BASIC},
        {"conversations": ["hi", "ho"]},
        {"data": ["hi", "ho"]},
        ["hi", "ho"],
        BASIC,
        [{"User": "hi", "Assistant": "ho"}],
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    ],
)
def test_forms_of_a_conversation(tmp_path, line):
    (found,) = read_conversations(write_lines(tmp_path / "a.jsonl", [line])).usable
    assert found.messages == BASIC


def test_a_system_prompt_beside_the_turns_or_among_them(tmp_path):
    lines = [{"system": "Be brief.", "data": ["hi", "ho"]}]
    lines.append({"messages": [said("system", "Be brief."), *BASIC]})
    found = read_conversations(write_lines(tmp_path / "a.jsonl", lines)).usable
    assert [one.messages for one in found] == [[said("system", "Be brief."), *BASIC]] * 2


def test_an_unanswered_question_is_left_out_and_counted(tmp_path):
    reading = read_conversations(write_lines(tmp_path / "a.jsonl", [["hi", "ho", "and?"]]))
    assert reading.usable[0].messages == BASIC
    assert reading.problems()["unanswered"] == {"count": 1, "first_lines": [1]}


BAD = {
    "no_assistant": {"messages": [said("user", "hi")]},
    "roles": {"messages": [said("assistant", "ho"), said("user", "hi")]},
    "empty_turn": {"messages": [said("user", " "), said("assistant", "ho")]},
    "unreadable": {"text": "hi"},
    "special_token": ["what is <|endoftext|>?", "the end"],
}


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_line_is_refused_or_left_out_and_counted(typed, base, tmp_path, kind):
    data = write_lines(tmp_path / "a.jsonl", [["hi", "ho"]] * 4 + [BAD[kind]] * 2)
    out = tmp_path / "out"
    asked = ("instruct", base, "--data", data, "--out", out, "--batch", 4, "--device", "cpu")
    refused = typed(*asked)
    assert refused.code == 2
    assert "line 5" in refused.err
    assert "(and 1 more)" in refused.err
    assert refused.err.count("\n") == 1
    assert not out.exists()
    found = typed(*asked, "--skip-bad", "--epochs", 1, "--json")
    assert found.code == 0, found.err
    told = json.loads(found.out)["data"]
    assert told["problems"][kind] == {"count": 2, "first_lines": [5, 6]}
    assert told["training"] + told["heldout"] == 4


def expected_tokens(tokenizer, messages, system=""):
    """(id, counts) part by part, without the template and its mask."""
    end = tokenizer.eos_token_id

    def part(text, counts=False):
        return [(i, counts) for i in tokenizer.encode(text, add_special_tokens=False)]

    found = [(tokenizer.bos_token_id, False)]
    if system:
        found += [*part(system), (end, False)]
    for message in messages:
        if message["role"] == "user":
            found += [*part("[|User|] " + message["content"]), (end, False)]
        else:
            found += part("[|Assistant|]")
            found += [*part(" " + message["content"], counts=True), (end, True)]
    return found


def test_the_trainer_gets_loss_on_the_assistant_alone(request_of, monkeypatch):
    """Labels, token by token, as they reach the loss, and that loss itself."""
    seen = []
    original = training._SFT.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        rows = zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True)
        seen.extend(
            [(int(i), int(label)) for i, label, real in zip(*row, strict=True) if real]
            for row in rows
        )
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(training._SFT, "compute_loss", spy)
    request = request_of(batch=20, micro_batch=4, epochs=1, heldout_fraction=0.0, system="Bref.")
    record = request.run()
    assert record["before"] is None
    assert record["after"] is None
    tokenizer = load_tokenizer(request.model)
    expected = [expected_tokens(tokenizer, messages, "Bref.") for messages in talks()]
    labels = [[(i, i if counts else -100) for i, counts in one] for one in expected]
    assert sorted(seen) == sorted(labels)
    assert record["data"]["answer_tokens"] == sum(counts for one in expected for _, counts in one)

    model, total, count = load_model(request.model), 0.0, 0
    for one in labels:
        logits = model(torch.tensor([[i for i, _ in one]])).logits[0, :-1]
        targets = torch.tensor([label for _, label in one][1:])
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != -100).sum())
    assert record["curve"]["loss"] == [pytest.approx(total / count, rel=1e-5)]


def llama_style_tokenizer():
    """Sentencepiece's way: a space is a character, no cuts between words, bytes at last."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(set("▁abcdefghijklmnopqrstuvwxyzWISO?.,[|]UA"))
    merges = [("▁", "i"), ("▁i", "s"), ("]", "▁"), ("i", "s")]
    pieces += ["".join(pair) for pair in merges]
    words = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(words, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_a_tokenizer_that_joins_a_role_and_the_answer_is_told():
    tokenizer = llama_style_tokenizer()
    with pytest.raises(UserError, match="prompt is not how a conversation begins"):
        set_template(tokenizer, "minichat")


def test_the_mask_holds_for_a_llama_style_tokenizer():
    tokenizer = llama_style_tokenizer()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["model"]["merges"].remove(["]", "▁"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    set_template(tokenizer, "minichat")
    example = encode(tokenizer, talks()[0])
    spoken = [i for i, counts in zip(example.ids, example.counted, strict=True) if counts]
    assert tokenizer.decode(spoken) == "It is one.</s> Oui, one 好.</s>"
    asked = tokenizer.decode(prompt_ids(tokenizer, talks()[0][:1]))
    assert asked == "<s> [|User|] What is zero plus one?</s> [|Assistant|]"


def test_a_long_conversation_is_cut_behind_an_answer(request_of, base):
    tokenizer = load_tokenizer(base)
    set_template(tokenizer, "minichat")
    whole, first = (encode(tokenizer, talks()[0][:end]) for end in (4, 2))
    for window in (len(first.ids), len(whole.ids) - 1):
        assert fitted(whole, window) == first
    assert fitted(whole, len(first.ids) - 1) is None
    assert fitted(whole, len(whole.ids)) == whole

    lines = [{"messages": one} for one in talks()]
    long = [said("user", "plus " * 40), said("assistant", "no")]
    request = request_of(epochs=1, window=len(whole.ids) - 1)
    write_lines(request.data, [*lines, {"messages": long}])
    told = []
    problems = request.run(say=told.append)["data"]["problems"]
    assert problems["cut"]["first_lines"][0] == 1
    assert problems["left_out"] == {"count": 1, "first_lines": [21]}
    assert any("cut to the leading turns" in line for line in told)


def test_what_is_written_loads_in_plain_transformers(request_of):
    request = request_of()
    record = request.run()
    assert record["after"]["loss"] < record["before"]["loss"] - 1
    assert_told(record, keys("chat.md", "`instruct.json`"))
    lines = [json.loads(line) for line in (request.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == record["curve"]["loss"]
    assert {name for line in lines for name in line} == set(keys("chat.md", "`metrics.jsonl`"))
    assert sorted(path.name for path in request.out.iterdir()) == [
        ".lock",
        "instruct.json",
        "metrics.jsonl",
        "model",
    ]
    tokenizer = AutoTokenizer.from_pretrained(request.out / "model")
    model = AutoModelForCausalLM.from_pretrained(request.out / "model")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = tokenizer.apply_chat_template(talks()[0], tokenize=False)
    assert text.endswith("[|Assistant|] Oui, one 好.<|endoftext|>")
    # finished: nothing is computed again
    assert request.run() == record
    with pytest.raises(UserError, match=r"holds another run \(learning_rate"):
        request.but(learning_rate=1e-3).run()


@pytest.mark.parametrize(
    "changes", [{}, {"lora": True, "neftune": 5.0}], ids=["full", "lora and neftune"]
)
def test_an_interrupted_run_equals_an_uninterrupted_one(request_of, changes):
    whole, parts = request_of("whole", **changes), request_of("parts", **changes)
    expected = whole.run()
    for _ in range(2):
        calls = iter(range(100))
        with pytest.raises(Interrupted):
            parts.run(should_stop=lambda calls=calls: next(calls) == 3)
    # a checkpoint that a kill left half written is passed over
    (parts.out / "checkpoints/checkpoint-11").mkdir()
    record = parts.run()
    for key in ("curve", "before", "after", "steps", "tokens_trained"):
        assert record[key] == expected[key]
    first, second = weights(whole), weights(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = [
        json.loads(line)["step"] for line in (parts.out / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(record["steps"]))


def test_a_checkpoint_holds_no_code(request_of):
    request = request_of()
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        request.run(should_stop=lambda: next(calls) == 1)
    (checkpoint,) = (request.out / "checkpoints").glob("checkpoint-*")
    assert not list(checkpoint.glob("*.bin"))
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        with safe_globals():
            torch.load(path, weights_only=True)


def test_a_batch_may_be_split_in_any_way(request_of):
    """Sums over the tokens of the whole batch, whatever the lengths in its parts."""
    runs = [request_of(f"by-{size}", micro_batch=size, epochs=2) for size in (1, 4)]
    for request in runs:
        request.run()
    first, second = map(weights, runs)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_lora_trains_the_named_layers_and_is_merged(request_of):
    request = request_of(lora=True, lora_rank=4, lora_modules=("q_proj", "down_proj"))
    request.run()
    before, after = load_model(request.model).state_dict(), weights(request)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    ends = ("self_attn.q_proj.weight", "mlp.down_proj.weight")
    assert changed == {f"model.layers.{layer}.{end}" for layer in (0, 1) for end in ends}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name]) <= 4


def test_nothing_is_sent_and_nothing_is_printed(typed, request_of, monkeypatch):
    def send(*args, **kwargs):
        raise AssertionError("telemetry")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", send)
    request = request_of()
    options = ("--batch", 4, "--epochs", 1, "--device", "cpu", "--quiet")
    done = typed("instruct", request.model, "--data", request.data, "--out", request.out, *options)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("\n") == 3
    assert "next: capgap chat" in done.out
    assert "held-out loss of the answers" in done.out


def test_a_signal_saves_and_tells_in_one_line(typed, request_of, monkeypatch):
    original = training._Steps.on_log
    sent = []

    def killed(self, args, state, *rest, **kwargs):
        if state.global_step == 2 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return original(self, args, state, *rest, **kwargs)

    monkeypatch.setattr(training._Steps, "on_log", killed)
    request = request_of()
    asked = ("instruct", request.model, "--data", request.data, "--out", request.out)
    asked = (*asked, "--batch", 4, "--epochs", 1, "--device", "cpu", "--quiet")
    stopped = typed(*asked)
    assert stopped.code == 143
    assert stopped.err.count("\n") == 1
    assert "the same command continues" in stopped.err
    assert typed(*asked).code == 0


def test_a_loss_that_is_not_finite_ends_the_run(request_of):
    with pytest.raises(UserError, match="the loss is not finite at step"):
        request_of(learning_rate=1e30).run()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--lora", "--lora-modules", "query"), "it has down_proj, gate_proj, k_proj"),
        (("--lora-modules", "q_proj"), "goes with lora"),
        (("--batch", 6, "--micro-batch", 4), "is not a multiple"),
        (("--window", 4000), "take a --window of 64 or less"),
        (("--template", "chatml"), "take one of minichat, own"),
        (("--template", "own"), "has no chat template"),
        (("--system", "a<|endoftext|>"), "a special token of this model: leave it out of the sys"),
        (("--neftune", 0), "--neftune '0': Input should be greater than 0"),
        (("--epochs", 0), "'0' is no count"),
        (("--heldout-fraction", 1), "less than 1"),
        (("--data", "none.jsonl"), "is no file"),
        (("--out", "."), "holds something else"),
    ],
)
def test_mistakes_are_told_in_one_line(typed, request_of, tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    request = request_of()
    found = typed(
        *("instruct", request.model, "--data", request.data, "--out", request.out),
        *("--batch", 4, "--device", "cpu", "--quiet", *options),
    )
    assert found.code == 2
    assert told in found.err
    assert found.err.count("\n") == 1


def test_a_template_that_the_tokenizer_cannot_express(base):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="does not mark the assistant's part"):
        set_template(tokenizer, "own")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="does not end with"):
        set_template(tokenizer, "own")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "takes more than 2 s",
        ),
        ("{{ 'a' * 10**11 }}", "takes more than 1073 MB of memory"),
        ("{{ 'a' * 10**7 }}", "of 4 characters it makes 10000000"),
        ("{{ messages[0].nothing.more }}", "has no attribute"),
        ("{% for %}", "cannot be used: Expected an expression"),
        ("{{ raise_exception('never') }}", "cannot be used: never"),
    ],
)
def test_a_template_of_a_stranger_has_limits(base, monkeypatch, template, told):
    from capgap.tune import template as module

    monkeypatch.setattr(module, "SECONDS", 2.0)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = template
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=told) as found:
        module.prompt_ids(tokenizer, [{"role": "user", "content": "ab c"}])
    assert "\n" not in str(found.value)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_missing_library_is_told_with_its_extra(request_of, monkeypatch):
    monkeypatch.setattr("capgap.stages.tuning.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(install_command("chat"))):
        request_of().run()
