"""How a model is tuned. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on the named linear layers; None: all but the head."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    modules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TuneSettings:
    """How a model is tuned, by whichever loss. `batch` conversations a step, `micro_batch` of them
    at once; the learning rate warms up linearly and falls as a cosine to 0."""

    batch: int
    micro_batch: int
    learning_rate: float
    epochs: int
    warmup_fraction: float
    seed: int
    device: str
    bf16: bool
    activation_checkpointing: bool = False
    lora: Lora | None = None
    checkpoint_seconds: float = 600.0
