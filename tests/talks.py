"""Conversations, a tokenizer and a tiny model for the tests of tuning and chat."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capgap.corpus.tokenizer import train_tokenizer
from capgap.models.build import build_model, save_model
from capgap.models.shape import Shape

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def talks(count: int = 20) -> list[list[dict[str, str]]]:
    """Conversations of one and of two questions."""
    found = []
    for i in range(count):
        a, b = DIGITS[i % 10], DIGITS[(i + 1) % 10]
        messages = [said("user", f"What is {a} plus one?"), said("assistant", f"It is {b}.")]
        if i % 3 == 0:
            messages += [said("user", "Sûr?"), said("assistant", f"Oui, {b} 好.")]
        found.append(messages)
    return found


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_lines(path: Path, values: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def save_base(folder: Path, *, positions: int = 64) -> Path:
    """A tiny llama with a tokenizer that knows the conversations, bytes and all."""
    texts = [message["content"].encode() for one in talks() for message in one]
    tokenizer = train_tokenizer([*texts, b"[|User|] [|Assistant|]"] * 2, 320)
    shape = Shape("llama", 32, 2, 4, 2, 8, 64, len(tokenizer), positions, True)
    save_model(build_model(shape, seed=0), folder, tokenizer)
    return folder
