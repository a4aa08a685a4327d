"""Which causal language models of the installed transformers capgap reads: all types, at tiny size.

Every type is built with random weights, with unusual values for whatever its config says about
logits, and read as backbone and head. `--write` puts the list into docs/families.md.

    python benchmarks/architectures.py [TYPE ...] [--write]
"""

import argparse
import itertools
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from capgap.errors import UserError
from capgap.models.parts import Parts

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
SECONDS, MOST = 60, 40_000_000
HEADING = "## Architectures that can be read"

WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "dim")
FFNS = (
    "intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff",
    "ffn_hidden_size", "dense_intermediate_size",
)  # fmt: skip
DEPTHS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip
HEADS = (
    "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads",
    "decoder_attention_heads", "mamba_n_heads",
)  # fmt: skip
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
OTHERS = {
    "rotary_dim": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 99, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "lru_width": 64, "sliding_window": 16, "attention_window_size": 16,
    "is_decoder": True, "mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_d_state": 16,
    "mamba_n_groups": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "embedding_size": 64,
    "axial_pos_embds_dim": (16, 48), "axial_pos_shape": (8, 8), "attention_dropout": 0.0,
    "num_mem_blocks": 1, "time_step_rank": 8,
}  # fmt: skip
# Unusual on purpose: what a model does behind its head must show
LOGITS = {"cap": 3.0, "": 0.4}


def sizes(*, layers: int, kv_heads: int, head: int) -> dict[str, Any]:
    """Every name of a size, small."""
    named = dict.fromkeys(WIDTHS, 64) | dict.fromkeys(FFNS, 96) | dict.fromkeys(HEADS, 4)
    named |= dict.fromkeys(DEPTHS, layers) | dict.fromkeys(POSITIONS, 64)
    named |= dict.fromkeys(EXPERTS, 4) | dict.fromkeys(("num_key_value_heads",), kv_heads)
    return named | OTHERS | {"head_dim": head}


def small_config(kind: str, *, logits: bool, **asked: int) -> PreTrainedConfig:
    """A config of the type, small; the parts for pictures and sound too."""
    named = sizes(**asked)

    def fields(config: PreTrainedConfig) -> dict[str, Any]:
        told = config.to_dict()
        names = {*told, *getattr(config, "attribute_map", {})}
        found = {name: value for name, value in named.items() if name in names}
        for name, value in told.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            speaks = ("logit" in name or "lm_head" in name) and name != "num_logits_to_keep"
            if logits and speaks and (is_number or value is None):
                found[name] = LOGITS["cap" if "cap" in name else ""]
        return found

    whole = CONFIG_MAPPING[kind]()
    inner = {
        name: {"model_type": value.model_type} | fields(value)
        for name, value in vars(whole).items()
        if isinstance(value, PreTrainedConfig)
    }
    return CONFIG_MAPPING[kind](**(fields(whole) | inner))


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def built(kind: str) -> Any:
    """A tiny model of the type, by the first way that transformers takes; its error otherwise."""
    problem: Exception | None = None
    ways = itertools.product((True, False), (2, 4, 8), (2, 4, 1), (16, 8, 32))
    for logits, layers, kv_heads, head in ways:
        try:
            config = small_config(kind, logits=logits, layers=layers, kv_heads=kv_heads, head=head)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config)
            count = sum(one.numel() for one in empty.parameters())
            if count > MOST:
                raise ValueError(f"{count / 1e6:.0f}M parameters at tiny size")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float().eval()
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.ndim > 1:
                        weight.normal_(std=0.15)
                model(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]]))
        except TimeoutError:
            raise
        except Exception as error:
            problem = problem or error
            continue
        return model
    assert problem is not None
    raise problem


def reads(kind: str) -> tuple[str, str]:
    """ "equal", "refused" or "not built", and why."""
    try:
        with within(SECONDS):
            model = built(kind)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    ids = torch.tensor([[9, 3, 40, 41, 42, 8, 60, 61, 62, 5], [*range(20, 30)]])
    try:
        with within(SECONDS), torch.no_grad():
            own = model(input_ids=ids).logits.double()
            parts = Parts(model)
            ours = parts.logits(parts(ids)).double()
    except UserError as error:
        return "refused", re.sub(r".*head \((.*)\): docs.*", r"\1", str(error))
    worst = float((own - ours).abs().max() / own.abs().max())
    return ("equal", "") if worst < 1e-4 else ("DIFFERENT", f"by {worst:.2g}")


def as_text(found: dict[str, tuple[str, str]]) -> str:
    """The section of the docs."""
    groups: dict[str, list[str]] = {}
    for kind, (state, _) in found.items():
        groups.setdefault(state, []).append(f"`{kind}`")
    refused = [f"`{kind}` ({why})" for kind, (state, why) in found.items() if state == "refused"]
    return (
        f"{HEADING}\n\nAny causal language model can teach and be evaluated, cached and measured "
        "whose logits are what its backbone and its head give. A few tokens tell, whenever a model "
        "is opened; what differs is refused. With transformers "
        f"{transformers.__version__}, of {len(found)} types, tiny and with random weights "
        "(`python benchmarks/architectures.py --write`):\n\n"
        f"- equal, {len(groups.get('equal', []))}: {', '.join(groups.get('equal', []))}\n"
        f"- refused, {len(refused)}: {', '.join(refused)}\n"
        f"- not built here at tiny size, {len(groups.get('not built', []))}: "
        f"{', '.join(groups.get('not built', []))}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--write", action="store_true", help="put the list into docs/families.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    found = {}
    for kind in arguments.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found[kind] = reads(kind)
        print(kind, *found[kind], flush=True)
    for state in ("equal", "refused", "not built", "DIFFERENT"):
        print(state, sum(one == state for one, _ in found.values()))
    if arguments.write:
        before = DOCS.read_text().partition(f"\n{HEADING}")[0]
        DOCS.write_text(f"{before}\n{as_text(found)}")


if __name__ == "__main__":
    main()
