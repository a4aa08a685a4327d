"""Conversations as people have them: forms, files, names on the Hub, and keys of a message."""

import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capgap.corpus.tokenizer import load_tokenizer
from capgap.errors import Interrupted, UserError
from capgap.stages.instruct import Instruct, Prefer
from capgap.tune.conversations import read_conversations, read_pairs
from capgap.tune.template import encode, set_template, writes
from talks import said, save_base, talks, write_lines

BASIC = [said("user", "hi"), said("assistant", "ho")]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
# Writes whatever a message may have besides
OWN = """{%- for m in messages -%}
{{- m.role + (' ' + m.name if m.name is defined else '') + ': ' -}}
{%- if m.role == 'assistant' -%}
{%- generation -%}
{{- m.reasoning_content | default('') + m.content -}}
{%- if m.tool_calls -%}{{- m.tool_calls | tojson -}}{%- endif -%}{{- eos_token -}}
{%- endgeneration -%}
{%- else -%}{{- m.content + eos_token -}}{%- endif -%}
{%- endfor -%}
{{- 'assistant: ' if add_generation_prompt else '' -}}"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("conversations") / "base", positions=256)


def only(path):
    (found,) = read_conversations(path).usable
    return found


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        ({"instruction": "hi", "output": "ho"}, BASIC),
        ({"instruction": "hi", "input": "", "output": "ho", "text": "hi ho"}, BASIC),
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief."},
            [said("system", "Be brief."), said("user", "Add.\n1 and 2"), said("assistant", "3")],
        ),
        ({"prompt": "hi", "completion": "ho"}, BASIC),
        ({"prompt": BASIC[:1], "completion": BASIC[1:]}, BASIC),
        ({"prompt": "hi", "completion": "ho", "label": True}, BASIC),
        # the completion alone is learnt
        (
            {"prompt": [*BASIC, said("user", "and?")], "completion": "no"},
            [
                BASIC[0],
                BASIC[1] | {"weight": 0},
                said("user", "and?"),
                said("assistant", "no"),
            ],
        ),
        # a row of a table has all columns, and a message all keys
        (
            {
                "messages": [one | {"name": None, "tool_calls": None} for one in BASIC],
                "tools": None,
            },
            BASIC,
        ),
        ({"messages": [one | {"id": "x7", "lang": "en"} for one in BASIC]}, BASIC),
        ({"messages": [BASIC[0], BASIC[1] | {"weight": 1}]}, BASIC),
        (
            {"messages": [BASIC[0] | {"name": "Ann"}, BASIC[1]]},
            [BASIC[0] | {"name": "Ann"}, BASIC[1]],
        ),
    ],
)
def test_forms(tmp_path, line, messages):
    assert only(write_lines(tmp_path / "a.jsonl", [line])).messages == messages


def test_tools_stand_behind_their_calls(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": CALL}
    messages = [said("user", "1 and 1?"), call, said("tool", "2"), said("assistant", "2.")]
    found = only(write_lines(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert found.messages == [messages[0], call | {"content": ""}, *messages[2:]]
    # what a tool said last is not answered
    reading = read_conversations(write_lines(tmp_path / "b.jsonl", [{"messages": messages[:3]}]))
    assert reading.usable[0].messages == found.messages[:2]
    assert reading.problems()["unanswered"]["count"] == 1
    reading = read_conversations(
        write_lines(tmp_path / "c.jsonl", [{"messages": [messages[0], messages[2], messages[3]]}])
    )
    assert reading.problems()["roles"]["count"] == 1


ROWS = [{"messages": one} for one in talks(6)]
PAIRS = [{"prompt": one[0]["content"], "chosen": one[1:2], "rejected": "No."} for one in talks(6)]


@pytest.mark.parametrize("form", ["jsonl", "lines.json", "list.json", "pretty.json", "parquet"])
def test_files(tmp_path, form):
    path, expected = tmp_path / f"a.{form}", [row["messages"] for row in ROWS]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif form.endswith("list.json"):
        path.write_text(json.dumps(ROWS))
    elif form.endswith("pretty.json"):
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        write_lines(path, ROWS)
    reading = read_conversations(path)
    assert [one.messages for one in reading.usable] == expected
    assert [one.line for one in reading.usable] == [1, 2, 3, 4, 5, 6]
    assert reading.num_lines == 6


def test_pairs_in_other_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(PAIRS, indent=2))
    texts = [row | {"chosen": row["chosen"][0]["content"]} for row in PAIRS]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "b.parquet")
    expected = read_pairs(write_lines(tmp_path / "c.jsonl", PAIRS)).usable
    assert len(expected) == 6
    for name in ("a.json", "b.parquet"):
        assert read_pairs(tmp_path / name).usable == expected


def test_one_conversation_is_no_list_of_them(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["hi", "ho"]))
    assert only(tmp_path / "a.json").messages == BASIC


@pytest.mark.parametrize("kind", [Instruct, Prefer])
def test_a_data_set_on_the_hub(tmp_path, monkeypatch, base, kind):
    asked, commits = [], ["abc"]

    def load(name, config, *, split, streaming, revision):
        asked.append((name, config, split, streaming, revision))
        rows = ROWS if kind is Instruct else PAIRS
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr("capgap.corpus.sources.hub_revision", lambda name, kind: commits[-1])
    monkeypatch.setattr(datasets, "load_dataset", load)
    stage = kind(
        model=str(base),
        data="owner/talks:en:train_sft",
        out=tmp_path / "out",
        batch=2,
        micro_batch=2,
        epochs=1,
        heldout_fraction=0.0,
        template="minichat",
        device="cpu",
    )
    record = stage.run()
    assert asked == [("owner/talks", "en", "train_sft", True, "abc")]
    assert record["data"]["training"] == 6
    assert record["data"]["revision"] == "abc"
    stopped = stage.but(out=tmp_path / "stopped")
    with pytest.raises(Interrupted):
        stopped.run(should_stop=lambda: True)
    commits.append("def")
    with pytest.raises(UserError, match="is another on the Hub than when this run began"):
        stopped.run()
    # finished: told again without the Hub
    count = len(asked)
    assert stage.run() == record
    assert len(asked) == count


def test_broken_json_is_told_with_its_line(tmp_path, typed, base):
    path = write_lines(tmp_path / "a.jsonl", [["hi", "ho"]] * 3)
    path.write_text(path.read_text() + '\n["hi", ho"]\n{"messages": [\n')
    problems = read_conversations(path).problems()
    assert problems["broken"] == {"count": 2, "first_lines": [5, 6]}
    assert problems["unreadable"]["count"] == 0
    found = typed("instruct", base, "--data", path, "--out", tmp_path / "out", "--device", "cpu")
    assert found.code == 2
    assert "line 5 is no JSON (Expecting value) (and 1 more)" in found.err
    text = json.dumps(ROWS, indent=1).replace('"content": "It is four.",', '"content": "It is')
    (tmp_path / "a.json").write_text(text.replace('"content": "It is one."', '"content": It is'))
    reading = read_conversations(tmp_path / "a.json")
    line = 1 + text.split('"It is one."')[0].count("\n")
    assert reading.problems()["broken"] == {"count": 1, "first_lines": [line]}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ({"messages": [BASIC[0], BASIC[1] | {"weight": 0.5}]}, "weight"),
        ({"messages": [BASIC[0] | {"weight": 1}, BASIC[1]]}, "weight"),
        ({"messages": [BASIC[0], BASIC[1] | {"weight": 0}]}, "no_assistant"),
        ({"messages": BASIC, "tools": CALL}, "not_read"),
        ({"instruction": "a", "output": "b", "history": [["hi", "ho"]]}, "not_read"),
        ({"prompt": "hi", "completion": "ho", "label": False}, "not_read"),
        ({"prompt": "hi"}, "unreadable"),
        ({"instruction": "hi"}, "unreadable"),
    ],
)
def test_what_cannot_be_followed_is_counted(tmp_path, line, kind):
    reading = read_conversations(write_lines(tmp_path / "a.jsonl", [line]))
    assert reading.usable == []
    assert reading.problems()[kind] == {"count": 1, "first_lines": [1]}


HUMAN = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: and?\n\nAssistant:"


def test_a_prompt_that_is_implied(tmp_path):
    (found,) = read_pairs(
        write_lines(tmp_path / "a.jsonl", [{"chosen": f"{HUMAN} yes", "rejected": f"{HUMAN} no"}])
    ).usable
    assert found.messages == [*BASIC, said("user", "and?")]
    assert (found.chosen, found.rejected) == ("yes", "no")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ({"chosen": BASIC, "rejected": [said("user", "hey"), BASIC[1]]}, "two_prompts"),
        (
            {"prompt": "hey", "chosen": BASIC, "rejected": [BASIC[0], said("assistant", "no")]},
            "two_prompts",
        ),
        (
            {"prompt": "hi", "chosen": [BASIC[1] | {"tool_calls": CALL}], "rejected": "no"},
            "not_read",
        ),
        ({"prompt": "hi", "chosen": "ho", "rejected": "no", "tools": CALL}, "not_read"),
    ],
)
def test_pairs_that_cannot_be_followed_are_counted(tmp_path, line, kind):
    reading = read_pairs(write_lines(tmp_path / "a.jsonl", [line]))
    assert reading.usable == []
    assert reading.problems()[kind]["count"] == 1


def test_an_answer_of_weight_0_is_not_learnt(base):
    tokenizer = load_tokenizer(base)
    set_template(tokenizer, "minichat")
    messages = [*talks()[0], said("user", "So?"), said("assistant", "So it is.")]
    every = encode(tokenizer, messages)
    marked = [dict(one) for one in messages]
    marked[1]["weight"] = 0
    some = encode(tokenizer, marked)
    assert some.ids == every.ids
    assert tokenizer.decode(every.spoken) == (
        " It is one.<|endoftext|> Oui, one 好.<|endoftext|> So it is.<|endoftext|>"
    )
    assert tokenizer.decode(some.spoken) == " Oui, one 好.<|endoftext|> So it is.<|endoftext|>"
    # the positions are those of these turns, not only their text
    first = every.counted.index(True) + len(tokenizer.encode(" It is one.<|endoftext|>"))
    assert some.counted == [counts and i >= first for i, counts in enumerate(every.counted)]


KEYS = [
    ({"name": "Ann"}, {}),
    ({}, {"reasoning_content": "hm "}),
    ({}, {"tool_calls": CALL}),
]


@pytest.mark.parametrize(("of_user", "of_assistant"), KEYS)
def test_keys_go_to_the_template_as_they_are(tmp_path, base, of_user, of_assistant):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = OWN
    set_template(tokenizer, "own")
    messages = [BASIC[0] | of_user, BASIC[1] | of_assistant]
    reading = read_conversations(write_lines(tmp_path / "a.jsonl", [{"messages": messages}]))
    (found,) = reading.usable
    assert writes(tokenizer, found, reading)
    text = tokenizer.decode(encode(tokenizer, found.messages).ids)
    name = f" {of_user['name']}" if of_user else ""
    thought = of_assistant.get("reasoning_content", "")
    calls = json.dumps(CALL) if "tool_calls" in of_assistant else ""
    end = tokenizer.eos_token
    assert text == f"user{name}: hi{end}assistant: {thought}ho{calls}{end}"
    set_template(tokenizer, "minichat")
    assert not writes(tokenizer, found, reading)
    (key,) = {**of_user, **of_assistant}
    assert reading.problems()["not_taken"] == {"count": 1, "first_lines": [1]}
    assert reading.details["not_taken"] == f" ({key})"


def test_a_special_token_in_a_key_is_one_in_the_text(tmp_path, base):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = OWN
    set_template(tokenizer, "own")
    thought = BASIC[1] | {"reasoning_content": "so <|endoftext|>"}
    reading = read_conversations(
        write_lines(tmp_path / "a.jsonl", [{"messages": [BASIC[0], thought]}])
    )
    assert not writes(tokenizer, reading.usable[0], reading)
    assert reading.problems()["special_token"] == {"count": 1, "first_lines": [1]}


def test_a_conversation_that_the_template_cannot_write_is_counted(tmp_path, base):
    call = {"role": "assistant", "content": "", "tool_calls": CALL}
    tool = [said("user", "1 and 1?"), call, said("tool", "2"), said("assistant", "2.")]
    stage = Instruct(
        model=str(base),
        data=write_lines(tmp_path / "a.jsonl", [*ROWS, {"messages": tool}]),
        out=tmp_path / "out",
        batch=2,
        micro_batch=2,
        epochs=1,
        skip_bad=True,
        device="cpu",
    )
    said_lines = []
    record = stage.run(say=said_lines.append)
    assert record["data"]["problems"]["not_taken"] == {"count": 1, "first_lines": [7]}
    assert any("does not write (tool_calls)" in line for line in said_lines)


@pytest.mark.parametrize("kind", [Instruct, Prefer])
def test_what_was_forgotten_is_told(tmp_path, base, kind):
    import torch

    from capgap.artifact import write_json
    from capgap.corpus.tokens import load_corpus
    from capgap.models.build import load_model
    from capgap.stages.corpus import Prepare

    chooser = random.Random(0)
    words = [" ".join(chooser.choices(("plus", "is", "one", "two"), k=60)) for _ in range(40)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(words))
    corpus = tmp_path / "corpus"
    Prepare(source=str(tmp_path / "text.txt"), tokenizer=str(base), out=corpus).run()
    stage = kind(
        model=str(base),
        data=write_lines(tmp_path / "a.jsonl", ROWS if kind is Instruct else PAIRS),
        out=tmp_path / "out",
        corpus=(corpus,),
        batch=2,
        micro_batch=2,
        epochs=3,
        learning_rate=1e-2,
        template="minichat",
        device="cpu",
    )
    record = stage.run()

    def loss_of(model):
        total, count = 0.0, 0
        for document in load_corpus(corpus, window=1).heldout_documents():
            for start in range(0, len(document.tokens) - 1, 256):
                ids = torch.tensor(document.tokens[start : start + 257])
                logits = load_model(str(model))(ids[None, :-1]).logits[0]
                total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
                count += len(ids) - 1
        return total / count

    was, now = (record[when][str(corpus)]["loss"] for when in ("text_before", "text_after"))
    assert was == pytest.approx(loss_of(base), abs=1e-4)
    assert now == pytest.approx(loss_of(tmp_path / "out/model"), abs=1e-4)
    line = f"held-out loss of the text in {corpus} {was:.4f} -> {now:.4f} nats a token"
    assert line in stage.told(record).splitlines()
    for change, warns in ((0.04, False), (0.06, True)):
        later = {str(corpus): record["text_before"][str(corpus)] | {"loss": was + change}}
        told = stage.told(record | {"text_after": later})
        assert (f"warning: it forgot {change:.2f} nats a token" in told) is warns
    if kind is Instruct:
        # nine tokens of text for one of an answer
        mixed = stage.but(text_share=0.9, window=64, out=tmp_path / "mixed").run()
        data = mixed["data"]
        assert data["text_tokens"] == pytest.approx(3 * 9 * data["answer_tokens"], abs=32)
        assert mixed["tokens_trained"] == data["text_tokens"] + 3 * data["answer_tokens"]
        assert mixed["text_after"][str(corpus)]["loss"] < now - 0.05
        with pytest.raises(UserError, match="give a `corpus`"):
            stage.but(text_share=0.5, corpus=(), out=tmp_path / "none").run()
    # without --corpus: what the record in the model's folder says that it was distilled on
    own = load_corpus(corpus, window=1)
    lineage = {"sources": [{"folder": str(corpus), "corpus_hash": own.corpus_hash}]}
    distilled = tmp_path / "distilled"
    distilled.mkdir()
    for path in base.iterdir():
        (distilled / path.name).write_bytes(path.read_bytes())
    write_json(distilled / "distill.json", lineage)
    again = stage.but(model=str(distilled), corpus=(), out=tmp_path / "again", epochs=1)
    assert again.run()["text_before"][str(corpus)]["loss"] == pytest.approx(was, abs=1e-6)
    lineage["sources"][0]["corpus_hash"] = "of another text"
    write_json(distilled / "distill.json", lineage)
    assert again.but(out=tmp_path / "other").run()["text_before"] is None
