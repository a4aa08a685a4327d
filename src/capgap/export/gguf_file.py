"""A model folder as one GGUF file for llama.cpp, written tensor by tensor, read back and compared.

Keys and names of tensors follow the GGUF specification and llama.cpp's own converter.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capgap.errors import UserError
from capgap.export.gguf_tokenizer import missing_splits, tokenizer_keys
from capgap.export.licence import Licence
from capgap.models.stored import StoredWeights, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

# model_type -> the architecture that llama.cpp runs it as
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Settings that the architecture has no key for, with the only values it means
_SETTINGS = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}
_TABLES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# GGUF's number for a file whose matrices are of a dtype
_FILE_TYPES = {torch.float64: 0, torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


@dataclass(frozen=True)
class _Entry:
    """A tensor under both names. `heads`: its rows are the heads' halves, which llama.cpp's llama
    wants in turns; None where they stay."""

    gguf: str
    stored: str
    heads: int | None


def check_gguf(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerFast") -> None:
    """UserError for a model that cannot be a GGUF file, before any work."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("--gguf needs the gguf library: `pip install 'capgap[gguf]'`") from None
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"--gguf writes {', '.join(ARCHITECTURES)} models, and this is a {kind}: leave --gguf "
            "out"
        )
    for name, allowed in _SETTINGS.items():
        value = getattr(config, name, None)
        if name in config.to_dict() and value not in allowed:
            raise UserError(f"--gguf: {name}={value} has no key in a GGUF file of this family")
    rope = _rope(config)
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"--gguf: rotary positions of type {rope['rope_type']!r} are not supported")
    tokenizer_keys(tokenizer, config.vocab_size)


def write_gguf(folder: Path, path: Path, *, name: str, licence: Licence) -> dict[str, Any]:
    """Writes the model in `folder` to `path` and compares what is read back with it.

    Matrices keep their dtype, vectors are fp32, as llama.cpp wants them. Returns what the command
    tells. UserError as `check_gguf`, and OSError where what was read back differs.
    """
    from gguf import GGUFWriter

    from capgap.corpus.tokenizer import load_tokenizer

    config: Any = read_config(folder)
    tokenizer = load_tokenizer(folder)
    check_gguf(config, tokenizer)
    weights = StoredWeights(folder)
    entries = list(_entries(config))
    keys = _keys(config, weights.dtype(entries[0].stored), name, licence)
    keys |= tokenizer_keys(tokenizer, config.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer: Any = GGUFWriter(aside, ARCHITECTURES[config.model_type])
        for key, value in keys.items():
            _add(writer, key, value)
        _write_tensors(writer, entries, weights)
        compared = _compare(aside, keys, entries, weights)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    context = keys[f"{ARCHITECTURES[config.model_type]}.context_length"]
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "architecture": ARCHITECTURES[config.model_type],
        "tokenizer": keys["tokenizer.ggml.model"],
        "context": context,
        "missing_splits": missing_splits(tokenizer),
        **compared,
    }


def _keys(config: Any, dtype: torch.dtype, name: str, licence: Licence) -> dict[str, Any]:
    """Metadata; the architecture's own key is the writer's."""
    from gguf import GGML_QUANT_VERSION

    arch = ARCHITECTURES[config.model_type]
    head = _head_size(config)
    # what is further away than a sliding window would be seen by llama.cpp, which knows none here
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    keys: dict[str, Any] = {
        "general.name": name,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": int(GGML_QUANT_VERSION),
        f"{arch}.context_length": min(window, config.max_position_embeddings),
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head,
        f"{arch}.attention.value_length": head,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(_rope(config)["rope_theta"]),
        f"{arch}.rope.dimension_count": head,
        f"{arch}.vocab_size": config.vocab_size,
    }
    if licence.id is not None:
        keys["general.license"] = licence.id
        if licence.name:
            keys["general.license.name"] = licence.name
    return keys


def _rope(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = config.rope_parameters
    return found


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _entries(config: Any) -> Iterator[_Entry]:
    """All tensors in the order of the file."""
    tied = config.tie_word_embeddings
    for stored, gguf in _TABLES.items():
        if not (tied and stored == "lm_head.weight"):
            yield _Entry(gguf, stored, None)
    # llama.cpp turns the halves of a head in Qwen as transformers does
    turned = ARCHITECTURES[config.model_type] == "llama"
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }
    for layer in range(config.num_hidden_layers):
        for part, gguf in _PARTS.items():
            if part.endswith(("q_norm", "k_norm")) and config.model_type != "qwen3":
                continue
            kinds = ["weight"]
            if config.model_type == "qwen2" and part[-6:] in ("q_proj", "k_proj", "v_proj"):
                kinds.append("bias")
            for kind in kinds:
                yield _Entry(
                    f"blk.{layer}.{gguf}.{kind}",
                    f"model.layers.{layer}.{part}.{kind}",
                    heads.get(part) if turned else None,
                )


def _turned(tensor: Tensor, heads: int) -> Tensor:
    """Rows of every head, its first half and its second, in turns: [first 0, second 0, ...]."""
    rows = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def _turned_back(tensor: Tensor, heads: int) -> Tensor:
    rows = tensor.shape[0] // heads
    return tensor.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def _add(writer: Any, key: str, value: Any) -> None:
    add = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }[type(value)]
    add(key, value)


def _write_tensors(writer: Any, entries: list[_Entry], weights: StoredWeights) -> None:
    """All names and shapes first, then one tensor after the other."""
    from gguf import GGMLQuantizationType

    kinds = {
        torch.float32: GGMLQuantizationType.F32,
        torch.float16: GGMLQuantizationType.F16,
        torch.bfloat16: GGMLQuantizationType.BF16,
    }
    for entry in entries:
        tensor = weights[entry.stored]
        dtype = _file_dtype(tensor)
        size = tensor.numel() * dtype.itemsize
        writer.add_tensor_info(
            entry.gguf, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=kinds[dtype]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(_bytes(weights[entry.stored], entry.heads))
    writer.close()


def _file_dtype(tensor: Tensor) -> torch.dtype:
    """What a tensor is written in: vectors, and what llama.cpp has no numbers for, in fp32."""
    return torch.float32 if tensor.ndim == 1 or tensor.dtype == torch.float64 else tensor.dtype


def _bytes(tensor: Tensor, heads: int | None) -> NDArray[np.uint8]:
    """uint8 [rows, bytes of a row]: numpy has no bf16."""
    tensor = tensor.to(_file_dtype(tensor))
    if heads is not None:
        tensor = _turned(tensor, heads)
    return tensor.contiguous().view(torch.uint8).numpy()


def _compare(
    path: Path, keys: dict[str, Any], entries: list[_Entry], weights: StoredWeights
) -> dict[str, Any]:
    """Reads the file with the library's own reader; OSError where anything differs."""
    from gguf import GGUFReader

    reader: Any = GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for entry in entries:
        stored = weights[entry.stored]
        wanted = stored.to(_file_dtype(stored))
        raw = torch.from_numpy(np.array(found[entry.gguf].data)).contiguous()
        read = raw.view(torch.uint8).view(wanted.dtype).reshape(wanted.shape)
        if entry.heads is not None:
            read = _turned_back(read, entry.heads)
        if not torch.equal(read, wanted):
            raise OSError(f"{path}: {entry.gguf} was not read back as it was written")
    for key, value in keys.items():
        told = reader.get_field(key).contents()
        same = np.float32(value) == np.float32(told) if isinstance(value, float) else told == value
        if not same:
            raise OSError(f"{path}: {key} was not read back as it was written")
    return {"compared_tensors": len(entries), "compared_keys": len(keys)}
