"""GPUs by name: what their makers' data sheets say. Imports no torch."""

import re
from dataclasses import dataclass

from capgap.errors import UserError

# The share of the peak that training reaches, where nothing else is stated
UTILISATION = 0.4


@dataclass(frozen=True)
class Gpu:
    """flops: dense 16-bit floating-point operations a second; memory in bytes, a GB as 10^9: what
    the chip has above that goes to the driver and to torch's own context."""

    flops: float
    memory: int
    has_bf16: bool = True


GPUS = {
    "V100": Gpu(125e12, 32 * 10**9, has_bf16=False),
    "A100": Gpu(312e12, 80 * 10**9),
    "L40S": Gpu(362e12, 48 * 10**9),
    "H100": Gpu(989e12, 80 * 10**9),
    "H200": Gpu(989e12, 141 * 10**9),
    "B200": Gpu(2250e12, 180 * 10**9),
}


def parse_gpus(text: str, *, where: str = "--gpus") -> tuple[int, str]:
    """ "16xA100" as a number and a kind; UserError for anything else."""
    found = re.fullmatch(r"(?:(\d+)x)?(\w+)", text.strip())
    kind = found[2].upper() if found else ""
    if found is None or kind not in GPUS or int(found[1] or 1) < 1:
        raise UserError(f"{where} {text!r}: give a number and one of {', '.join(GPUS)}: 8xA100")
    return int(found[1] or 1), kind


def check_utilisation(share: float, *, where: str = "--utilisation") -> float:
    """The share itself; UserError where it is not above 0 and at most 1."""
    if not 0 < share <= 1:
        raise UserError(f"{where} {share:g}: give a share above 0 and at most 1, such as 0.4")
    return share


def hours(flops: float, gpus: tuple[int, str], utilisation: float = UTILISATION) -> float:
    """Of so many floating-point operations on these GPUs at that share of their peak."""
    number, kind = gpus
    return flops / (number * GPUS[kind].flops * utilisation) / 3600
