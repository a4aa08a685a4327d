"""A model folder as one GGUF file for llama.cpp, written tensor by tensor, read back and compared.

Keys and names of tensors follow the GGUF specification and llama.cpp's own converter. Tokenizers
are byte-level BPE, or Llama's sentencepiece-style BPE with byte fallback.
"""

import functools
import io
import json
import math
import re
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capgap.artifact import file_written
from capgap.corpus.tokenizer import load_tokenizer
from capgap.errors import border
from capgap.export.card import Licence
from capgap.machine import install_command
from capgap.models.stored import StoredWeights, empty_model, read_config
from capgap.stage import FieldError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# What makes each tensor as it is written, by its name in the file
Tensors = dict[str, Callable[[], Tensor]]
# Settings that GGUF has no key for, with the only values that llama.cpp means
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "use_bidirectional_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}
# By what the rotary frequencies of Llama 3.1 are divided, one number a pair
ROPE_FACTORS = "rope_freqs.weight"
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# GGUF's number for a file whose matrices are of a dtype
_FILE_TYPES = {torch.float64: 0, torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


@dataclass(frozen=True)
class Layout:
    """How llama.cpp holds a family. `turned`: rows of queries' and keys' heads have their halves in
    turns; `norms` is added to the weights of norms; every `period`th layer sees all of the text."""

    architecture: str
    turned: bool = False
    norms: float = 0.0
    period: int | None = None


LAYOUTS = {
    "llama": Layout("llama", turned=True),
    "mistral": Layout("llama", turned=True),
    "qwen2": Layout("qwen2"),
    "qwen3": Layout("qwen3"),
    "gemma3_text": Layout("gemma3", norms=1.0, period=6),
}

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


def _refusal(what: str) -> FieldError:
    return FieldError("gguf", f"cannot hold {what}; leave it out")


def check_gguf(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerFast") -> None:
    """FieldError for a model that cannot be a GGUF file, before any work."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        why = f"needs the gguf library: `{install_command('gguf')}`"
        raise FieldError("gguf", why) from None
    kind, layout = config.model_type, LAYOUTS.get(config.model_type)
    if layout is None:
        known = f"{', '.join(LAYOUTS)} models"
        raise FieldError("gguf", f"writes {known}, and this is a {kind}: leave it out")
    for name, allowed in _SETTINGS.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise _refusal(f"{name}={value}, for which a file of this family has no key")
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if kind != "default" and not (kind == "llama3" and layout.turned):
            raise _refusal(f"rotary positions of type {kind!r}")
    if layout.period is not None:
        _check_gemma(config, layout.period)
    tokenizer_keys(tokenizer, config.vocab_size)


def _check_gemma(config: Any, period: int) -> None:
    """llama.cpp knows the order of Gemma's layers and the scale of its scores by itself."""
    kinds, scale = config.layer_types, config.query_pre_attn_scalar
    layers = [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"]
    if layers != list(range(period, len(kinds) + 1, period)):
        raise _refusal(
            f"full attention in layers {', '.join(map(str, layers)) or 'none'} of {len(kinds)}, "
            f"for llama.cpp takes every {period}th (cut without removing layers)"
        )
    if scale != config.head_dim:
        raise _refusal(
            f"query_pre_attn_scalar={scale}, for llama.cpp takes the head size, {config.head_dim}"
        )


def write_gguf(folder: Path, path: Path, *, name: str, licence: Licence) -> dict[str, Any]:
    """Writes the model in `folder`, which `check_gguf` takes, to `path` and compares what is read
    back with it.

    Matrices keep their dtype, vectors are fp32, as llama.cpp wants them. Returns what the command
    tells. OSError where what was read back differs.
    """
    config: Any = read_config(folder)
    tokenizer = load_tokenizer(folder)
    architecture = LAYOUTS[config.model_type].architecture
    weights = StoredWeights(folder)
    tensors = _tensors(config, weights)
    keys = _keys(config, weights.dtype("model.embed_tokens.weight"), name, licence)
    keys |= tokenizer_keys(tokenizer, config.vocab_size)
    with file_written(path) as aside:
        _write(aside, architecture, keys, tensors)
        _compare(aside, keys, tensors)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "architecture": architecture,
        "tokenizer": keys["tokenizer.ggml.model"],
        "context": keys[f"{architecture}.context_length"],
        "missing_splits": missing_splits(tokenizer),
        "compared_tensors": len(tensors),
        "compared_keys": len(keys),
    }


def read_gguf(path: Path, config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model in a file by transformers' own reader, in fp32; sizes and rotary positions are
    those of `config`, of which the reader leaves some out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.model_type == "mistral":
        config = AutoConfig.for_model(**config.to_dict() | {"model_type": "llama"})
    # its bar knows no switch; alone in a folder, since what lies beside it would be read too
    with (
        border(f"{path} cannot be read back"),
        redirect_stderr(io.StringIO()),
        tempfile.TemporaryDirectory() as folder,
    ):
        alone = Path(folder, path.name)
        alone.symlink_to(path.absolute())
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=alone.name, config=config, dtype=torch.float32
        )
    return model


def _keys(config: Any, dtype: torch.dtype, name: str, licence: Licence) -> dict[str, Any]:
    """Metadata; the architecture's own key is the writer's."""
    from gguf import GGML_QUANT_VERSION

    layout = LAYOUTS[config.model_type]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    if window is not None and layout.period is None:
        # what is further away would be seen by llama.cpp, which knows no window here
        context = min(window, context)
    full, *local = _ropes(config)
    own: dict[str, Any] = {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(full["rope_theta"]),
        "rope.dimension_count": head,
        "vocab_size": config.vocab_size,
    }
    if local:
        own["rope.freq_base_swa"] = float(local[0]["rope_theta"])
        own["attention.sliding_window"] = window
    keys: dict[str, Any] = {
        "general.name": name,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": int(GGML_QUANT_VERSION),
    }
    if licence.id is not None:
        keys["general.license"] = licence.id
        if licence.name:
            keys["general.license.name"] = licence.name
    return keys | {f"{layout.architecture}.{key}": value for key, value in own.items()}


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Settings of rotary positions, of full attention first."""
    ropes: dict[str, Any] = config.rope_parameters
    kinds = ("full_attention", "sliding_attention")
    return [ropes[kind] for kind in kinds] if kinds[0] in ropes else [ropes]


def _tensors(config: Any, weights: StoredWeights) -> Tensors:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    layout = LAYOUTS[config.model_type]
    (kind,) = (one for one, name in MODEL_ARCH_NAMES.items() if name == layout.architecture)
    names: Any = get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def make(stored: str) -> Tensor:
        tensor = weights[stored]
        # vectors, and what llama.cpp has no numbers for, in fp32
        if tensor.ndim == 1 or tensor.dtype == torch.float64:
            tensor = tensor.float()
        module = stored.split(".")[-2]
        if layout.turned and module in heads:
            tensor = _turned(tensor, heads[module])
        is_norm = layout.norms and stored.endswith("norm.weight")
        return tensor + layout.norms if is_norm else tensor.contiguous()

    tensors: Tensors = {
        names.get_name(stored, (".weight", ".bias")): functools.partial(make, stored)
        for stored, _ in empty_model(config).named_parameters()
    }
    if _ropes(config)[0].get("rope_type") == "llama3":
        tensors[ROPE_FACTORS] = functools.partial(_rope_factors, config)
    return tensors


def _rope_factors(config: Any) -> Tensor:
    """fp32 [head size / 2]: plain rotary frequencies by the config's own (arXiv 2407.21783)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    theta = _ropes(config)[0]["rope_theta"]
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).float()


def _turned(tensor: Tensor, heads: int) -> Tensor:
    """Rows of every head, its first half and its second, in turns: [first 0, second 0, ...]."""
    rows = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def _write(path: Path, architecture: str, keys: dict[str, Any], tensors: Tensors) -> None:
    """All names and shapes first, then one tensor after the other."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    writer: Any = GGUFWriter(path, architecture)
    for key, value in keys.items():
        most = {int: 2**32, float: math.inf}.get(type(value))
        if most is not None and not 0 <= value < most:
            raise _refusal(f"{key} of {value} (give the model's own config)")
        own_type = GGUFValueType.get_type(value)
        is_count = own_type == GGUFValueType.INT32
        writer.add_key_value(key, value, GGUFValueType.UINT32 if is_count else own_type)
    for name, make in tensors.items():
        tensor = make()
        data, kind = _bytes(tensor), GGMLQuantizationType[_KINDS[tensor.dtype]]
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in tensors.values():
        writer.write_tensor_data(_bytes(make()))
    writer.close()


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """uint8 [rows, bytes of a row]: numpy has no bf16."""
    return tensor.view(torch.uint8).numpy()


def _compare(path: Path, keys: dict[str, Any], tensors: Tensors) -> None:
    """Reads the file with the library's own reader; OSError where anything differs."""
    from gguf import GGUFReader

    reader: Any = GGUFReader(path)
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, make in tensors.items():
        wanted = make().view(torch.uint8).numpy()
        if not np.array_equal(written[name].view(np.uint8).ravel(), wanted.ravel()):
            raise OSError(f"{path}: {name} was not read back as it was written")
    for key, value in keys.items():
        wanted_value = np.float32(value) if isinstance(value, float) else value
        if reader.get_field(key).contents() != wanted_value:
            raise OSError(f"{path}: {key} was not read back as it was written")


def tokenizer_keys(tokenizer: "PreTrainedTokenizerFast", rows: int) -> dict[str, Any]:
    """`tokenizer.*` keys for a table of so many rows; FieldError for other kinds of tokenizers."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise _refusal(
            f"a tokenizer that is a {model['type']} model, neither byte-level BPE nor Llama's "
            "sentencepiece-style BPE"
        )
    is_llama = model.get("byte_fallback")
    # rows behind the last token pad the table
    pieces, types = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    for piece, row in tokenizer.get_vocab().items():
        if row < rows:  # a token for pictures may have none
            pieces[row] = piece
            types[row] = BYTE if is_llama and _BYTE.fullmatch(piece) else NORMAL
    for added in description["added_tokens"]:
        if added["id"] < rows:
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if is_llama and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    keys = _llama_keys(description, pieces) if is_llama else _gpt2_keys(description)
    keys |= {"tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": types}
    for name, short in _SPECIAL.items():
        number = getattr(tokenizer, f"{short}_token_id")
        if number is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = int(number)
    ids = tokenizer("a")["input_ids"]
    keys["tokenizer.ggml.add_bos_token"] = ids[:1] == [tokenizer.bos_token_id]
    keys["tokenizer.ggml.add_eos_token"] = ids[-1:] == [tokenizer.eos_token_id]
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
    known, merges = model["vocab"].keys(), set(_merges(model))
    return sum(
        (piece[:cut], piece[cut:]) not in merges
        for piece in {left + right for left, right in merges}
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    )


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs, or an older file's words with a space."""
    merges = (one.split(" ") if isinstance(one, str) else one for one in model["merges"])
    return [(left, right) for left, right in merges]


def _gpt2_keys(description: dict[str, Any]) -> dict[str, Any]:
    normalizer, cutting = description["normalizer"], description["pre_tokenizer"] or {}
    # NFC, which Qwen has, leaves nearly all text as it is, and llama.cpp reads Qwen without
    if normalizer not in (None, {"type": "NFC"}):
        raise _refusal(
            "a tokenizer that changes text before it cuts it (a normalizer, "
            f"{normalizer.get('type')})"
        )
    *steps, last = cutting["pretokenizers"] if cutting.get("type") == "Sequence" else [cutting]
    kinds = []
    for step in steps:
        if step["type"] == "Split":
            kinds.append(step["pattern"].get("Regex", ""))
        else:
            kinds.append("digits" if step.get("individual_digits") else step["type"])
    name = _SPLITS.get(tuple(kinds))
    # ByteLevel cuts by GPT-2's expression itself where nothing before it has cut text by another
    by_itself = name in ("gpt-2", "smollm")
    is_bytes = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if name is None or not is_bytes or last.get("use_regex", True) != by_itself:
        raise _refusal(
            "a tokenizer whose way of cutting text into words has no name in llama.cpp; it must be "
            "that of GPT-2, Llama 3, Qwen2 or SmolLM"
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(description["model"])],
    }


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
        raise _refusal(
            "a tokenizer that has byte fallback but is not written as Llama's, where spaces become "
            f"{SPACE} and nothing else is changed or cut"
        )
    # what was merged first is the likeliest: minus the rank of the first merge that gives it
    scores: dict[str, float] = {}
    for rank, pair in enumerate(_merges(description["model"]), 1):
        scores.setdefault("".join(pair), -float(rank))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefixed,
        "tokenizer.ggml.scores": [scores.get(piece, 0.0) for piece in pieces],
    }
