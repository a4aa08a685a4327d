"""A model folder for others: sharded safetensors, tokenizer, generation config, config, licence.
Does it compute what the model does, and would vLLM load it?

What vLLM takes was read in its model registry, `config/model.py` and `v1/attention/backends` of the
versions 0.10 to 0.12: other versions may take more or less.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capgap.artifact import read_json
from capgap.corpus.tokenizer import load_tokenizer
from capgap.errors import UserError
from capgap.export.gguf_file import read_gguf
from capgap.machine import free_memory
from capgap.models.build import load_model, shape_of
from capgap.models.families import FAMILIES
from capgap.models.parts import equal_logits, trial_logits
from capgap.models.shape import Shape
from capgap.models.stored import (
    LICENCES,
    StoredWeights,
    copy_companions,
    local_folder,
    read_config,
    skeleton_of,
    write_weights,
)
from capgap.sizes import format_bytes
from capgap.stage import FieldError, Say, paced

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DTYPES = {"stored": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Whose rotary settings by kind of layer older readers know by two names
_TWO_ROPES = ("gemma3_text", "olmo3")
# What a tokenizer's config may tell of the machine it was saved on
_LOCAL = ("auto_map", "is_local", "local_files_only", "name_or_path")
# FlashAttention takes heads of multiples of 8 up to 256, in half precision; Triton 32 and more
FLASH_MULTIPLE, FLASH_MOST, TRITON_LEAST = 8, 256, 32


@dataclass(frozen=True)
class Source:
    """What is exported: a folder with its config, tokenizer and weights; `shape` None for a model
    of no family. `skeleton` has the tensors as they will be stored, by name, on the meta device."""

    folder: Path
    config: "PreTrainedConfig"
    tokenizer: "PreTrainedTokenizerFast"
    shape: Shape | None
    weights: StoredWeights
    skeleton: dict[str, Tensor]


def open_source(model: str, dtype: torch.dtype | None) -> Source:
    """A folder or a name on the Hub; `dtype` None keeps the stored ones.

    Tensors have the model's names where the files hold all of these, and else the files' own, which
    transformers knows how to read. UserError where weights of a family are missing.
    """
    config = read_config(model)
    shape = shape_of(config) if config.model_type in FAMILIES else None
    folder = local_folder(model)
    tokenizer = load_tokenizer(folder)
    weights = StoredWeights(folder)
    skeleton = skeleton_of(config)
    if shape is None and not all(map(weights.has, skeleton)):
        skeleton = {name: torch.empty(weights.shape(name), device="meta") for name in weights.names}
    skeleton = {name: one.to(dtype or weights.dtype(name)) for name, one in skeleton.items()}
    # most tensors have that of the first table; norms may have been kept in fp32
    config.dtype = next(iter(skeleton.values())).dtype
    return Source(folder, config, tokenizer, shape, weights, skeleton)


def write_folder(source: Source, folder: Path, *, shard_bytes: int, say: Say) -> None:
    """Writes config, weights, tokenizer, generation config and licence into an empty folder.

    UserError with the tensor's name for weights of another shape, or that are not finite.
    """
    tell = paced(say)

    def make(name: str) -> Tensor:
        stored, wanted = source.weights[name], source.skeleton[name]
        where = f"{name} in {source.folder}"
        if stored.shape != wanted.shape:
            shapes = f"has the shape {list(stored.shape)}, its config says {list(wanted.shape)}"
            raise UserError(f"{where} {shapes}: give the model's own config")
        if not torch.isfinite(stored).all():
            why = "holds NaN or infinite weights: this model is broken, train again"
            raise UserError(f"{where} {why}")
        tensor = stored.to(wanted.dtype)
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where} has weights too large for fp16: take bf16")
        return tensor

    def on_tensor(done: int) -> None:
        tell(lambda: f"export: {done} of {len(source.skeleton)} tensors")

    _write_config(source.config, folder)
    write_weights(folder, source.skeleton, make, shard_bytes=shard_bytes, on_tensor=on_tensor)
    copy_companions(source.folder, folder)
    _write_tokenizer(source, folder)
    if not (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(source.tokenizer, name) for name in names}
        GenerationConfig(**ids).save_pretrained(folder)


def check_logits(source: Source, folder: Path, gguf: Path | None) -> str | None:
    """A few tokens go through the model and what was written, one after the other. UserError where
    logits differ by more than the dtype rounds; returns what was not compared for lack of memory.
    """
    count = sum(tensor.numel() for tensor in source.skeleton.values())
    dtype = source.config.dtype
    not_tried = []

    def has_room(what: str, size: int) -> bool:
        needed, free = int(1.2 * size), free_memory()
        if needed > free:
            amounts = f"{format_bytes(needed)} of memory needed, {format_bytes(free)} free"
            not_tried.append(f"{what}: {amounts}")
        return needed <= free

    def computes(model: "PreTrainedModel", wanted: Tensor) -> bool:
        logits = trial_logits(model)
        return logits.shape == wanted.shape and equal_logits(logits, wanted)

    if has_room("the folder", count * dtype.itemsize):
        wanted = trial_logits(load_model(source.folder, dtype))
        if not computes(load_model(folder, dtype), wanted):
            raise UserError(
                "what was written computes other logits than the model: the weights and the config "
                f"of {source.folder} do not fit each other"
            )
    # read in fp32, and once more while it is turned into a model
    if gguf is not None and has_room("the GGUF file", count * 8):
        wanted = trial_logits(load_model(folder, torch.float32))
        if not computes(read_gguf(gguf, read_config(folder)), wanted):
            raise FieldError("gguf", f"{gguf} computes other logits than the model: leave it out")
    return "; ".join(not_tried) or None


def copy_licence(teacher: Path, folder: Path) -> None:
    """The texts that a teacher's licence asks to be passed on, where the student has none."""
    if not any(path for pattern in LICENCES for path in folder.glob(pattern)):
        copy_companions(teacher, folder, LICENCES)


