"""How fast this device multiplies matrices: what model FLOPs utilisation is a share of."""

import time

import torch

SIDE = {"cpu": 1024, "cuda": 8192}
REPEATS = 6


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of the fastest of a few square products in that dtype."""
    side = SIDE.get(device.type, SIDE["cuda"])
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)
