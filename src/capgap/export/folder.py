"""A model folder for others: sharded safetensors, tokenizer, generation config, config, licence."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capgap.corpus.tokenizer import load_tokenizer
from capgap.errors import UserError
from capgap.machine import free_memory
from capgap.models.build import load_model, shape_of
from capgap.models.families import FAMILIES
from capgap.models.parts import equal_logits, trial_logits
from capgap.models.shape import Shape
from capgap.models.stored import (
    LICENCES,
    StoredWeights,
    copy_companions,
    empty_model,
    local_folder,
    read_config,
    write_weights,
)
from capgap.sizes import format_bytes
from capgap.stage import FieldError, Say, paced

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

DTYPES = {"stored": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Whose rotary settings by kind of layer older readers know by two names
_TWO_ROPES = ("gemma3_text", "olmo3")
# What a tokenizer's config may tell of the machine it was saved on
_LOCAL = ("auto_map", "is_local", "local_files_only", "name_or_path")


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
    empty = empty_model(config)
    config.architectures = [type(empty).__name__]
    stored = empty.state_dict()
    skeleton = dict(empty.named_parameters())
    skeleton |= {name: one for name, one in empty.named_buffers() if name in stored}
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
    done, tell = 0, paced(say)

    def make(name: str) -> Tensor:
        nonlocal done
        done += 1
        tell(lambda: f"export: {done} of {len(source.skeleton)} tensors")
        return _checked(name, source)

    _write_config(source.config, folder)
    write_weights(folder, source.skeleton, make, shard_bytes=shard_bytes)
    copy_companions(source.folder, folder)
    _settle_tokenizer(source, folder)
    _write_generation(source, folder)


def check_logits(source: Source, folder: Path, gguf: Path | None) -> str | None:
    """Whether what was written computes what the model does: a few tokens go through both, one
    after the other. None where all was compared, else what was not: memory did not suffice.

    UserError where logits differ by more than the dtype rounds.
    """
    count = sum(one.numel() for one in source.skeleton.values())
    dtype = source.config.dtype
    untried = _no_room("the folder", count * dtype.itemsize)
    if not untried:
        wanted = trial_logits(load_model(source.folder, dtype))
        if not _are_equal(trial_logits(load_model(folder, dtype)), wanted):
            raise UserError(
                "what was written computes other logits than the model: the weights and the config "
                f"of {source.folder} do not fit each other"
            )
    if gguf is not None:
        from capgap.export.gguf_file import read_gguf

        # read in fp32, and once more while it is turned into a model
        no_room = _no_room("the GGUF file", count * 8)
        if not no_room:
            wanted = trial_logits(load_model(folder, torch.float32))
            if not _are_equal(trial_logits(read_gguf(gguf, read_config(folder))), wanted):
                raise FieldError(
                    "gguf", f"{gguf} computes other logits than the model: leave it out"
                )
        untried += no_room
    return "; ".join(untried) or None


def _no_room(what: str, size: int) -> list[str]:
    needed, free = int(1.2 * size), free_memory()
    told = f"{what}: {format_bytes(needed)} of memory needed, {format_bytes(free)} free"
    return [told] if needed > free else []


def _are_equal(made: Tensor, wanted: Tensor) -> bool:
    return made.shape == wanted.shape and equal_logits(made, wanted)


def copy_licence(teacher: Path, folder: Path) -> None:
    """The texts that a teacher's licence asks to be passed on, where the student has none."""
    if not any(path for pattern in LICENCES for path in folder.glob(pattern)):
        copy_companions(teacher, folder, LICENCES)


def _checked(name: str, source: Source) -> Tensor:
    stored = source.weights[name]
    wanted = source.skeleton[name]
    where = f"{name} in {source.folder}"
    if stored.shape != wanted.shape:
        raise UserError(
            f"{where} has the shape {list(stored.shape)}, its config says {list(wanted.shape)}: "
            "give the model's own config"
        )
    if not torch.isfinite(stored).all():
        raise UserError(f"{where} holds NaN or infinite weights: this model is broken, train again")
    tensor = stored.to(wanted.dtype)
    if not torch.isfinite(tensor).all():
        raise UserError(f"{where} has weights too large for fp16: take bf16")
    return tensor


def _write_config(config: "PreTrainedConfig", folder: Path) -> None:
    """config.json of this version of transformers, with the names that older readers look for: to
    them a missing rope_theta would silently be another one."""
    if hasattr(config, "auto_map"):
        del config.auto_map
    config.save_pretrained(folder)
    path = folder / "config.json"
    fields: dict[str, Any] = json.loads(path.read_text())
    older: dict[str, Any] = {"torch_dtype": str(config.dtype).removeprefix("torch.")}
    rope: Any = fields.get("rope_parameters")
    if fields["model_type"] == "gemma3_text":
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if fields["model_type"] in _TWO_ROPES:
        rope = rope["full_attention"]
    if rope is not None and "rope_theta" in rope:
        theta, partial = rope.get("rope_theta"), rope.get("partial_rotary_factor")
        if fields["model_type"] == "gpt_neox":
            older |= {"rotary_emb_base": theta, "rotary_pct": 1.0 if partial is None else partial}
        else:
            older |= {"rope_theta": theta}
            if partial is not None:
                older["partial_rotary_factor"] = partial
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    path.write_text(json.dumps(fields | older, indent=2, sort_keys=True) + "\n")


def _settle_tokenizer(source: Source, folder: Path) -> None:
    """The class of fast tokenizers under the name that older versions of transformers have too."""
    if not (folder / "tokenizer.json").is_file():
        source.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) if path.is_file() else {}
    if fields.get("tokenizer_class") in (None, "TokenizersBackend"):
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    fields = {key: value for key, value in fields.items() if key not in _LOCAL}
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def _write_generation(source: Source, folder: Path) -> None:
    """As it was, or with the tokenizer's beginning, end and padding."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return
    tokenizer = source.tokenizer
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
