"""Would vLLM load it? Its config is checked against what vLLM's sources say; vLLM is not run.

Read in vLLM's model registry, `config/model.py` and `v1/attention/backends` of the versions 0.10 to
0.12: other versions may take more or less.
"""

from typing import Any

import torch

from capgap.models.shape import Shape

# model_type -> the class that vLLM's registry has for it
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# vLLM refuses fp16 for it
NO_FP16 = {"gemma2"}
# FlashAttention takes heads of multiples of 8 up to 256, in half precision; Triton 32 and more
FLASH_MULTIPLE, FLASH_MOST, TRITON_LEAST = 8, 256, 32


def check_vllm(shape: Shape | None, dtype: torch.dtype, config: dict[str, Any]) -> dict[str, Any]:
    """{"architecture", "checked": what was looked at, "problems": why vLLM would refuse it}.

    `config` is what config.json holds; `shape` None is a model of no family, of which nothing is
    known.
    """
    if shape is None:
        return {"architecture": None, "checked": [], "problems": []}
    expected = ARCHITECTURES[shape.architecture]
    named = config.get("architectures")
    head = shape.head_size
    by_flash = head % FLASH_MULTIPLE == 0 and head <= FLASH_MOST and dtype != torch.float32
    checks = {
        "architectures names a class of vLLM's": named == [expected]
        or f"architectures is {named}, vLLM knows {expected}",
        "dtype is one it computes in": dtype in (torch.float32, torch.float16, torch.bfloat16)
        or f"dtype {dtype}",
        "fp16 is allowed for the family": not (
            shape.architecture in NO_FP16 and dtype == torch.float16
        )
        or f"vLLM refuses fp16 for {shape.architecture}: take bf16",
        "an attention kernel takes the head size": by_flash
        or head >= TRITON_LEAST
        or f"heads of size {head} in {str(dtype).removeprefix('torch.')}: its kernels take "
        f"{TRITON_LEAST} or more, or multiples of {FLASH_MULTIPLE} in bf16 or fp16",
        "key-value heads divide the heads": shape.heads % shape.kv_heads == 0
        or f"{shape.heads} heads, {shape.kv_heads} key-value heads",
        "heads have the size that vLLM takes": not shape.family.square
        or shape.hidden == shape.heads * head
        or f"vLLM takes hidden / heads for the head size of {shape.architecture}: "
        f"{shape.hidden} / {shape.heads} is not {head}",
        "no code of its own": "auto_map" not in config or "auto_map in config.json",
        "all layers have one shape": True,
    }
    return {
        "architecture": expected,
        "checked": list(checks),
        "problems": [told for told in checks.values() if isinstance(told, str)],
    }
