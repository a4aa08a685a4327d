"""The tables [training] and [run] of recipes. No torch."""

from typing import Annotated, Literal

from pydantic import Field

from capgap.section import Beta, Count, Fraction, Section

# About what a file of a checkpoint has: it is twice in memory while it is written
FILE_BYTES = 2**30


class TrainingSection(Section):
    """What teachers, students and baselines share; alpha weighs the teacher's part of the loss."""

    batch_tokens: Count = 2048
    micro_batch_tokens: Count | None = None
    alpha: Fraction = 0.5
    temperature: Annotated[float, Field(gt=0)] = 1.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"] = (
        "forward_kl"
    )
    divergence_mix: Annotated[float, Field(gt=0, lt=1)] = 0.5
    warmup_fraction: Fraction = 0.05
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    final_rate: Fraction = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_embeddings: bool = False
    clip: Annotated[float, Field(gt=0)] = 1.0
    document_mask: bool = False
    ignored_tokens: tuple[str, ...] = ()
    activation_checkpointing: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    teacher_dtype: Literal["auto", "stored", "fp32", "bf16"] = "auto"

    def check_batches(self, name: str, window: int) -> None:
        """ValueError for batches that are no whole windows, which the key `name` sets."""
        batch, micro = self.batch_tokens, self.micro_batch_tokens
        if batch % window:
            raise ValueError(f"training.batch_tokens {batch} is not a multiple of {name} {window}")
        if micro is not None and (micro % window or batch % micro):
            raise ValueError(
                f"training.micro_batch_tokens {micro} must be a multiple of {name} {window} and "
                f"divide training.batch_tokens {batch}"
            )

    def check_tokens(self, name: str, tokens: int) -> None:
        """ValueError for fewer tokens than a batch has, which the key `name` sets."""
        if tokens < self.batch_tokens:
            raise ValueError(f"{name} {tokens} is less than one batch of {self.batch_tokens}")


# Keys of [training] that have no meaning without a teacher
ABOUT_A_TEACHER = ("alpha", "temperature", "divergence", "divergence_mix", "teacher_dtype")


class RunSection(Section):
    """How the work is carried out; nothing here changes what is asked for."""

    device: str = "auto"
    teacher_device: str = "same"
    teacher_offload: bool = False
    workers: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 30.0
    checkpoint_share: Annotated[float, Field(gt=0, lt=1)] = 0.02
    checkpoints: Annotated[int, Field(ge=1)] = 2
    compile: Literal["auto", "on", "off"] = "auto"