def _write_config(config: "PreTrainedConfig", folder: Path) -> None:
    """config.json of this version of transformers, with the names that older readers look for: to
    them a missing rope_theta would silently be another one."""
    if hasattr(config, "auto_map"):
        del config.auto_map
    config.save_pretrained(folder)
    path = folder / "config.json"
    fields = read_json(path)
    kind, rope = fields["model_type"], fields.get("rope_parameters") or {}
    older: dict[str, Any] = {"torch_dtype": str(config.dtype).removeprefix("torch.")}
    if kind == "gemma3_text":
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if kind in _TWO_ROPES:
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        theta, partial = rope["rope_theta"], rope.get("partial_rotary_factor")
        if kind == "gpt_neox":
            older |= {"rotary_emb_base": theta, "rotary_pct": 1.0 if partial is None else partial}
        else:
            older["rope_theta"] = theta
            if partial is not None:
                older["partial_rotary_factor"] = partial
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    path.write_text(json.dumps(fields | older, indent=2, sort_keys=True) + "\n")


def _write_tokenizer(source: Source, folder: Path) -> None:
    """The class of fast tokenizers under the name that older versions of transformers have too."""
    if not (folder / "tokenizer.json").is_file():
        source.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    own = read_json(path) if path.is_file() else {}
    fields = {key: value for key, value in own.items() if key not in _LOCAL}
    if fields.get("tokenizer_class") in (None, "TokenizersBackend"):
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def check_vllm(shape: Shape | None, dtype: torch.dtype, config: dict[str, Any]) -> dict[str, Any]:
    """{"architecture", "checked": what was looked at, "problems": why vLLM would refuse it}.

    `config` is what config.json holds, vLLM is not run; `shape` None is a model of no family, of
    which nothing is known.
    """
    if shape is None:
        return {"architecture": None, "checked": [], "problems": []}
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, head, classes = shape.architecture, shape.head_size, config.get("architectures")
    # vLLM's registry has all families, under transformers' names
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    precision = str(dtype).removeprefix("torch.")
    is_flash = head % FLASH_MULTIPLE == 0 and head <= FLASH_MOST and dtype != torch.float32
    is_square = shape.hidden == shape.heads * head
    checks = {
        "architectures names a class of vLLM's": classes == [expected]
        or f"architectures is {classes}, vLLM knows {expected}",
        "dtype is one it computes in": dtype in (torch.float32, torch.float16, torch.bfloat16)
        or f"dtype {dtype}",
        "fp16 is allowed for the family": kind != "gemma2"
        or dtype != torch.float16
        or f"vLLM refuses fp16 for {kind}: take bf16",
        "an attention kernel takes the head size": is_flash
        or head >= TRITON_LEAST
        or f"heads of size {head} in {precision}: its kernels take {TRITON_LEAST} or more, or "
        f"multiples of {FLASH_MULTIPLE} in bf16 or fp16",
        "key-value heads divide the heads": shape.heads % shape.kv_heads == 0
        or f"{shape.heads} heads, {shape.kv_heads} key-value heads",
        "heads have the size that vLLM takes": is_square
        or not shape.family.square
        or f"vLLM takes hidden / heads for the head size of {kind}: {shape.hidden} / "
        f"{shape.heads} is not {head}",
        "no code of its own": "auto_map" not in config or "auto_map in config.json",
        "all layers have one shape": True,
    }
    problems = [outcome for outcome in checks.values() if isinstance(outcome, str)]
    return {"architecture": expected, "checked": list(checks), "problems": problems}
