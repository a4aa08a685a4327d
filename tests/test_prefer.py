"""Preference tuning: pairs that are read, the loss of DPO, adapters and full weights."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from capgap.corpus.tokenizer import load_tokenizer
from capgap.errors import Interrupted
from capgap.evaluate.measured import HeldoutLoss
from capgap.models.build import load_model
from capgap.stages.instruct import Prefer
from capgap.tune import training
from capgap.tune.conversations import read_pairs
from capgap.tune.template import encode, set_template
from talks import said, save_base, talks, write_lines
from test_docs import assert_told, keys


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("prefer") / "base")


@pytest.fixture
def request_of(base, tmp_path):
    lines = [
        {"prompt": one[0]["content"], "chosen": one[1]["content"], "rejected": "No."}
        for one in talks()
    ]
    data = write_lines(tmp_path / "pairs.jsonl", lines)

    def make(out="tuned", **changes):
        made = Prefer(
            model=str(base),
            data=data,
            out=tmp_path / out,
            batch=4,
            micro_batch=2,
            learning_rate=1e-3,
            heldout_fraction=0.1,
            template="minichat",
            device="cpu",
        )
        return made.but(**changes)

    return make


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "hi", "chosen": "ho", "rejected": "no"},
        {"prompt": [said("user", "hi")], "chosen": "ho", "rejected": "no"},
        {
            "prompt": [said("user", "hi")],
            "chosen": [said("assistant", "ho")],
            "rejected": [said("assistant", "no")],
        },
        {
            "chosen": [said("user", "hi"), said("assistant", "ho")],
            "rejected": [said("user", "hi"), said("assistant", "no")],
        },
        {
            "prompt": "hi",
            "chosen": [said("user", "hi"), said("assistant", "ho")],
            "rejected": [said("user", "hi"), said("assistant", "no")],
        },
    ],
)
def test_forms_of_a_pair(tmp_path, line):
    (found,) = read_pairs(write_lines(tmp_path / "a.jsonl", [line])).usable
    assert (found.messages, found.chosen, found.rejected) == ([said("user", "hi")], "ho", "no")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ({"prompt": "hi", "chosen": "ho"}, "unreadable"),
        ({"chosen": "ho", "rejected": "no"}, "unreadable"),
        ({"prompt": "hi", "chosen": "ho", "rejected": " ho"}, "same_answers"),
        ({"prompt": "hi", "chosen": "ho", "rejected": ""}, "empty_turn"),
        ({"prompt": ["hi", "ho"], "chosen": "a", "rejected": "b"}, "roles"),
        ({"prompt": "hi", "chosen": [said("user", "a")], "rejected": "b"}, "no_assistant"),
    ],
)
def test_a_bad_pair_is_counted(tmp_path, line, kind):
    reading = read_pairs(write_lines(tmp_path / "a.jsonl", [line]))
    assert reading.usable == []
    assert reading.problems()[kind]["count"] == 1


def test_the_numbers_of_pairs_are_those_of_the_formula():
    sides = [HeldoutLoss(nats, [1, 1], [1, 1]) for nats in ([1.0, 4.0], [3.0, 5.0])]
    before = {"chosen_nats": [2.0, 3.0], "rejected_nats": [2.5, 6.0]}
    stage = Prefer(model="m", data="d", out="o", beta=0.5)
    found = stage.scores(sides, before)
    margins = [(2 - 1) - (2.5 - 3), (3 - 4) - (6 - 5)]
    losses = [-math.log(1 / (1 + math.exp(-0.5 * margin))) for margin in margins]
    assert found["loss"] == pytest.approx(sum(losses) / 2)
    assert found["margin"] == pytest.approx(sum(margins) / 2)
    assert (found["accuracy"], found["chosen_likelier"]) == (0.5, 1.0)
    assert (found["chosen_nats"], found["rejected_nats"]) == ([1.0, 4.0], [3.0, 5.0])
    same = stage.scores(sides, None)
    assert same["loss"] == pytest.approx(math.log(2))
    assert same["accuracy"] is None


@pytest.mark.parametrize("lora", [{}, {"lora": True, "lora_rank": 4}], ids=["full", "lora"])
def test_the_chosen_answer_becomes_likelier(request_of, lora):
    request = request_of(**lora)
    record = request.run()
    # the first step is taken from the reference itself
    assert record["curve"]["loss"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert record["after"]["loss"] < record["before"]["loss"]
    assert record["after"]["margin"] > 0
    assert_told(record, keys("chat.md", "`prefer.json`"))
    lines = [json.loads(line) for line in (request.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == record["curve"]["loss"]
    assert request.run() == record
    # the record's score of the answers is that of the folder that was written
    model, tokenizer = load_model(request.out / "model"), load_tokenizer(request.out / "model")
    nats = []
    for one in talks():
        example = encode(tokenizer, one[:2])
        logits = model(torch.tensor([example.ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        nats.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item())
    for value in record["after"]["chosen_nats"]:
        assert min(abs(value - one) for one in nats) < 1e-3


def test_trl_reads_the_tokens_that_are_scored(request_of, monkeypatch):
    seen = []
    original = training._DPO._compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        for ids, mask, real in zip(
            *(inputs[name] for name in ("input_ids", "completion_mask", "attention_mask")),
            strict=True,
        ):
            length = int(real.sum())
            seen.append((ids[:length].tolist(), mask[:length].bool().tolist()))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(training._DPO, "_compute_loss", spy)
    request_of(heldout_fraction=0.0).run()
    tokenizer = load_tokenizer(request_of().model)
    set_template(tokenizer, "minichat")
    expected = []
    for one in talks():
        for answer in (one[1], said("assistant", "No.")):
            example = encode(tokenizer, [one[0], answer])
            expected.append((example.ids, example.counted))
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("lora", [{}, {"lora": True, "lora_rank": 4}], ids=["full", "lora"])
def test_an_interrupted_run_equals_an_uninterrupted_one(request_of, lora):
    whole, parts = request_of("whole", **lora), request_of("parts", **lora)
    expected = whole.run()
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        parts.run(should_stop=lambda: next(calls) == 2)
    record = parts.run()
    assert (record["curve"], record["after"]) == (expected["curve"], expected["after"])
    first, second = (load_file(one.out / "model/model.safetensors") for one in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--beta", 0), "--beta '0': Input should be greater than 0"),
        (("--template", "own"), "has no chat template"),
        (("--lora", "--lora-modules", "lm_head"), "no such linear layer below its head"),
    ],
)
def test_mistakes_are_told_in_one_line(typed, request_of, options, told):
    request = request_of()
    found = typed(
        *("prefer", request.model, "--data", request.data, "--out", request.out),
        *("--template", "minichat", "--batch", 4, "--device", "cpu", "--quiet", *options),
    )
    assert found.code == 2
    assert told in found.err
    assert found.err.count("\n") == 1
