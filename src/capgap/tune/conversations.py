"""Conversations and pairs of answers in .jsonl files: read, checked, counted. Imports no torch."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from capgap.errors import UserError

Message = dict[str, str]

# How many lines of a kind of problem are named
NAMED_LINES = 5
# Keys under which datasets keep the list of turns
TURN_LISTS = ("messages", "conversations", "conversation", "data", "turns")
_TURNS = ("user", "assistant")
_ROLES = {name: name for name in ("system", *_TURNS)} | {"human": "user"}
_ROLES |= dict.fromkeys(("gpt", "bot", "model"), "assistant")
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
# What is mended or left out without a question, and reported
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

    @property
    def texts(self) -> list[str]:
        return [message["content"] for message in self.messages]


@dataclass(frozen=True)
class Pair:
    """A prompt that ends with the user, and two answers to it, the better one first."""

    line: int
    prompt: list[Message]
    chosen: str
    rejected: str

    @property
    def texts(self) -> list[str]:
        return [*(message["content"] for message in self.prompt), self.chosen, self.rejected]


Item = TypeVar("Item", Conversation, Pair)


@dataclass
class Reading(Generic[Item]):
    """The usable lines of a file, and what was found in all of them.

    Attributes:
        num_lines: lines that are not blank.
        findings: line numbers by kind, a key of PROBLEMS or ADJUSTMENTS.
    """

    path: Path
    usable: list[Item] = field(default_factory=list)
    num_lines: int = 0
    findings: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

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
            f"line {lines[0]} {PROBLEMS[kind]}"
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
            sentences.append(f"{len(lines)} {what} (line {first}{more})")
        return sentences


def check_file(path: Path) -> None:
    """UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give conversations as .jsonl, one a line")


def _read(path: Path, parse: Callable[[Any, int, Reading[Item]], Item]) -> Reading[Item]:
    check_file(path)
    reading: Reading[Item] = Reading(path)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            reading.num_lines += 1
            try:
                value = json.loads(line)
                json.dumps(value, ensure_ascii=False).encode()
                reading.usable.append(parse(value, number, reading))
            except UnicodeEncodeError:
                reading.findings["surrogate"].append(number)
            except (ValueError, RecursionError):
                reading.findings["unreadable"].append(number)
            except _Bad as bad:
                reading.findings[str(bad)].append(number)
    if not reading.num_lines:
        raise UserError(f"{path} holds no lines: give one conversation a line, as JSON")
    return reading


def read_conversations(path: Path) -> Reading[Conversation]:
    """Every line of a .jsonl file as a conversation, and what is wrong with the others; blank lines
    are none.

    Forms: {"messages": [{"role", "content"}]}; turns as plain strings, user first; turns as
    {"from", "value"} or {"User", "Assistant"}; each under a key of TURN_LISTS or as a bare list.
    UserError where there is no such file, or nothing in it.
    """

    def parse(value: Any, line: int, reading: Reading[Conversation]) -> Conversation:
        messages = _messages(value)
        if all(message["role"] != "assistant" for message in messages):
            raise _Bad("no_assistant")
        _check_turns(messages)
        if messages[-1]["role"] == "user":
            reading.findings["unanswered"].append(line)
            messages = messages[:-1]
        return Conversation(line, messages)

    return _read(path, parse)


def read_pairs(path: Path) -> Reading[Pair]:
    """Every line of a .jsonl file as {"prompt", "chosen", "rejected"}.

    The prompt is a text or messages that end with the user; answers are texts, or messages of
    which the last is the answer. Without a prompt it is what both conversations begin with.
    UserError where there is no such file, or nothing in it.
    """

    def parse(value: Any, line: int, reading: Reading[Pair]) -> Pair:
        if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
            raise _Bad("unreadable")
        prompt, chosen = _prompt_and_answer(value.get("prompt"), value["chosen"])
        other, rejected = _prompt_and_answer(value.get("prompt"), value["rejected"])
        if prompt != other:
            raise _Bad("unreadable")
        _check_turns(prompt)
        if not prompt or prompt[-1]["role"] != "user":
            raise _Bad("roles")
        if not chosen.strip() or not rejected.strip():
            raise _Bad("empty_turn")
        if chosen.strip() == rejected.strip():
            raise _Bad("same_answers")
        return Pair(line, prompt, chosen, rejected)

    return _read(path, parse)


def _messages(value: Any) -> list[Message]:
    """The turns of any known form, without a check of their order."""
    fields = value if isinstance(value, dict) else {"turns": value}
    turns = next((fields[key] for key in TURN_LISTS if key in fields), None)
    if not isinstance(turns, list):
        raise _Bad("unreadable")
    if all(isinstance(turn, str) for turn in turns):
        messages = [_message(_TURNS[i % 2], turn) for i, turn in enumerate(turns)]
    else:
        messages = [message for turn in turns for message in _turn(turn)]
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        return [_message("system", system), *messages]
    return messages


def _turn(turn: Any) -> list[Message]:
    match turn:
        case {"User": question, "Assistant": answer}:
            return [_message("user", question), _message("assistant", answer)]
        case {"role": role, "content": content} | {"from": role, "value": content}:
            return [_message(role, content)]
    raise _Bad("unreadable")


def _message(role: Any, content: Any) -> Message:
    if not isinstance(role, str) or not isinstance(content, str):
        raise _Bad("unreadable")
    # an unknown role counts as one that is out of order
    return {"role": _ROLES.get(role.lower(), role), "content": content}


def _check_turns(messages: list[Message]) -> None:
    """_Bad unless roles alternate, user first, and no turn is empty."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if any(role != _TURNS[i % 2] for i, role in enumerate(turns)):
        raise _Bad("roles")
    if not all(message["content"].strip() for message in messages):
        raise _Bad("empty_turn")


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
