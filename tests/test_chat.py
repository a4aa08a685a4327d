"""A conversation with a model: drawing, streaming, history, and the commands of docs/chat.md."""

import io
import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch

from capgap.corpus.tokenizer import load_tokenizer
from capgap.errors import UserError
from capgap.evaluate.sample import Sampling
from capgap.models.build import load_model
from capgap.tune.chat import Chat, pieces_of
from capgap.tune.template import prompt_ids, set_template
from talks import said, save_base
from test_docs import DOCS, code_blocks, sections


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("chat") / "base", positions=128)


@pytest.fixture(scope="module")
def talker(base, tmp_path_factory):
    """The same model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "talker"
    tokenizer = load_tokenizer(base)
    set_template(tokenizer, "minichat")
    load_model(base).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_of(folder, system=None, **sampling):
    given = Sampling(**{"temperature": 0.0, "tokens": 12, **sampling})
    return Chat(load_model(folder), load_tokenizer(folder), system=system, sampling=given)


def scripted(chat, texts):
    """A model that says these texts, token by token, whatever it is asked."""
    end = chat.tokenizer.eos_token_id
    queue = [
        token
        for text in texts
        for token in (*chat.tokenizer.encode(text, add_special_tokens=False), end)
    ]

    def model(input_ids, past_key_values, use_cache):
        logits = torch.full((1, 1, chat.model.config.vocab_size), -1e9)
        logits[0, 0, queue.pop(0)] = 0
        return SimpleNamespace(logits=logits, past_key_values=None)

    model.config, model.device = chat.model.config, torch.device("cpu")
    model.generation_config = chat.model.generation_config
    chat.model = model
    return chat


def test_the_likeliest_words_are_those_of_generate(talker):
    chat = chat_of(talker, system="Be brief.")
    answer = "".join(chat.answer("What is one plus one?"))
    messages = [said("system", "Be brief."), said("user", "What is one plus one?")]
    inputs = torch.tensor([prompt_ids(chat.tokenizer, messages)])
    written = chat.model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, do_sample=False
    )[0, inputs.shape[1] :]
    assert answer == chat.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert chat.messages == [messages[1], said("assistant", answer)]


def test_the_same_seed_gives_the_same_answers(talker):
    def answers(seed):
        chat = chat_of(talker, temperature=1.5, seed=seed)
        return ["".join(chat.answer("hi")) for _ in range(2)]

    before = torch.random.get_rng_state()
    first = answers(1)
    assert first == answers(1)
    assert first != answers(2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_words_are_counted_once_and_not_for_every_token(talker, monkeypatch):
    chat = chat_of(talker)
    calls = []
    real = chat.tokenizer.get_vocab
    monkeypatch.setattr(chat.tokenizer, "get_vocab", lambda: calls.append(1) or real())
    list(chat.answer("hi"))
    assert chat.num_tokens > 1
    assert calls == []


def test_pieces_are_whole_characters_without_outer_white_space(talker):
    text = " Oui,  水 \U0001f600 é.\n\n"
    chat = scripted(chat_of(talker, tokens=100), [text])
    assert len(chat.tokenizer.encode("水", add_special_tokens=False)) > 1
    pieces = list(chat.answer("hi"))
    assert "".join(pieces) == text.strip()
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)
    assert chat.ended == "stop"
    assert chat.messages[-1]["content"] == text.strip()


def test_bytes_that_never_make_a_character_show_at_the_end(talker):
    tokenizer = load_tokenizer(talker)
    first_byte = tokenizer.encode("水", add_special_tokens=False)[0]
    letter = tokenizer.encode("a", add_special_tokens=False)
    assert list(pieces_of(tokenizer, [*letter, first_byte])) == ["a", "\ufffd"]


def test_special_tokens_are_neither_shown_nor_taken(talker):
    chat = chat_of(talker)
    assert list(pieces_of(chat.tokenizer, [chat.tokenizer.eos_token_id])) == []
    with pytest.raises(UserError, match="is a special token"):
        list(chat.answer("what is <|endoftext|>?"))
    assert chat.messages == []


def test_the_oldest_turns_go_when_the_context_is_full(talker):
    chat = scripted(chat_of(talker, system="Be brief.", tokens=20), ["It is one."] * 9)
    question = "What is one plus one? " * 2
    for number in range(9):
        list(chat.answer(question + str(number)))
        used = prompt_ids(chat.tokenizer, [*chat.system, *chat.messages[:-1]])
        assert len(used) <= chat.positions - 20
    assert chat.num_dropped > 0
    assert chat.num_dropped % 2 == 0
    assert len(chat.messages) == 18 - chat.num_dropped
    assert chat.messages[-2]["content"].endswith("8")
    before = list(chat.messages), chat.num_dropped
    with pytest.raises(UserError, match="ask in fewer words"):
        list(chat.answer("plus " * 200))
    assert (chat.messages, chat.num_dropped) == before
    chat.reset()
    assert chat.messages == []


@pytest.mark.parametrize(("tokens", "ended"), [(3, "tokens"), (500, "context")])
def test_an_answer_ends_at_a_limit(talker, tokens, ended):
    chat = scripted(chat_of(talker, tokens=tokens), ["one " * 400])
    list(chat.answer("hi"))
    assert chat.ended == ended
    prompt = prompt_ids(chat.tokenizer, [said("user", "hi")])
    assert chat.num_tokens == min(tokens, chat.positions - len(prompt))


def test_an_answer_that_is_broken_off_stays_in_the_history(talker):
    chat = scripted(chat_of(talker, tokens=50), ["It is one, two, three."])
    pieces = chat.answer("hi")
    said_so_far = next(pieces) + next(pieces)
    pieces.close()
    assert chat.messages[-1] == said("assistant", said_so_far)


def test_once(typed, talker, base):
    asked = ("--once", "What is one plus one?", "--temperature", 0, "--tokens", 5)
    plain = typed("chat", talker, *asked)
    assert plain.code == 0, plain.err
    assert plain.err == "(cut after 5 tokens: as --tokens says)\n"
    found = json.loads(typed("chat", talker, *asked, "--json").out)
    assert found["answer"] == plain.out.strip()
    assert (found["tokens"], found["ended"]) == (5, "tokens")
    assert typed("chat", base, *asked, "--template", "minichat").out == plain.out


def test_a_conversation_from_standard_input(typed, talker, monkeypatch):
    lines = ["hi", "", "/again", "/reset", "<|endoftext|>", "hi", "/quit", "not read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    found = typed("chat", talker, "--temperature", 0, "--tokens", 4)
    assert found.code == 0, found.err
    first, second = found.out.splitlines()
    assert first == second
    assert "/again is no command: /reset or /quit" in found.err
    assert "is a special token of this model" in found.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--template", "own"), "has no chat template: tune it with `capgap instruct`"),
        (("--template", "chatml"), "take one of minichat, own"),
        (("--json",), "--json goes with --once"),
        (("--once", "hi", "--temperature", -1), "temperature -1.0 must be 0 or more"),
        (("--once", "hi", "--tokens", 0), "--tokens 0 must be above 0"),
        (("--once", " ", "--template", "minichat"), "the question is empty"),
    ],
)
def test_mistakes_are_told_in_one_line(typed, base, options, told):
    found = typed("chat", base, *options)
    assert found.code == 2
    assert told in found.err
    assert found.err.count("\n") == 1


def test_the_commands_of_the_page_work(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    text = sections((DOCS / "chat.md").read_text())["A run on small data"]
    (data,) = code_blocks(text, "python")
    exec(compile(data, "docs/chat.md", "exec"), {})
    commands = [line for block in code_blocks(text, "console") for line in block.splitlines()]
    commands = [line.removeprefix("$ ") for line in commands if line.startswith("$ ")]
    assert [re.split(" ", line)[1] for line in commands] == ["instruct", "chat", "prefer", "chat"]
    for line in commands:
        words = shlex.split(line)[1:]
        # the page trains for minutes
        if "--epochs" in words:
            words[words.index("--epochs") + 1] = "1"
        found = typed(*words)
        assert found.code == 0, found.err
    assert (tmp_path / "preferred/model/chat_template.jinja").is_file()
