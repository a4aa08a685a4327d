"""Hugging Face models: build one of a shape, load, save, split into backbone and head."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from capgap.errors import UserError
from capgap.models.shape import ARCHITECTURES, Shape

# Settings of a transformers config that would give the model other tensors, or other arithmetic,
# than a Shape tells, each with the only value a Shape stands for.
_SUPPORTED_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "gpt_neox": {"attention_bias": True},
    "gpt2": {"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
}
# The matrices whose output is added to the residual stream
_RESIDUAL_WRITES = (
    "o_proj.weight",
    "down_proj.weight",
    "attention.dense.weight",
    "dense_4h_to_h.weight",
    "c_proj.weight",
)


def size_fields(shape: Shape) -> dict[str, Any]:
    """The sizes of a shape under the names that its transformers config gives them."""
    if shape.architecture == "gpt2":
        return {
            "n_embd": shape.hidden,
            "n_layer": shape.layers,
            "n_head": shape.heads,
            "n_inner": shape.ffn,
            "vocab_size": shape.vocabulary,
            "n_positions": shape.positions,
            "tie_word_embeddings": shape.tied,
        }
    fields = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": shape.tied,
    }
    if shape.architecture == "llama":
        fields |= {"num_key_value_heads": shape.kv_heads, "head_dim": shape.head_size}
    return fields


def to_config(shape: Shape) -> PreTrainedConfig:
    """The transformers config of a shape: no dropout, float32, token 0 as bos, eos and pad.

    Rotary positions (llama, gpt_neox) turn the whole head: a quarter of it, GPT-NeoX's own
    default, leaves heads of size 16 only two frequencies.
    """
    fields: dict[str, Any] = size_fields(shape)
    fields |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "dtype": "float32"}
    if shape.architecture == "gpt2":
        return GPT2Config(**fields, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    rotary = {"rope_type": "default", "rope_theta": 10000.0}
    if shape.architecture == "gpt_neox":
        return GPTNeoXConfig(**fields, rope_parameters={**rotary, "partial_rotary_factor": 1.0})
    return LlamaConfig(**fields, rope_parameters=rotary)


def shape_of(config: PreTrainedConfig) -> Shape:
    """The shape that a transformers config describes.

    Raises UserError for an architecture or a setting that a Shape cannot describe.
    """
    architecture = config.model_type
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"architecture {architecture!r} has no shape here: take one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    for name, supported in _SUPPORTED_SETTINGS[architecture].items():
        if getattr(config, name) != supported:
            raise UserError(
                f"a {architecture} model with {name}={getattr(config, name)} is not supported: "
                f"only {name}={supported}"
            )
    hidden, heads = config.hidden_size, config.num_attention_heads
    ffn = (config.n_inner or 4 * hidden) if architecture == "gpt2" else config.intermediate_size
    is_llama = architecture == "llama"
    return Shape(
        architecture=architecture,
        hidden=hidden,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=config.num_key_value_heads if is_llama else heads,
        head_size=config.head_dim if is_llama else hidden // heads,
        ffn=ffn,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
    )


def build_model(shape: Shape, *, seed: int) -> PreTrainedModel:
    """A new model of `shape` on the CPU, in float32, the same for the same seed.

    The random state of the caller is left alone. How the weights are drawn: see `initialise`.
    """
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            to_config(shape), dtype=torch.float32, attn_implementation="sdpa"
        )
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
    - biases 0, norm weights 1.
    """
    residual_scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        elif id(weight) in tables or name.endswith("wpe.weight"):
            weight.normal_(std=0.8 / math.sqrt(model.config.hidden_size), generator=generator)
        else:
            # GPT-2 stores its matrices [inputs, outputs], the others [outputs, inputs]
            inputs = weight.shape[0 if model.config.model_type == "gpt2" else 1]
            std = 0.7 / math.sqrt(inputs)
            if name.endswith(_RESIDUAL_WRITES):
                std *= residual_scale
            weight.normal_(std=std, generator=generator)


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
        return self.backbone(
            input_ids=input_ids, position_ids=positions, use_cache=False
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., width] to the model's own logits [..., vocabulary]."""
        logits = self.head(hidden) * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def load_model(path_or_name: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model from a folder or, by its name, from the Hugging Face Hub.

    Reads safetensors only and runs no code of the checkpoint. `dtype` None keeps the stored one.
    Raises UserError in one line: nothing there, no network, no safetensors, quantised.
    """
    name = str(path_or_name)
    folder = Path(path_or_name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} is no model folder: it has no config.json")
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"{name} holds no *.safetensors weights: convert the model with "
                "save_pretrained and try again"
            )
    elif folder.exists() or folder.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"{name} is no model folder")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"{name} is quantised: give the unquantised model")
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        # transformers writes long paragraphs; the first line has the cause
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = "" if folder.is_dir() else "no such folder, and from the Hugging Face Hub: "
        raise UserError(f"cannot load the model {name}: {where}{cause}") from error
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
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    for leftover in (partial, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial, state_dict=weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    for file in partial.glob("*.safetensors"):
        # safetensors lets nobody but the owner read; the config has what the system gives
        shutil.copymode(partial / "config.json", file)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    if replaced.exists():
        shutil.rmtree(replaced)
