"""The model families: what the tensors of each run over. Imports no torch.

A `Family` is all that sizes, parameter counts, importance and cuts know of an architecture. What an
axis of a tensor runs over, as the surgery indexes it:

    hidden      the shared hidden width
    neurons     the FFN neurons of the layer
    gate_up     the gate's rows for all neurons, then the others' (Phi-3)
    query       the rows of all query heads, head by head
    key         the rows of all key (or value) heads, head by head
    head_qkv    head by head the rows of its query, key and value (GPT-NeoX)
    qkv         the rows of all queries, then all keys, then all values (GPT-2, Phi-3)
    head        one head's own width, never cut
    vocabulary  the rows of the vocabulary's table, of which the first stay
    positions   the rows of a table of positions, never cut
"""

from dataclasses import dataclass, field
from typing import Any

HEAD = "lm_head.weight"
Axes = tuple[str, ...]
Tensors = dict[str, Axes]


def _tables(embedding: str) -> Tensors:
    return {f"{embedding}.weight": ("vocabulary", "hidden"), HEAD: ("vocabulary", "hidden")}


def _linear(module: str, outputs: str, inputs: str, *, bias: bool = False) -> Tensors:
    weight: Tensors = {f"{module}.weight": (outputs, inputs)}
    return weight | ({f"{module}.bias": (outputs,)} if bias else {})


def _transposed(module: str, outputs: str, inputs: str) -> Tensors:
    """GPT-2 keeps its matrices as [inputs, outputs]."""
    return {f"{module}.weight": (inputs, outputs), f"{module}.bias": (outputs,)}


def _attention(*, bias: bool = False) -> Tensors:
    return (
        _linear("self_attn.q_proj", "query", "hidden", bias=bias)
        | _linear("self_attn.k_proj", "key", "hidden", bias=bias)
        | _linear("self_attn.v_proj", "key", "hidden", bias=bias)
        | _linear("self_attn.o_proj", "hidden", "query")
    )


def _gated_ffn() -> Tensors:
    return (
        _linear("mlp.gate_proj", "neurons", "hidden")
        | _linear("mlp.up_proj", "neurons", "hidden")
        | _linear("mlp.down_proj", "hidden", "neurons")
    )


