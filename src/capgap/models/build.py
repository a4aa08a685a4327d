"""Hugging Face models: build one of a shape, load, save, add rows for new tokens."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from capgap.corpus.names import at_revision
from capgap.errors import UserError, border
from capgap.models.families import FAMILIES
from capgap.models.parts import Parts
from capgap.models.shape import Shape
from capgap.models.stored import (
    PAPERS,
    RECORDS,
    StoredWeights,
    auto_class,
    copy_companions,
    local_folder,
    needs_own_code,
    read_config,
    skeleton_of,
    write_weights,
    written_beside,
)

if TYPE_CHECKING:
    from capgap.corpus.extend import Extension

# What weights can be loaded as
DTYPES = {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16}
# What most configs call the sizes of a Shape
_SIZE_NAMES = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "ffn": "intermediate_size",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}

# A multiple of rows suits a GPU's products
ROWS = 64


def size_fields(shape: Shape) -> dict[str, Any]:
    """The sizes of a shape under the names that its transformers config gives them."""
    family = shape.family
    names = _SIZE_NAMES | family.size_names
    if not family.grouped_heads:
        del names["kv_heads"]
    if not family.free_width:
        del names["head_size"]
    return {name: getattr(shape, size) for size, name in names.items()}


def to_config(shape: Shape) -> PreTrainedConfig:
    """The transformers config of a shape: no dropout, float32, token 0 as bos, eos and pad.

    Rotary positions turn the whole head: a quarter of it, GPT-NeoX's own default, leaves heads of
    size 16 only two frequencies.
    """
    fields = size_fields(shape) | shape.family.fixed
    fields |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "dtype": "float32"}
    # Gemma 3 and OLMo 3 have others for every kind of layer: those stay
    own = getattr(AutoConfig.for_model(shape.architecture), "rope_parameters", None) or {}
    if not shape.family.learns_positions and "full_attention" not in own:
        rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
        if shape.architecture == "gpt_neox":
            rotary["partial_rotary_factor"] = 1.0
        if shape.architecture == "ministral3":
            # of positions beyond these; a ladder's models have none
            rotary["original_max_position_embeddings"] = shape.positions
            rotary["llama_4_scaling_beta"] = 0.1
        fields["rope_parameters"] = rotary
    if shape.architecture in ("gemma2", "gemma3_text"):
        # attention is scaled by this and not by the head size
        fields["query_pre_attn_scalar"] = shape.head_size
    return AutoConfig.for_model(shape.architecture, **fields)


def shape_of(config: PreTrainedConfig) -> Shape:
    """The shape that a transformers config describes.

    Raises UserError for an architecture or a setting that a Shape cannot describe.
    """
    architecture = config.model_type
    family = FAMILIES.get(architecture)
    if family is None:
        raise UserError(
            f"architecture {architecture!r} is not among {', '.join(FAMILIES)}: docs/families.md "
            "shows how to add one"
        )
    for name, supported in family.settings.items():
        if getattr(config, name) != supported:
            raise UserError(
                f"a {architecture} model with {name}={getattr(config, name)} is not supported: "
                f"only {name}={supported}"
            )
    names = _SIZE_NAMES | family.size_names
    sizes: dict[str, Any] = {size: getattr(config, name, None) for size, name in names.items()}
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    sizes["head_size"] = sizes["head_size"] or sizes["hidden"] // sizes["heads"]
    # GPT-2's way of saying four times the hidden width
    sizes["ffn"] = sizes["ffn"] or 4 * sizes["hidden"]
    return Shape(architecture=architecture, **sizes)


def build_model(shape: Shape, *, seed: int) -> PreTrainedModel:
    """A new model of `shape` on the CPU, in float32, the same for the same seed.

    The random state of the caller is left alone. How the weights are drawn: see `initialise`.
    """
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(to_config(shape), dtype=torch.float32)
    initialise(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def initialise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw all weights of a model anew.

    - matrices: normal, std 0.7 / sqrt(inputs): the scale of outputs does not depend on the width;
    - the two projections that write into the residual stream: that / sqrt(2 layers), so that
      the stream does not grow with depth (as GPT-2 does);
    - tables of tokens and positions, and an untied head: normal, std 0.8 / sqrt(hidden). The
      usual 0.02 drowns the tokens of a narrow model in what its layers add, and cost models of 0.1M
      and 0.4M 0.2 to 0.5 nats after 200 steps;
    - biases 0, norms that change no scale.
    """
    family = FAMILIES[model.config.model_type]
    residual_scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    writes = tuple(f"{name}.weight" for name in (family.head_inputs, family.neuron_inputs))
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0 - family.norm_offset)
        elif id(weight) in tables or name.endswith("wpe.weight"):
            weight.normal_(std=0.8 / math.sqrt(model.config.hidden_size), generator=generator)
        else:
            # GPT-2 stores its matrices [inputs, outputs], the others [outputs, inputs]
            inputs = weight.shape[0 if model.config.model_type == "gpt2" else 1]
            std = 0.7 / math.sqrt(inputs)
            if name.endswith(writes):
                std *= residual_scale
            weight.normal_(std=std, generator=generator)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keeps the inputs of every layer alone; the backward pass computes the rest again."""
    # transformers renamed it, and warns of the old name
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def load_model(
    path_or_name: str | Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model from a folder or, by its name, from the Hugging Face Hub.

    Reads safetensors only. `dtype` None keeps the stored one. `trust_remote_code` runs the
    checkpoint's own code where nothing else describes its architecture; otherwise none is run.
    Raises UserError in one line: nothing there, no network, no safetensors, quantised.
    """
    # first, because it tells a missing network or a wrong name at once
    config = read_config(path_or_name, trust_remote_code=trust_remote_code)
    name = str(path_or_name)
    needs_code = needs_own_code(config.to_dict())
    if not needs_code:
        folder = local_folder(name)
        config, name = read_config(folder), str(folder)
        StoredWeights(folder).check_config(config)
    with border(f"cannot load the model {path_or_name}"):
        kind = AutoModelForCausalLM if needs_code else auto_class(config)
        repository, revision = at_revision(name)
        model, report = kind.from_pretrained(
            repository,
            revision=revision or "main",
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code and needs_code,
            output_loading_info=True,
        )
    # transformers would fill the gaps with random numbers and go on
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"cannot load the model {path_or_name}: its weights lack {missing}")
    if not needs_code:
        Parts(model)  # refuses a model whose logits are not those of its parts
    return model


