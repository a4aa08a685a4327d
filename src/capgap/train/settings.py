"""From a recipe's [training] to the loop's settings."""

from capgap.config import TrainingSection
from capgap.distill.divergences import Divergence
from capgap.train.loop import LoopSettings
from capgap.train.precision import autocast_dtype


def loop_settings(
    training: TrainingSection,
    *,
    window: int,
    data_seed: int,
    device: str,
    checkpoint_seconds: float,
) -> LoopSettings:
    """Counts in tokens become counts in windows; UserError for a precision the device lacks."""
    micro = training.micro_batch_tokens or training.batch_tokens
    return LoopSettings(
        batch_windows=training.batch_tokens // window,
        micro_batch_windows=micro // window,
        data_seed=data_seed,
        temperature=training.temperature,
        divergence=Divergence(training.divergence, training.divergence_mix),
        warmup_fraction=training.warmup_fraction,
        weight_decay=training.weight_decay,
        decay_embeddings=training.decay_embeddings,
        clip=training.clip,
        document_mask=training.document_mask,
        activation_checkpointing=training.activation_checkpointing,
        autocast_dtype=autocast_dtype(training.precision, device),
        checkpoint_seconds=checkpoint_seconds,
    )
