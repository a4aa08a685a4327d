"""A model folder as one GGUF file for llama.cpp, written tensor by tensor, read back and compared.

Keys and names of tensors follow the GGUF specification and llama.cpp's own converter.
"""

import functools
import io
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capgap.errors import UserError, border
from capgap.export.gguf_tokenizer import missing_splits, tokenizer_keys
from capgap.export.licence import Licence
from capgap.models.stored import StoredWeights, empty_model, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

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
_GEMMA_PARTS = _PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Settings that GGUF has no key for, with the only values that llama.cpp means
_SETTINGS = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}
_GEMMA_SETTINGS = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
}


@dataclass(frozen=True)
class _Layout:
    """How llama.cpp holds a family. `turned`: rows of queries' and keys' heads have their halves in
    turns; `norms` is added to the weights of norms; every `period`th layer sees all of the text."""

    architecture: str
    parts: Mapping[str, str] = field(default_factory=lambda: _PARTS)
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: _SETTINGS)
    turned: bool = False
    norms: float = 0.0
    period: int | None = None


LAYOUTS = {
    "llama": _Layout("llama", turned=True),
    "mistral": _Layout("llama", turned=True),
    "qwen2": _Layout("qwen2"),
    "qwen3": _Layout("qwen3"),
    "gemma3_text": _Layout("gemma3", _GEMMA_PARTS, _GEMMA_SETTINGS, norms=1.0, period=6),
}
# By what the rotary frequencies of Llama 3.1 are divided, one number a pair
ROPE_FACTORS = "rope_freqs.weight"
# GGUF's number for a file whose matrices are of a dtype
_FILE_TYPES = {torch.float64: 0, torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its name, `make()` as it is written."""

    name: str
    make: Callable[[], Tensor]


def check_gguf(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerFast") -> None:
    """UserError for a model that cannot be a GGUF file, before any work."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("--gguf needs the gguf library: `pip install 'capgap[gguf]'`") from None
    kind = config.model_type
    if kind not in LAYOUTS:
        raise UserError(
            f"--gguf writes {', '.join(LAYOUTS)} models, and this is a {kind}: leave --gguf out"
        )
    layout = LAYOUTS[kind]
    for name, allowed in layout.settings.items():
        value = getattr(config, name, None)
        if name in config.to_dict() and value not in allowed:
            raise UserError(f"--gguf: {name}={value} has no key in a GGUF file of this family")
    kinds = ("default", "llama3") if layout.turned else ("default",)
    for rope in _ropes(config):
        if rope.get("rope_type", "default") not in kinds:
            raise UserError(
                f"--gguf: rotary positions of type {rope['rope_type']!r} are not supported"
            )
    if layout.period is not None:
        _check_gemma(config, layout.period)
    tokenizer_keys(tokenizer, config.vocab_size)


def _check_gemma(config: Any, period: int) -> None:
    """llama.cpp knows the order of Gemma's layers and the scale of its scores by itself."""
    kinds = [kind == "full_attention" for kind in config.layer_types]
    if kinds != [(layer + 1) % period == 0 for layer in range(len(kinds))]:
        raise UserError(
            f"--gguf: llama.cpp takes every {period}th layer of a {config.model_type} for one of "
            f"full attention, and here they are {_numbers(kinds)} of {len(kinds)}: cut without "
            "removing layers, or leave --gguf out"
        )
    if config.query_pre_attn_scalar != config.head_dim:
        raise UserError(
            f"--gguf: llama.cpp takes the head size, {config.head_dim}, for query_pre_attn_scalar, "
            f"and here it is {config.query_pre_attn_scalar}: leave --gguf out"
        )


def _numbers(kinds: list[bool]) -> str:
    return ", ".join(str(layer + 1) for layer, found in enumerate(kinds) if found) or "none"


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
    entries = list(_entries(config, weights))
    keys = _keys(config, weights.dtype("model.embed_tokens.weight"), name, licence)
    keys |= tokenizer_keys(tokenizer, config.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        architecture = LAYOUTS[config.model_type].architecture
        writer: Any = GGUFWriter(aside, architecture)
        for key, value in keys.items():
            _add(writer, key, value)
        _write_tensors(writer, entries)
        compared = _compare(aside, keys, entries)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "architecture": architecture,
        "tokenizer": keys["tokenizer.ggml.model"],
        "context": keys[f"{architecture}.context_length"],
        "missing_splits": missing_splits(tokenizer),
        **compared,
    }


def read_gguf(path: Path, config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model in a file by transformers' own reader, in fp32; sizes and rotary positions are
    those of `config`, of which the reader leaves some out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = config.to_dict()
    if config.model_type == "mistral":
        kind = LAYOUTS[config.model_type].architecture
        config = AutoConfig.for_model(**fields | {"model_type": kind})
    # its bar knows no switch
    # alone in a folder: what lies beside it would be read too
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
    arch = layout.architecture
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None and layout.period is None:
        # what is further away would be seen by llama.cpp, which knows no window here
        context = min(window, context)
    full, *local = _ropes(config)
    keys: dict[str, Any] = {
        "general.name": name,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": int(GGML_QUANT_VERSION),
        f"{arch}.context_length": context,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head,
        f"{arch}.attention.value_length": head,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(full["rope_theta"]),
        f"{arch}.rope.dimension_count": head,
        f"{arch}.vocab_size": config.vocab_size,
    }
    if local:
        keys[f"{arch}.rope.freq_base_swa"] = float(local[0]["rope_theta"])
        keys[f"{arch}.attention.sliding_window"] = window
    if licence.id is not None:
        keys["general.license"] = licence.id
        if licence.name:
            keys["general.license.name"] = licence.name
    return keys


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Settings of rotary positions, of full attention first."""
    found: dict[str, Any] = config.rope_parameters
    if "full_attention" in found:
        return [found["full_attention"], found["sliding_attention"]]
    return [found]


def _entries(config: Any, weights: StoredWeights) -> Iterator[_Entry]:
    """All tensors in the order of the file."""
    layout = LAYOUTS[config.model_type]
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }
    names = dict(_TABLES)
    turned: dict[str, int] = {}
    for layer in range(config.num_hidden_layers):
        for part, kind in itertools.product(layout.parts, ("weight", "bias")):
            stored = f"model.layers.{layer}.{part}.{kind}"
            names[stored] = f"blk.{layer}.{layout.parts[part]}.{kind}"
            if layout.turned and part in heads:
                turned[stored] = heads[part]
    wanted = [name for name, _ in empty_model(config).named_parameters()]
    for stored in sorted(wanted, key=list(names).index):
        norms = layout.norms if stored.endswith("norm.weight") else 0.0
        make = functools.partial(_made, weights, stored, turned.get(stored), norms)
        yield _Entry(names[stored], make)
    if _ropes(config)[0].get("rope_type") == "llama3":
        yield _Entry(ROPE_FACTORS, functools.partial(_rope_factors, config))


def _made(weights: StoredWeights, stored: str, heads: int | None, norms: float) -> Tensor:
    """A tensor as it is written: vectors, and what llama.cpp has no numbers for, in fp32."""
    tensor = weights[stored]
    if tensor.ndim == 1 or tensor.dtype == torch.float64:
        tensor = tensor.float()
    if heads is not None:
        tensor = _turned(tensor, heads)
    return tensor + norms if norms else tensor.contiguous()


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


def _add(writer: Any, key: str, value: Any) -> None:
    most = {int: 2**32, float: math.inf}.get(type(value))
    if most is not None and not 0 <= value < most:
        raise UserError(f"--gguf: {key} of {value} cannot be written: give the model's own config")
    add = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }[type(value)]
    add(key, value)


def _write_tensors(writer: Any, entries: list[_Entry]) -> None:
    """All names and shapes first, then one tensor after the other."""
    from gguf import GGMLQuantizationType

    kinds = {
        torch.float32: GGMLQuantizationType.F32,
        torch.float16: GGMLQuantizationType.F16,
        torch.bfloat16: GGMLQuantizationType.BF16,
    }
    for entry in entries:
        tensor = entry.make()
        writer.add_tensor_info(
            entry.name,
            tuple(tensor.shape),
            np.dtype(np.float32),
            tensor.nbytes,
            raw_dtype=kinds[tensor.dtype],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(_bytes(entry.make()))
    writer.close()


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """uint8 [rows, bytes of a row]: numpy has no bf16."""
    return tensor.view(torch.uint8).numpy()


def _compare(path: Path, keys: dict[str, Any], entries: list[_Entry]) -> dict[str, Any]:
    """Reads the file with the library's own reader; OSError where anything differs."""
    from gguf import GGUFReader

    reader: Any = GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for entry in entries:
        wanted = entry.make()
        raw = torch.from_numpy(np.array(found[entry.name].data)).contiguous()
        if not torch.equal(raw.view(torch.uint8).flatten(), wanted.view(torch.uint8).flatten()):
            raise OSError(f"{path}: {entry.name} was not read back as it was written")
    for key, value in keys.items():
        told = reader.get_field(key).contents()
        same = np.float32(value) == np.float32(told) if isinstance(value, float) else told == value
        if not same:
            raise OSError(f"{path}: {key} was not read back as it was written")
    return {"compared_tensors": len(entries), "compared_keys": len(keys)}