@dataclass(frozen=True)
class Family:
    """One architecture, by the model_type of its transformers config; the defaults are Llama's.

    Tensors and modules of a layer are named relative to `layers`.<index>. `tables` are those of
    tokens, of positions, and the head. `layer_norms` and `final_norm` run over the hidden width;
    `head_norms` over all heads together. `head_inputs` and `neuron_inputs` are the modules whose
    inputs are heads and neurons; their outputs are added to the residual stream, or those of the
    `output_norms` behind them.

    grouped_heads: query heads may share key-value heads. free_width: the head size is a field of
    its own, so that the hidden width need not be heads x head_size. square: other software takes
    hidden / heads for the head size all the same (vLLM; transformers in long-context Phi-3).
    size_names: what the config calls a size where it differs from most. settings: of the config,
    with the only values that this declaration is true for. fixed: settings of models that are built
    here. norm_offset: added to a norm's weight. scaled_embedding: token embeddings are multiplied
    by sqrt(hidden).
    """

    architecture: str
    layers: str = "model.layers"
    tables: Tensors = field(default_factory=lambda: _tables("model.embed_tokens"))
    final_norm: str = "model.norm"
    layer_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    attention: Tensors = field(default_factory=_attention)
    ffn: Tensors = field(default_factory=_gated_ffn)
    head_inputs: str = "self_attn.o_proj"
    neuron_inputs: str = "mlp.down_proj"
    output_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    norm_bias: bool = False
    grouped_heads: bool = True
    free_width: bool = True
    square: bool = False
    size_names: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    norm_offset: float = 0.0
    scaled_embedding: bool = False

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The modules of the tables, that of tokens first."""
        return tuple(name.removesuffix(".weight") for name in self.tables if name != HEAD)

    @property
    def learns_positions(self) -> bool:
        """By a table; the others rotate queries and keys."""
        return len(self.embeddings) > 1

    @property
    def writes(self) -> tuple[str, ...]:
        """The modules of a layer whose output is added to the residual stream."""
        return self.output_norms or (self.head_inputs, self.neuron_inputs)

    @property
    def tensors(self) -> Tensors:
        """Those outside of the layers."""
        return self.tables | self.norms(self.final_norm)

    @property
    def layer_tensors(self) -> Tensors:
        """Those of a layer."""
        return self.norms(*self.layer_norms) | self.attention | self.ffn

    def norms(self, *modules: str) -> Tensors:
        names = ("weight", "bias") if self.norm_bias else ("weight",)
        return {f"{module}.{name}": ("hidden",) for module in modules for name in names}


HEAD_NORMS: Tensors = {"self_attn.q_norm.weight": ("head",), "self_attn.k_norm.weight": ("head",)}
_OUTPUT_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
# Norms before and behind attention and FFN
_GEMMA: dict[str, Any] = {
    "layer_norms": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "output_norms": _OUTPUT_NORMS,
    "settings": {"attention_bias": False},
    "norm_offset": 1.0,
    "scaled_embedding": True,
}
# Norms behind attention and FFN alone, and over all heads together
_OLMO: dict[str, Any] = {
    "layer_norms": _OUTPUT_NORMS,
    "attention": _attention()
    | {"self_attn.q_norm.weight": ("query",), "self_attn.k_norm.weight": ("key",)},
    "head_norms": ("self_attn.q_norm", "self_attn.k_norm"),
    "output_norms": _OUTPUT_NORMS,
    "settings": {"attention_bias": False},
    "square": True,
}
_NO_BIASES = {"attention_bias": False, "mlp_bias": False}

_ALL = (
    Family("llama", settings=_NO_BIASES),
    Family("mistral"),
    Family("ministral3"),
    Family("smollm3", settings=_NO_BIASES, square=True),
    Family("granite", settings=_NO_BIASES, free_width=False),
    Family("qwen2", attention=_attention(bias=True), square=True),
    Family("qwen3", attention=_attention() | HEAD_NORMS, settings={"attention_bias": False}),
    Family("gemma2", **_GEMMA),
    Family("gemma3_text", attention=_attention() | HEAD_NORMS, **_GEMMA),
    Family("olmo2", **_OLMO),
    Family("olmo3", **_OLMO),
    Family(
        "phi3",
        square=True,
        attention=_linear("self_attn.qkv_proj", "qkv", "hidden")
        | _linear("self_attn.o_proj", "hidden", "query"),
        ffn=_linear("mlp.gate_up_proj", "gate_up", "hidden")
        | _linear("mlp.down_proj", "hidden", "neurons"),
    ),
    Family(
        "gpt_neox",
        layers="gpt_neox.layers",
        tables=_tables("gpt_neox.embed_in"),
        final_norm="gpt_neox.final_layer_norm",
        attention=_linear("attention.query_key_value", "head_qkv", "hidden", bias=True)
        | _linear("attention.dense", "hidden", "query", bias=True),
        ffn=_linear("mlp.dense_h_to_4h", "neurons", "hidden", bias=True)
        | _linear("mlp.dense_4h_to_h", "hidden", "neurons", bias=True),
        head_inputs="attention.dense",
        neuron_inputs="mlp.dense_4h_to_h",
        norm_bias=True,
        grouped_heads=False,
        free_width=False,
        settings={"attention_bias": True},
    ),
    Family(
        "gpt2",
        layers="transformer.h",
        tables=_tables("transformer.wte") | {"transformer.wpe.weight": ("positions", "hidden")},
        final_norm="transformer.ln_f",
        layer_norms=("ln_1", "ln_2"),
        attention=_transposed("attn.c_attn", "qkv", "hidden")
        | _transposed("attn.c_proj", "hidden", "query"),
        ffn=_transposed("mlp.c_fc", "neurons", "hidden")
        | _transposed("mlp.c_proj", "hidden", "neurons"),
        head_inputs="attn.c_proj",
        neuron_inputs="mlp.c_proj",
        norm_bias=True,
        grouped_heads=False,
        free_width=False,
        size_names={"hidden": "n_embd", "layers": "n_layer", "heads": "n_head", "ffn": "n_inner"}
        | {"positions": "n_positions"},
        settings={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
        fixed={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
)

FAMILIES = {family.architecture: family for family in _ALL}
