"""Hugging Face models: build one of a shape, load, save, split into backbone and head."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    masking_utils,
)

from capgap.errors import UserError
from capgap.models.families import FAMILIES
from capgap.models.shape import Shape
from capgap.models.stored import StoredWeights, needs_own_code, read_config, written_beside

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


def size_fields(shape: Shape) -> dict[str, Any]:
    """The sizes of a shape under the names that its transformers config gives them."""
    family = shape.family
    names = _SIZE_NAMES | family.size_names
    told = set(names)
    if not family.grouped_heads:
        told.remove("kv_heads")
    if not family.free_width:
        told.remove("head_size")
    return {names[size]: getattr(shape, size) for size in names if size in told}


def to_config(shape: Shape) -> PreTrainedConfig:
    """The transformers config of a shape: no dropout, float32, token 0 as bos, eos and pad.

    Rotary positions turn the whole head: a quarter of it, GPT-NeoX's own default, leaves heads of
    size 16 only two frequencies.
    """
    fields = size_fields(shape) | shape.family.fixed
    fields |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "dtype": "float32"}
    if not shape.family.learns_positions:
        rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
        if shape.architecture == "gpt_neox":
            rotary["partial_rotary_factor"] = 1.0
        fields["rope_parameters"] = rotary
    if shape.architecture == "gemma2":
        # attention is scaled by this and not by the head size
        fields["query_pre_attn_scalar"] = shape.head_size
    return AutoConfig.for_model(shape.architecture, **fields)


def shape_of(config: PreTrainedConfig) -> Shape:
    """The shape that a transformers config describes.

    Raises UserError for an architecture or a setting that a Shape cannot describe.
    """
    architecture = config.model_type
    if architecture not in FAMILIES:
        raise UserError(
            f"architecture {architecture!r} is not among {', '.join(FAMILIES)}: docs/families.md "
            "shows how to add one"
        )
    family = FAMILIES[architecture]
    for name, supported in family.settings.items():
        if getattr(config, name) != supported:
            raise UserError(
                f"a {architecture} model with {name}={getattr(config, name)} is not supported: "
                f"only {name}={supported}"
            )
    names = _SIZE_NAMES | family.size_names
    found: dict[str, Any] = {size: getattr(config, name, None) for size, name in names.items()}
    found["kv_heads"] = found["kv_heads"] or found["heads"]
    found["head_size"] = found["head_size"] or found["hidden"] // found["heads"]
    # GPT-2's way of saying four times the hidden width
    found["ffn"] = found["ffn"] or 4 * found["hidden"]
    return Shape(architecture=architecture, **found)


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

    - matrices: normal, std 0.7 / sqrt(inputs), so that the scale of a layer's output does not
      depend on the width;
    - the two projections that write into the residual stream: that / sqrt(2 layers), so that
      the stream does not grow with depth (as GPT-2 does);
    - tables of tokens and positions, and an untied head: normal, std 0.8 / sqrt(hidden). The
      usual 0.02 drowns the tokens of a narrow model in what its layers add: measured on 0.1M
      models of each architecture and a 0.4M llama it cost 0.2 to 0.5 nats after 200 steps;
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


@contextmanager
def _documents_are_known(several: bool) -> Iterator[None]:
    """transformers would ask the device whether a row holds several documents, and the host would
    wait for the answer in every forward pass: who gave positions, or none, knows it."""
    asked = masking_utils.find_packed_sequence_indices

    def known(position_ids: Tensor) -> Tensor | None:
        """The number of every token's document in its row [batch, seq]."""
        if not several:
            return None
        return (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)

    masking_utils.find_packed_sequence_indices = known
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked


class Parts(nn.Module):
    """A causal language model as backbone and head, and what it does to the head's logits.

    Called with token ids it gives hidden states. logits = softcap * tanh(logit_scale *
    head(hidden) / softcap), without the cap where it is None (Gemma 2 caps, Cohere and Granite
    scale). A module, so that whatever wraps it (FSDP) has all weights at hand in one call.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config = model.config
        # Cohere multiplies by logit_scale, Granite divides by logits_scaling
        scale = getattr(config, "logit_scale", None) or 1.0
        self.logit_scale = float(scale / (getattr(config, "logits_scaling", None) or 1.0))
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # it looks for padding in the tokens, for which the host waits; there is none here
        vars(self.backbone)["warn_if_padding_and_no_attention_mask"] = lambda *_: None

    @property
    def backbone(self) -> nn.Module:
        """Everything below the head."""
        return self.model.base_model

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @property
    def layers(self) -> nn.ModuleList:
        """The backbone's layers, in their order."""
        return next(one for one in self.backbone.modules() if isinstance(one, nn.ModuleList))

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """input_ids [batch, seq] to the states after the final norm [batch, seq, width].

        positions [batch, seq] count from 0 within every document of a packed row; tokens then
        attend within their document alone (transformers sees documents where positions restart).
        """
        with _documents_are_known(positions is not None):
            return self.backbone(
                input_ids=input_ids, position_ids=positions, use_cache=False
            ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., width] to the model's own logits [..., vocabulary]."""
        logits = self.head(hidden) * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


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
    name = str(path_or_name)
    config = read_config(name, trust_remote_code=trust_remote_code)
    if Path(name).is_dir():
        # says which file is missing or cut off
        StoredWeights(Path(name))
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code and needs_own_code(config.to_dict()),
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        # transformers writes long paragraphs; the first line has the cause
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the model {name}: {cause}") from error
    # transformers would fill the gaps with random numbers and go on
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"cannot load the model {name}: its weights lack {missing}")
    return model


def save_model(
    model: PreTrainedModel,
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder; `path` never holds half a model.

    The folder is written beside `path` and then renamed; a folder already at `path` is replaced.
    `weights` stand for the model's own, where those lie in parts on several ranks.
    """
    with written_beside(path) as partial:
        model.save_pretrained(partial, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
