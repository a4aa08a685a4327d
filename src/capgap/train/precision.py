"""Which precision trains fastest here without harm."""

import torch

from capgap.errors import UserError


def autocast_dtype(asked: str, device: str) -> torch.dtype | None:
    """bf16 autocast, or None for fp32 throughout.

    `auto` takes bf16 on a GPU that computes in it and on a CPU with AMX tiles. A CPU that only has
    AVX-512 BF16 trains about half as fast in bf16 as in fp32 (docs/benchmarks.md).
    """
    if asked == "fp32":
        return None
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        if asked == "bf16" and not fast:
            raise UserError("training.precision = 'bf16', but this GPU has no bf16: use fp32")
        return torch.bfloat16 if fast else None
    # torch 2.11 has no public question for it
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if asked == "bf16" or capabilities.get("amx_bf16", False):
        return torch.bfloat16
    return None