def save_model(
    model: PreTrainedModel,
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder; `path` never holds half a model, what is there is replaced.

    `weights` stand for the model's own, where those lie in parts on several ranks.
    """
    with written_beside(path) as partial:
        model.save_pretrained(partial, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def extend_model(path_or_name: str | Path, out: Path, extension: "Extension") -> int:
    """Writes a model of one of the families with rows for the new tokens, and their tokenizer, as a
    Hugging Face folder, which appears whole at `out`; returns its rows.

    The row of a new token, of the table and of a head that is not tied to it, is the mean of the
    rows of the old tokens that it is made of, its `origins`. Rows beyond all tokens, up to a
    multiple of 64, are what they were, or the mean of all old tokens'. All other tensors are copied
    as they are stored; one tensor and one file are in memory at a time.

    UserError: no such model, an unknown family, weights that are missing.
    """
    source = local_folder(path_or_name)
    config = copy.deepcopy(read_config(path_or_name))
    shape = shape_of(config)
    tables = {name for name, axes in shape.family.tables.items() if "vocabulary" in axes}
    config.vocab_size = rows = ROWS * math.ceil(max(shape.vocabulary, extension.words) / ROWS)
    weights = StoredWeights(source)

    def make(name: str) -> Tensor:
        weight = weights[name]
        if name not in tables:
            return weight
        return extended_rows(weight, rows, extension.first, extension.origins)

    skeleton = {name: one.to(weights.dtype(name)) for name, one in skeleton_of(config).items()}
    with written_beside(out) as folder:
        config.save_pretrained(folder)
        write_weights(folder, skeleton, make)
        copy_companions(source, folder, (*PAPERS, *RECORDS))
        extension.tokenizer.save_pretrained(folder)
    return rows


def extended_rows(table: Tensor, rows: int, first: int, origins: Sequence[Sequence[int]]) -> Tensor:
    """A table [old rows, width] with `rows` rows: see `extend_model`. Means are taken in fp32."""
    mean = table[:first].float().mean(0)
    longer = table.new_empty(rows, table.shape[1])
    longer[:] = mean.to(table.dtype)
    longer[: len(table)] = table
    for row, origin in enumerate(origins, start=first):
        longer[row] = table[torch.tensor(origin)].float().mean(0).to(table.dtype)
    return longer
