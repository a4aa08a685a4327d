"""Conversations and pairs of answers in .jsonl files: read, checked, counted. Imports no torch."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from capgap.errors import UserError

Message = dict[str, str]

# Of every kind of problem the record names so many lines
TOLD_LINES = 5
# Keys under which datasets keep the list of turns
TURN_LISTS = ("messages", "conversations", "conversation", "data", "turns")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# What is wrong with a line, by the name that the record gives it
PROBLEMS = {
    "surrogate": "holds half of a character (a lone surrogate, of an emoji cut in two)",
    "unreadable": "is in none of the forms that docs/chat.md tells",
    "no_assistant": "has no assistant turn",
    "roles": "has roles out of order (system first, then user and assistant in turn)",
    "empty_turn": "has an empty turn",
    "special_token": "has a special token of the model in its text",
    "same_answers": "has the same answer as chosen and as rejected",
}
# What is mended or left out, and told, without a question
ADJUSTMENTS = {
    "unanswered": "ended with a question, which was left out",
    "cut": "were cut to the leading turns that the window holds",
    "left_out": "were left out: the window does not hold their answers",
}


class _Bad(Exception):
    """A line that cannot be used; the argument is a key of PROBLEMS."""


@dataclass(frozen=True)
class Conversation:
    """A line of the file: at most one system message, then user and assistant in turn."""

    line: int
    messages: list[Message]


@dataclass(frozen=True)
class Pair:
    """A prompt that ends with the user, and two answers to it, the better one first."""

    line: int
    prompt: list[Message]
    chosen: str
    rejected: str


@dataclass
class Findings:
    """Line numbers by kind of problem or adjustment."""

    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, kind: str, line: int) -> None:
        assert kind in PROBLEMS or kind in ADJUSTMENTS, kind
        self.lines.setdefault(kind, []).append(line)

    def as_dict(self) -> dict[str, Any]:
        """For every kind how many lines, and the numbers of the first few; 0 where none was."""
        return {
            kind: {
                "count": len(self.lines.get(kind, [])),
                "first_lines": self.lines.get(kind, [])[:TOLD_LINES],
            }
            for kind in (*PROBLEMS, *ADJUSTMENTS)
        }

    def refuse(self, path: Path) -> None:
        """UserError where a line is bad: the first of every kind, and what to do."""
        bad = {kind: lines for kind, lines in self.lines.items() if kind in PROBLEMS}
        if not bad:
            return
        told = "; ".join(
            f"line {lines[0]} {PROBLEMS[kind]}"
            + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")
            for kind, lines in bad.items()
        )
        raise UserError(f"{path}: {told}: mend the file, or leave such lines out with --skip-bad")

    def sentences(self) -> list[str]:
        """What was left out, cut or mended, for people."""
        said = []
        for kind, lines in self.lines.items():
            first = ", ".join(map(str, lines[:TOLD_LINES]))
            where = f"(line {first}{', ...' if len(lines) > TOLD_LINES else ''})"
            what = ADJUSTMENTS.get(kind)
            if what is None:
                what = f"left out: the line {PROBLEMS[kind]}"
            said.append(f"{len(lines)} {what} {where}")
        return said


_Read = TypeVar("_Read", Conversation, Pair)


@dataclass(frozen=True)
class Reading(Generic[_Read]):
    """What a file holds: its usable lines, and what was found on the way."""

    usable: list[_Read]
    findings: Findings
    num_lines: int


def read_conversations(path: Path) -> Reading[Conversation]:
    """Every line of a .jsonl file as a conversation; blank lines are none.

    Forms: {"messages": [{"role", "content"}]}; turns as plain strings, user first; turns as
    {"from", "value"} or {"User", "Assistant"}; each under a key of TURN_LISTS or as a bare list.
    UserError where there is no such file, or nothing in it.
    """
    return _read(path, _conversation)


def read_pairs(path: Path) -> Reading[Pair]:
    """Every line of a .jsonl file as {"prompt", "chosen", "rejected"}.

    The prompt is a text or messages that end with the user; answers are texts, or messages of
    which the last is the answer. Without a prompt it is what both conversations begin with.
    UserError where there is no such file, or nothing in it.
    """
    return _read(path, _pair)


def _read(path: Path, parse: Callable[[Any, int, Findings], _Read]) -> Reading[_Read]:
    findings = Findings()
    usable: list[_Read] = []
    count = 0
    for number, line in _lines(path):
        count += 1
        try:
            value = json.loads(line)
            if _is_cut(value):
                raise _Bad("surrogate")
            usable.append(parse(value, number, findings))
        except (ValueError, RecursionError):
            findings.add("unreadable", number)
        except _Bad as bad:
            findings.add(str(bad), number)
    if not count:
        raise UserError(f"{path} holds no lines: give one conversation a line, as JSON")
    return Reading(usable, findings, count)


def _is_cut(value: Any) -> bool:
    """Whether half of a surrogate pair stands in it, which is no character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def file_hash(path: Path) -> str:
    """sha256 of the file's bytes; UserError where there is none."""
    _check_file(path)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} is no file: give conversations as .jsonl, one a line")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that are not blank."""
    _check_file(path)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line


