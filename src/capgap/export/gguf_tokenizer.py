"""A fast tokenizer as GGUF keys: byte-level BPE, and Llama's sentencepiece-style BPE."""

import json
import re
from typing import TYPE_CHECKING, Any

from capgap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Token types of GGUF
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# How llama.cpp names a way of cutting text into words before BPE: the regular expressions, and
# whether every digit is cut off, to that name. GPT-2's own is written into ByteLevel.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {(): "gpt-2", (_LLAMA3,): "llama-bpe", (_QWEN2,): "qwen2", ("digits",): "smollm"}


def tokenizer_keys(tokenizer: "PreTrainedTokenizerFast", rows: int) -> dict[str, Any]:
    """`tokenizer.*` keys for a table of so many rows; UserError for any other kind of tokenizer."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"--gguf: the tokenizer is a {model['type']} model; byte-level BPE and Llama's "
            "sentencepiece-style BPE are supported"
        )
    normalizer = description["normalizer"]
    # NFC, which Qwen has, leaves nearly all text as it is, and llama.cpp reads Qwen without
    if not model.get("byte_fallback") and normalizer not in (None, {"type": "NFC"}):
        kind = normalizer.get("type")
        raise UserError(
            f"--gguf: the tokenizer changes text before it cuts it (a normalizer, {kind}), which a "
            "GGUF file of byte-level BPE cannot say: llama.cpp would read other tokens"
        )
    keys = _llama_keys(description) if model.get("byte_fallback") else _gpt2_keys(description)
    pieces, types = _pieces(tokenizer, description, rows)
    keys["tokenizer.ggml.tokens"] = pieces
    keys["tokenizer.ggml.token_type"] = types
    if keys["tokenizer.ggml.model"] == "llama":
        scores = _scores(model)
        keys["tokenizer.ggml.scores"] = [scores.get(piece, 0.0) for piece in pieces]
    for name in ("bos", "eos", "padding", "unknown"):
        short = {"padding": "pad", "unknown": "unk"}.get(name, name)
        number = getattr(tokenizer, f"{short}_token_id")
        if number is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = int(number)
    written = tokenizer("a")["input_ids"]
    keys["tokenizer.ggml.add_bos_token"] = written[:1] == [tokenizer.bos_token_id]
    keys["tokenizer.ggml.add_eos_token"] = written[-1:] == [tokenizer.eos_token_id]
    if isinstance(tokenizer.chat_template, str):
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys


def missing_splits(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Ways to join two pieces into a third that llama.cpp takes and the tokenizer does not.

    llama.cpp joins whatever gives a known piece, the likeliest first; a sentencepiece model does
    the same, but merges that were learnt one by one may lack some. Above 0 the two may cut a word
    differently. 0 for a byte-level tokenizer, whose merges are written out.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if not model.get("byte_fallback"):
        return 0
    words = model["vocab"].keys()
    merges = {_pair(merge) for merge in model["merges"]}
    return sum(
        (piece[:place], piece[place:]) not in merges
        for piece in {left + right for left, right in merges}
        for place in range(1, len(piece))
        if piece[:place] in words and piece[place:] in words
    )


def _gpt2_keys(description: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _cutting(description),
        "tokenizer.ggml.merges": [" ".join(_pair(one)) for one in description["model"]["merges"]],
    }


def _cutting(description: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut into words."""
    found = description["pre_tokenizer"] or {}
    steps = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    kinds = []
    for step in steps[:-1]:
        if step["type"] == "Split":
            kinds.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            kinds.append("digits")
        else:
            kinds.append(step["type"])
    last = steps[-1]
    # ByteLevel cuts by GPT-2's expression itself where nothing before it has cut text by another
    by_itself = tuple(kinds) in ((), ("digits",))
    if (
        last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space")
        and last.get("use_regex", True) == by_itself
        and tuple(kinds) in _SPLITS
    ):
        return _SPLITS[tuple(kinds)]
    raise UserError(
        "--gguf: the tokenizer cuts text into words in a way that has no name in llama.cpp; that "
        "of GPT-2, Llama 3, Qwen2 and SmolLM is supported"
    )


def _llama_keys(description: dict[str, Any]) -> dict[str, Any]:
    normalizer, cutting = description["normalizer"] or {}, description["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    replaced = any(step.get("type") == "Replace" and step.get("content") == SPACE for step in steps)
    prefixed = any(step.get("type") == "Prepend" and step["prepend"] == SPACE for step in steps)
    if cutting.get("type") == "Metaspace":
        replaced, prefixed = True, cutting["prepend_scheme"] != "never"
    # Gemma's is cut at spaces, of which none is left
    is_whole = cutting.get("type") in (None, "Metaspace") or (
        cutting.get("type") == "Split" and cutting["pattern"] == {"String": " "}
    )
    others = {step.get("type") for step in steps} - {"Replace", "Prepend", None}
    if not replaced or others or not is_whole:
        raise UserError(
            "--gguf: the tokenizer has byte fallback but is not written as Llama's: spaces become "
            f"{SPACE}, nothing else is changed or cut"
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


def _pieces(
    tokenizer: "PreTrainedTokenizerFast", description: dict[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    """Every row's text and type; rows behind the last token pad the table."""
    pieces, types = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    is_llama = bool(description["model"].get("byte_fallback"))
    for piece, row in tokenizer.get_vocab().items():
        if row < rows:  # a token for pictures may have none
            pieces[row] = piece
            types[row] = BYTE if is_llama and _BYTE.fullmatch(piece) else NORMAL
    for added in description["added_tokens"]:
        if added["id"] < rows:
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if is_llama and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    return pieces, types


def _scores(model: dict[str, Any]) -> dict[str, float]:
    """What was merged first is the likeliest: minus the place of the first merge that gives it."""
    scores: dict[str, float] = {}
    for place, merge in enumerate(model["merges"]):
        scores.setdefault("".join(_pair(merge)), -float(place + 1))
    return scores


def _pair(merge: Any) -> tuple[str, str]:
    """A merge as tokenizer.json has it: a pair, or an older file's words with a space."""
    left, right = merge if isinstance(merge, list | tuple) else merge.split(" ")
    return left, right
