"""A model folder as one GGUF file for llama.cpp, written tensor by tensor, read back and compared.

Keys and names of tensors follow the GGUF specification and llama.cpp's own converter.
"""

import functools
import io
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capgap.corpus.tokenizer import load_tokenizer
from capgap.errors import border
from capgap.export.gguf_tokenizer import missing_splits, refusal, tokenizer_keys
from capgap.export.licence import Licence
from capgap.models.stored import StoredWeights, empty_model, read_config
from capgap.stage import FieldError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# Settings that GGUF has no key for, with the only values that llama.cpp means
_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}
_GEMMA_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
}
# By what the rotary frequencies of Llama 3.1 are divided, one number a pair
ROPE_FACTORS = "rope_freqs.weight"
# GGUF's number for a file whose matrices are of a dtype
_FILE_TYPES = {torch.float64: 0, torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
# What makes each tensor as it is written, by its name in the file
_Tensors = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class _Layout:
    """How llama.cpp holds a family. `turned`: rows of queries' and keys' heads have their halves in
    turns; `norms` is added to the weights of norms; every `period`th layer sees all of the text."""

    architecture: str
    settings: Mapping[str, tuple[Any, ...]]
    turned: bool = False
    norms: float = 0.0
    period: int | None = None


LAYOUTS = {
    "llama": _Layout("llama", _SETTINGS, turned=True),
    "mistral": _Layout("llama", _SETTINGS, turned=True),
    "qwen2": _Layout("qwen2", _SETTINGS),
    "qwen3": _Layout("qwen3", _SETTINGS),
    "gemma3_text": _Layout("gemma3", _GEMMA_SETTINGS, norms=1.0, period=6),
}


def check_gguf(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerFast") -> None:
    """FieldError for a model that cannot be a GGUF file, before any work."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        why = "needs the gguf library: `pip install 'capgap[gguf]'`"
        raise FieldError("gguf", why) from None
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        known = ", ".join(LAYOUTS)
        raise FieldError(
            "gguf", f"writes {known} models, and this is a {config.model_type}: leave it out"
        )
    for name, allowed in layout.settings.items():
        value = getattr(config, name, None)
        if name in config.to_dict() and value not in allowed:
            raise refusal(f"{name}={value}, for which a file of this family has no key")
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if kind != "default" and not (kind == "llama3" and layout.turned):
            raise refusal(f"rotary positions of type {kind!r}")
    if layout.period is not None:
        _check_gemma(config, layout.period)
    tokenizer_keys(tokenizer, config.vocab_size)


def _check_gemma(config: Any, period: int) -> None:
    """llama.cpp knows the order of Gemma's layers and the scale of its scores by itself."""
    kinds, head = config.layer_types, config.head_dim
    layers = [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"]
    if layers != list(range(period, len(kinds) + 1, period)):
        raise refusal(
            f"full attention in layers {', '.join(map(str, layers)) or 'none'} of {len(kinds)}, "
            f"for llama.cpp takes every {period}th (cut without removing layers)"
        )
    if config.query_pre_attn_scalar != head:
        raise refusal(
            f"query_pre_attn_scalar={config.query_pre_attn_scalar}, for llama.cpp takes the head "
            f"size, {head}"
        )


def write_gguf(folder: Path, path: Path, *, name: str, licence: Licence) -> dict[str, Any]:
    """Writes the model in `folder` to `path` and compares what is read back with it.

    Matrices keep their dtype, vectors are fp32, as llama.cpp wants them. Returns what the command
    tells. FieldError as `check_gguf`, and OSError where what was read back differs.
    """
    from gguf import GGUFWriter

    config: Any = read_config(folder)
    tokenizer = load_tokenizer(folder)
    check_gguf(config, tokenizer)
    architecture = LAYOUTS[config.model_type].architecture
    weights = StoredWeights(folder)
    tensors = _tensors(config, weights)
    keys = _keys(config, weights.dtype("model.embed_tokens.weight"), name, licence)
    keys |= tokenizer_keys(tokenizer, config.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer: Any = GGUFWriter(aside, architecture)
        for key, value in keys.items():
            _add(writer, key, value)
        _write_tensors(writer, tensors)
        _compare(aside, keys, tensors)
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
        "compared_tensors": len(tensors),
        "compared_keys": len(keys),
    }


def read_gguf(path: Path, config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model in a file by transformers' own reader, in fp32; sizes and rotary positions are
    those of `config`, of which the reader leaves some out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.model_type == "mistral":
        kind = LAYOUTS[config.model_type].architecture
        config = AutoConfig.for_model(**config.to_dict() | {"model_type": kind})
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
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
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
    found: dict[str, Any] = config.rope_parameters
    if "full_attention" in found:
        return [found["full_attention"], found["sliding_attention"]]
    return [found]


def _tensors(config: Any, weights: StoredWeights) -> _Tensors:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    layout = LAYOUTS[config.model_type]
    (kind,) = (one for one, name in MODEL_ARCH_NAMES.items() if name == layout.architecture)
    names: Any = get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors: _Tensors = {}
    for stored, _ in empty_model(config).named_parameters():
        turned = heads.get(stored.split(".")[-2]) if layout.turned else None
        norms = layout.norms if stored.endswith("norm.weight") else 0.0
        name = names.get_name(stored, (".weight", ".bias"))
        tensors[name] = functools.partial(_made, weights, stored, turned, norms)
    if _ropes(config)[0].get("rope_type") == "llama3":
        tensors[ROPE_FACTORS] = functools.partial(_rope_factors, config)
    return tensors


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
        raise refusal(f"{key} of {value} (give the model's own config)")
    add = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }[type(value)]
    add(key, value)


def _write_tensors(writer: Any, tensors: _Tensors) -> None:
    """All names and shapes first, then one tensor after the other."""
    from gguf import GGMLQuantizationType

    kinds = {
        torch.float32: GGMLQuantizationType.F32,
        torch.float16: GGMLQuantizationType.F16,
        torch.bfloat16: GGMLQuantizationType.BF16,
    }
    for name, make in tensors.items():
        tensor = make()
        data, kind = _bytes(tensor), kinds[tensor.dtype]
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


def _compare(path: Path, keys: dict[str, Any], tensors: _Tensors) -> None:
    """Reads the file with the library's own reader; OSError where anything differs."""
    from gguf import GGUFReader

    reader: Any = GGUFReader(path)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, make in tensors.items():
        wanted = make().view(torch.uint8).numpy()
        if not np.array_equal(found[name].view(np.uint8).ravel(), wanted.ravel()):
            raise OSError(f"{path}: {name} was not read back as it was written")
    for key, value in keys.items():
        told = reader.get_field(key).contents()
        if told != (np.float32(value) if isinstance(value, float) else value):
            raise OSError(f"{path}: {key} was not read back as it was written")