def _conversation(value: Any, line: int, findings: Findings) -> Conversation:
    messages = _messages(value)
    _check_roles(messages)
    if messages[-1]["role"] == "user":
        findings.add("unanswered", line)
        messages = messages[:-1]
    return Conversation(line, messages)


def _messages(value: Any) -> list[Message]:
    """The turns of any known form, without a check of their order."""
    turns = _turn_list(value)
    if all(isinstance(turn, str) for turn in turns):
        found = [_message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
    else:
        found = [message for turn in turns for message in _turn(turn)]
    if not isinstance(value, dict):
        return found
    system = value.get("system")
    if isinstance(system, str) and system.strip() and found and found[0]["role"] != "system":
        return [_message("system", system), *found]
    return found


def _turn_list(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = next((value[key] for key in TURN_LISTS if key in value), None)
    if not isinstance(value, list):
        raise _Bad("unreadable")
    return value


def _turn(turn: Any) -> list[Message]:
    if not isinstance(turn, dict):
        raise _Bad("unreadable")
    if {"User", "Assistant"} <= turn.keys():
        return [_message("user", turn["User"]), _message("assistant", turn["Assistant"])]
    for role, content in (("role", "content"), ("from", "value")):
        if {role, content} <= turn.keys():
            return [_message(turn[role], turn[content])]
    raise _Bad("unreadable")


def _message(role: Any, content: Any) -> Message:
    if not isinstance(role, str) or not isinstance(content, str):
        raise _Bad("unreadable")
    # an unknown role is told as one that is out of order
    return {"role": _ROLES.get(role.lower(), role), "content": content}


def _check_roles(messages: Sequence[Message], *, wanted: str = "assistant") -> None:
    """_Bad unless a `wanted` turn is there, roles alternate, and no turn is empty."""
    roles = [message["role"] for message in messages]
    if wanted not in roles:
        raise _Bad("no_assistant" if wanted == "assistant" else "roles")
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise _Bad("roles")
    if not all(message["content"].strip() for message in messages):
        raise _Bad("empty_turn")


def _pair(value: Any, line: int, findings: Findings) -> Pair:
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
        raise _Bad("unreadable")
    prompt, chosen = _prompt_and_answer(value.get("prompt"), value["chosen"])
    other, rejected = _prompt_and_answer(value.get("prompt"), value["rejected"])
    if prompt != other:
        raise _Bad("unreadable")
    _check_roles(prompt, wanted="user")
    if prompt[-1]["role"] != "user":
        raise _Bad("roles")
    if not chosen.strip() or not rejected.strip():
        raise _Bad("empty_turn")
    if chosen.strip() == rejected.strip():
        raise _Bad("same_answers")
    return Pair(line, prompt, chosen, rejected)


def _prompt_and_answer(prompt: Any, answer: Any) -> tuple[list[Message], str]:
    """Answers come as texts, as one assistant message, or as whole conversations."""
    before: list[Message] = []
    if isinstance(prompt, str):
        before = [_message("user", prompt)]
    elif prompt is not None:
        before = _messages(prompt)
    if isinstance(answer, str):
        if prompt is None:
            raise _Bad("unreadable")
        return before, answer
    messages = _messages(answer)
    if not messages or messages[-1]["role"] != "assistant":
        raise _Bad("no_assistant")
    # some datasets repeat the prompt in both answers
    return (before if len(messages) == 1 else messages[:-1]), messages[-1]["content"]
