"""A fast tokenizer as GGUF keys: byte-level BPE, and Llama's sentencepiece-style BPE."""

import json
import re
from typing import TYPE_CHECKING, Any

from capgap.stage import FieldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Token types of GGUF
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# What GGUF calls special tokens, and transformers
_SPECIAL = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
# How llama.cpp names a way of cutting text into words before BPE: the regular expressions, and
# whether every digit is cut off, to that name. GPT-2's own is written into ByteLevel.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {(): "gpt-2", (_LLAMA3,): "llama-bpe", (_QWEN2,): "qwen2", ("digits",): "smollm"}


def refusal(what: str) -> FieldError:
    """For what llama.cpp would read otherwise."""
    return FieldError("gguf", f"cannot hold {what}; leave it out")


def tokenizer_keys(tokenizer: "PreTrainedTokenizerFast", rows: int) -> dict[str, Any]:
    """`tokenizer.*` keys for a table of so many rows; FieldError for other kinds of tokenizers."""
    description = _description(tokenizer)
    model = description["model"]
    if model["type"] != "BPE":
        raise refusal(
            f"a tokenizer that is a {model['type']} model, neither byte-level BPE nor Llama's "
            "sentencepiece-style BPE"
        )
    pieces, types = _pieces(tokenizer, description, rows)
    keys = _llama_keys(description, pieces) if _is_llama(model) else _gpt2_keys(description)
    keys["tokenizer.ggml.tokens"] = pieces
    keys["tokenizer.ggml.token_type"] = types
    for name, short in _SPECIAL.items():
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
    model = _description(tokenizer)["model"]
    if not _is_llama(model):
        return 0
    words, merges = model["vocab"].keys(), set(_merges(model))
    return sum(
        (piece[:cut], piece[cut:]) not in merges
        for piece in {left + right for left, right in merges}
        for cut in range(1, len(piece))
        if piece[:cut] in words and piece[cut:] in words
    )


def _description(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """What tokenizer.json holds."""
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def _is_llama(model: dict[str, Any]) -> bool:
    return bool(model.get("byte_fallback"))


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs, or an older file's words with a space."""
    merges = (one.split(" ") if isinstance(one, str) else one for one in model["merges"])
    return [(left, right) for left, right in merges]


def _gpt2_keys(description: dict[str, Any]) -> dict[str, Any]:
    normalizer = description["normalizer"]
    # NFC, which Qwen has, leaves nearly all text as it is, and llama.cpp reads Qwen without
    if normalizer not in (None, {"type": "NFC"}):
        raise refusal(
            "a tokenizer that changes text before it cuts it (a normalizer, "
            f"{normalizer.get('type')})"
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _cutting(description),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(description["model"])],
    }


def _cutting(description: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut into words."""
    cutting = description["pre_tokenizer"] or {}
    *steps, last = cutting["pretokenizers"] if cutting.get("type") == "Sequence" else [cutting]
    kinds = []
    for step in steps:
        if step["type"] == "Split":
            kinds.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            kinds.append("digits")
        else:
            kinds.append(step["type"])
    name = _SPLITS.get(tuple(kinds))
    # ByteLevel cuts by GPT-2's expression itself where nothing before it has cut text by another
    by_itself = name in ("gpt-2", "smollm")
    is_bytes = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if name is None or not is_bytes or last.get("use_regex", True) != by_itself:
        raise refusal(
            "a tokenizer whose way of cutting text into words has no name in llama.cpp; it must be "
            "that of GPT-2, Llama 3, Qwen2 or SmolLM"
        )
    return name


def _llama_keys(description: dict[str, Any], pieces: list[str]) -> dict[str, Any]:
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
        raise refusal(
            "a tokenizer that has byte fallback but is not written as Llama's, where spaces become "
            f"{SPACE} and nothing else is changed or cut"
        )
    # what was merged first is the likeliest: minus the place of the first merge that gives it
    scores: dict[str, float] = {}
    for place, pair in enumerate(_merges(description["model"]), 1):
        scores.setdefault("".join(pair), -float(place))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefixed,
        "tokenizer.ggml.scores": [scores.get(piece, 0.0) for piece in pieces],
    }


def _pieces(
    tokenizer: "PreTrainedTokenizerFast", description: dict[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    """Every row's text and type; rows behind the last token pad the table."""
    pieces, types = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    is_llama = _is_llama(description["model"])
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
