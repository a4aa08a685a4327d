"""Conversations and pairs of answers: read, checked, counted. Imports no torch."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from capgap.corpus.names import looks_like_path
from capgap.corpus.readers import SUFFIXES, named
from capgap.corpus.sources import dataset_rows
from capgap.errors import UserError, first_line

# `role` and `content`; `weight` 0 where an answer is not learnt; others are for the template
Message = dict[str, Any]

# How many lines of a kind of problem are named
NAMED_LINES = 5
# Keys under which datasets keep the list of turns
TURN_LISTS = ("messages", "conversations", "conversation", "data", "turns")
_TURNS = ("user", "assistant")
# Who may speak after whom
_AFTER = {"user": "assistant", "assistant": "user", "tool": "tool or assistant"}
# Keys of a message that are kept, for the template; others say nothing of what is learnt
_KEPT = {"tool_calls", "tool_call_id", "reasoning_content", "name", "function_call", "thinking"}
_KEPT |= {"refusal", "train", "images", "audio"}
# Keys beside the turns that say something and are not read
_NOT_READ = ("tools", "history", "chat_template_kwargs", "images", "videos", "audios")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")  # in dialogues as one text (Anthropic/hh-rlhf)
_ROLES = {name: name for name in ("system", "tool", *_TURNS)} | {"human": "user"}
_ROLES |= dict.fromkeys(("gpt", "bot", "model"), "assistant")
# What is wrong with a line, by the name that the record gives it
PROBLEMS = {
    "surrogate": "holds half of a character (a lone surrogate, of an emoji cut in two)",
    "broken": "is no JSON",
    "unreadable": "is in none of the forms that docs/chat.md tells",
    "no_assistant": "has no assistant turn to learn",
    "roles": "has roles out of order (system first, then user and assistant in turn)",
    "empty_turn": "has an empty turn",
    "special_token": "has a special token of the model in its text",
    "same_answers": "has the same answer as chosen and as rejected",
    "two_prompts": "has answers to two different prompts",
    "weight": "has a weight other than 0 and 1, or 1 on what is no answer",
    "not_taken": "has what the chat template does not write",
    "not_read": "has a key that is not read here",
}
# What is mended or left out without a question, and reported
ADJUSTMENTS = {
    "unanswered": "ended without an answer: what stands behind the last one was left out",
    "cut": "were cut to the leading turns that the window holds",
    "left_out": "were left out: the window does not hold their answers",
}


class _Bad(Exception):
    """A line that cannot be used; the arguments are a key of PROBLEMS and what it is there."""


@dataclass(frozen=True)
class Conversation:
    """A line: at most one system message, then user and assistant in turn, with their tools."""

    line: int
    messages: list[Message]

    @property
    def texts(self) -> list[str]:
        """All that is said; with the keys for the template, as JSON."""
        keys = json.dumps(self.messages, ensure_ascii=False, default=str)
        return [*(message["content"] for message in self.messages), keys]


@dataclass(frozen=True)
class Pair(Conversation):
    """A prompt that ends with the user, and two answers to it, the better one first."""

    chosen: str
    rejected: str

    @property
    def texts(self) -> list[str]:
        return [*super().texts, self.chosen, self.rejected]


Item = TypeVar("Item", Conversation, Pair)


@dataclass
class Reading(Generic[Item]):
    """The usable lines of a file, and what was found in all of them.

    Attributes:
        num_lines: lines that are not blank.
        findings: line numbers by kind, a key of PROBLEMS or ADJUSTMENTS.
        details: what the first line of a kind has, where that says more.
        revision: the commit of a data set on the Hub.
    """

    path: Path
    usable: list[Item] = field(default_factory=list)
    num_lines: int = 0
    findings: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    details: dict[str, str] = field(default_factory=dict)
    revision: str | None = None

    def found(self, line: int, kind: str, detail: str = "") -> None:
        self.findings[kind].append(line)
        self.details.setdefault(kind, f" ({detail})" if detail else "")

    def problems(self) -> dict[str, Any]:
        """The number of lines of every kind, 0 included, and the first few."""
        kinds = {kind: self.findings.get(kind, []) for kind in (*PROBLEMS, *ADJUSTMENTS)}
        return {
            kind: {"count": len(lines), "first_lines": lines[:NAMED_LINES]}
            for kind, lines in kinds.items()
        }

    def refuse(self) -> None:
        """UserError where a line is bad: the first of every kind, and what to do."""
        bad = [
            f"line {lines[0]} {PROBLEMS[kind]}{self.details.get(kind, '')}"
            + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")
            for kind, lines in self.findings.items()
            if kind in PROBLEMS
        ]
        if bad:
            raise UserError(
                f"{self.path}: {'; '.join(bad)}: mend the file, or leave such lines out with "
                "`skip_bad`"
            )

    def sentences(self) -> list[str]:
        """What was left out, cut or mended, for people."""
        sentences = []
        for kind, lines in self.findings.items():
            first = ", ".join(map(str, lines[:NAMED_LINES]))
            more = ", ..." if len(lines) > NAMED_LINES else ""
            what = ADJUSTMENTS.get(kind) or f"left out: the line {PROBLEMS[kind]}"
            what += self.details.get(kind, "")
            sentences.append(f"{len(lines)} {what} (line {first}{more})")
        return sentences


def check_file(path: Path) -> None:
    """UserError where there is none, and no data set on the Hub can be meant."""
    if not path.is_file() and looks_like_path(str(path), suffixes=SUFFIXES):
        raise UserError(f"{path} is no file: give .jsonl, .json, parquet or a name on the Hub")


def _read(path: Path, parse: Callable[[Any, int, Reading[Item]], Item]) -> Reading[Item]:
    check_file(path)
    reading: Reading[Item] = Reading(path)
    for number, row in _rows(path, reading):
        if isinstance(row, bytes) and not row.strip():
            continue
        reading.num_lines += 1
        try:
            value = json.loads(row) if isinstance(row, bytes) else row
            json.dumps(value, ensure_ascii=False, default=str).encode()
            unread = [key for key in _NOT_READ if isinstance(value, dict) and value.get(key)]
            if unread:
                raise _Bad("not_read", unread[0])
            reading.usable.append(parse(value, number, reading))
        except UnicodeEncodeError:
            reading.found(number, "surrogate")
        except (ValueError, RecursionError) as error:
            reading.found(number, "broken", getattr(error, "msg", first_line(error)))
        except _Bad as bad:
            reading.found(number, *bad.args)
    if not reading.num_lines:
        raise UserError(f"{path} holds no lines: give one conversation a line, as JSON")
    return reading


def _rows(path: Path, reading: Reading[Item]) -> Iterable[tuple[int, Any]]:
    """Lines as bytes, or values, each with its number from 1."""
    if not path.is_file():
        reading.revision, rows = dataset_rows(str(path))
        return enumerate(rows, 1)
    content = path.read_bytes()
    if content.startswith(b"PAR1"):
        import pyarrow.parquet

        with named(path):
            return enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    lines = enumerate(content.split(b"\n"), 1)
    if path.suffix.lower() != ".json":
        return lines
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        # behind a whole value another one begins: one a line
        is_lines = getattr(error, "msg", "") == "Extra data"
        return lines if is_lines else [(getattr(error, "lineno", 1), content)]
    with suppress(_Bad):
        _messages(value)
        return [(1, value)]
    return enumerate(value if isinstance(value, list) else [value], 1)


def read_conversations(path: Path) -> Reading[Conversation]:
    """Every line of a file as a conversation, and what is wrong with the others; blank lines are
    none; entries of a list in .json, rows of parquet and of a data set on the Hub are lines too.

    Forms: {"messages": [{"role", "content"}]}; turns as plain strings, user first; turns as
    {"from", "value"} or {"User", "Assistant"}; each under a key of TURN_LISTS or as a bare list;
    {"instruction", "input", "output"}; {"prompt", "completion"}, the completion alone being learnt.
    UserError where there is no such file or data set, or nothing in it.
    """

    def parse(value: Any, line: int, reading: Reading[Conversation]) -> Conversation:
        messages = _messages(value)
        if all(message["role"] != "assistant" or "weight" in message for message in messages):
            raise _Bad("no_assistant")
        _check_turns(messages)
        answers = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]
        if answers[-1] < len(messages):
            reading.found(line, "unanswered")
        return Conversation(line, messages[: answers[-1]])

    return _read(path, parse)


def read_pairs(path: Path) -> Reading[Pair]:
    """Every line of a file, as for `read_conversations`, as {"prompt", "chosen", "rejected"}.

    The prompt is a text or messages that end with the user; answers are texts, or messages of
    which the last is the answer. Without a prompt it is what both conversations begin with; these
    may be texts with "Human:" and "Assistant:" before every turn. UserError as there.
    """

    def parse(value: Any, line: int, reading: Reading[Pair]) -> Pair:
        if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
            raise _Bad("unreadable")
        prompt, chosen = _prompt_and_answer(value.get("prompt"), value["chosen"])
        other, rejected = _prompt_and_answer(value.get("prompt"), value["rejected"])
        if prompt != other:
            raise _Bad("two_prompts")
        _check_turns(prompt)
        if not prompt or prompt[-1]["role"] not in ("user", "tool"):
            raise _Bad("roles")
        if not chosen.strip() or not rejected.strip():
            raise _Bad("empty_turn")
        if chosen.strip() == rejected.strip():
            raise _Bad("same_answers")
        return Pair(line, prompt, chosen, rejected)

    return _read(path, parse)


def _messages(value: Any) -> list[Message]:
    """The turns of any known form, without a check of their order."""
    if isinstance(value, list) and all(isinstance(turn, str) for turn in value):
        return [_message(_TURNS[i % 2], turn) for i, turn in enumerate(value)]
    if isinstance(value, list):
        return [message for turn in value for message in _turn(turn)]
    if isinstance(value, str) and _SPEAKER.match(value):
        _, *parts = _SPEAKER.split(value)
        turns = zip(parts[::2], parts[1::2], strict=True)
        return [_message(role, said.strip()) for role, said in turns]
    # a table has an empty cell where a line of JSON has no key
    given = value.items() if isinstance(value, dict) else ()
    fields = {key: one for key, one in given if one is not None}
    listed = next((fields[key] for key in TURN_LISTS if key in fields), None)
    match fields:
        case _ if isinstance(listed, list):
            messages = _messages(listed)
        case {"instruction": str(question), "output": answer}:
            more = fields.get("input", "")
            question = f"{question}\n{more}" if more else question
            messages = [_message("user", question), _message("assistant", answer)]
        case {"completion": _, "label": False}:
            raise _Bad("not_read", "label")
        case {"prompt": prompt, "completion": answer}:
            before = _said("user", prompt)
            for message in before:
                message |= {"weight": 0} if message["role"] == "assistant" else {}
            messages = [*before, *_said("assistant", answer)]
        case _:
            raise _Bad("unreadable")
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        return [_message("system", system), *messages]
    return messages


def _said(role: str, value: Any) -> list[Message]:
    """One text of this role, or messages."""
    return [_message(role, value)] if isinstance(value, str) else _messages(value)


def _turn(turn: Any) -> list[Message]:
    match turn:
        case {"User": question, "Assistant": answer}:
            return [_message("user", question), _message("assistant", answer)]
        case {"role": role, "content": content} | {"from": role, "value": content}:
            return [_message(role, content, turn)]
        case {"role": role, "tool_calls": _}:
            return [_message(role, None, turn)]
    raise _Bad("unreadable")


def _message(role: Any, content: Any, turn: Any = None) -> Message:
    """With what its turn says besides; _Bad for a weight that cannot be followed."""
    given = {key: one for key, one in (turn or {}).items() if one not in (None, "", [], {})}
    kept, weight = {key: given[key] for key in given if key in _KEPT}, given.get("weight")
    content = "" if content is None and "tool_calls" in kept else content
    if not isinstance(role, str) or not isinstance(content, str):
        raise _Bad("unreadable")
    # an unknown role counts as one that is out of order
    role = _ROLES.get(role.lower(), role)
    if weight not in (None, 0, 1) or (weight == 1 and role != "assistant"):
        raise _Bad("weight", str(weight))
    unlearnt = {"weight": 0} if weight == 0 and role == "assistant" else {}
    return {"role": role, "content": content, **kept, **unlearnt}


def _check_turns(messages: list[Message]) -> None:
    """_Bad unless roles alternate, user first, tools behind their calls, and no turn is empty."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    allowed = "user"
    for message in turns:
        if message["role"] not in allowed.split(" or "):
            raise _Bad("roles")
        allowed = "tool" if "tool_calls" in message else _AFTER[message["role"]]
    if not all(one["content"].strip() or "tool_calls" in one for one in messages):
        raise _Bad("empty_turn")


def _prompt_and_answer(prompt: Any, answer: Any) -> tuple[list[Message], str]:
    """Answers come as texts, as one assistant message, or as whole conversations."""
    before = [] if prompt is None else _said("user", prompt)
    if isinstance(answer, str) and prompt is not None:
        return before, answer
    messages = _messages(answer)
    if not messages or messages[-1]["role"] != "assistant":
        raise _Bad("no_assistant")
    *whole, last = messages
    unread = sorted(last.keys() - {"role", "content"})
    if unread:
        raise _Bad("not_read", unread[0])
    # some datasets repeat the prompt in both answers
    if before and whole and whole[-len(before) :] != before:
        raise _Bad("two_prompts")
    return whole or before, last["content"]
