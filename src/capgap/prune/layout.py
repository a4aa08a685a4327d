"""Where the units of pruning sit in the models of each architecture."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

# What an axis of a tensor runs over, as the surgery indexes it:
#   hidden      the shared hidden width
#   neurons     the FFN neurons of the layer
#   query       the rows of all query heads, head by head
#   key         the rows of all key (or value) heads, head by head
#   head_qkv    head by head the rows of its query, key and value (GPT-NeoX)
#   qkv_head    the rows of all queries, then all keys, then all values (GPT-2)
#   words       the rows of the vocabulary's table, of which the first stay
#   all         never cut
Axes = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Names of modules and the axes of tensors of one architecture.

    Names in `layer_tensors` and the modules of a layer are relative to `layers`.<index>.
    """

    layers: str
    embeddings: tuple[str, ...]
    final_norm: str
    norms: tuple[str, str]
    attention_write: str
    ffn_write: str
    tensors: dict[str, Axes]
    layer_tensors: dict[str, Axes]


def _with_bias(module: str, outputs: str, inputs: str) -> dict[str, Axes]:
    return {f"{module}.weight": (outputs, inputs), f"{module}.bias": (outputs,)}


def _transposed(module: str, outputs: str, inputs: str) -> dict[str, Axes]:
    """GPT-2 keeps its matrices as [inputs, outputs]."""
    return {f"{module}.weight": (inputs, outputs), f"{module}.bias": (outputs,)}


def _layer_norm(module: str) -> dict[str, Axes]:
    return {f"{module}.weight": ("hidden",), f"{module}.bias": ("hidden",)}


LAYOUTS = {
    "llama": Layout(
        layers="model.layers",
        embeddings=("model.embed_tokens",),
        final_norm="model.norm",
        norms=("input_layernorm", "post_attention_layernorm"),
        attention_write="self_attn.o_proj",
        ffn_write="mlp.down_proj",
        tensors={
            "model.embed_tokens.weight": ("words", "hidden"),
            "model.norm.weight": ("hidden",),
            "lm_head.weight": ("words", "hidden"),
        },
        layer_tensors={
            "input_layernorm.weight": ("hidden",),
            "post_attention_layernorm.weight": ("hidden",),
            "self_attn.q_proj.weight": ("query", "hidden"),
            "self_attn.k_proj.weight": ("key", "hidden"),
            "self_attn.v_proj.weight": ("key", "hidden"),
            "self_attn.o_proj.weight": ("hidden", "query"),
            "mlp.gate_proj.weight": ("neurons", "hidden"),
            "mlp.up_proj.weight": ("neurons", "hidden"),
            "mlp.down_proj.weight": ("hidden", "neurons"),
        },
    ),
    "gpt_neox": Layout(
        layers="gpt_neox.layers",
        embeddings=("gpt_neox.embed_in",),
        final_norm="gpt_neox.final_layer_norm",
        norms=("input_layernorm", "post_attention_layernorm"),
        attention_write="attention.dense",
        ffn_write="mlp.dense_4h_to_h",
        tensors={
            "gpt_neox.embed_in.weight": ("words", "hidden"),
            **_layer_norm("gpt_neox.final_layer_norm"),
            "lm_head.weight": ("words", "hidden"),
        },
        layer_tensors={
            **_layer_norm("input_layernorm"),
            **_layer_norm("post_attention_layernorm"),
            **_with_bias("attention.query_key_value", "head_qkv", "hidden"),
            **_with_bias("attention.dense", "hidden", "query"),
            **_with_bias("mlp.dense_h_to_4h", "neurons", "hidden"),
            **_with_bias("mlp.dense_4h_to_h", "hidden", "neurons"),
        },
    ),
    "gpt2": Layout(
        layers="transformer.h",
        embeddings=("transformer.wte", "transformer.wpe"),
        final_norm="transformer.ln_f",
        norms=("ln_1", "ln_2"),
        attention_write="attn.c_proj",
        ffn_write="mlp.c_proj",
        tensors={
            "transformer.wte.weight": ("words", "hidden"),
            "transformer.wpe.weight": ("all", "hidden"),
            **_layer_norm("transformer.ln_f"),
            "lm_head.weight": ("words", "hidden"),
        },
        layer_tensors={
            **_layer_norm("ln_1"),
            **_layer_norm("ln_2"),
            **_transposed("attn.c_attn", "qkv_head", "hidden"),
            **_transposed("attn.c_proj", "hidden", "query"),
            **_transposed("mlp.c_fc", "neurons", "hidden"),
            **_transposed("mlp.c_proj", "hidden", "neurons"),
        },
    ),
}


def layers_of(model: PreTrainedModel, layout: Layout) -> Iterator[tuple[int, nn.Module]]:
    """The layers of a model with their indices."""
    return enumerate(model.get_submodule(layout.layers).children())
