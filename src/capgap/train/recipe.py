"""The tables [training] and [run] of recipes. No torch."""

from typing import Annotated, Literal

from pydantic import Field

from capgap.distill import DivergenceName
from capgap.section import (
    Beta,
    Count,
    Fraction,
    Positive,
    PositiveFraction,
    ProperFraction,
    Recomputed,
    Section,
)

# About what a file of a checkpoint has: it is twice in memory while it is written
FILE_BYTES = 2**30


class TrainingSection(Section):
    """What teachers, students and baselines share."""

    batch_tokens: Annotated[Count, "Tokens of one optimizer step; a multiple of the window."] = 2048
    micro_batch_tokens: Annotated[
        Count | None, "Tokens in a model at once; all if none. Divides `batch_tokens`."
    ] = None
    alpha: Annotated[
        Fraction,
        "Teacher's weight: loss = (1 - alpha) CE + alpha temperature^2 KL(teacher || student).",
    ] = 0.5
    temperature: Annotated[Positive, "Temperature of the soft term."] = 1.0
    divergence: Annotated[
        DivergenceName,
        "How far the student is from its teacher: the soft term.",
    ] = "forward_kl"
    divergence_mix: Annotated[ProperFraction, "The teacher's share in jsd and skewed_kl."] = 0.5
    warmup_fraction: Annotated[Fraction, "Share of the steps until the peak rate."] = 0.05
    schedule: Annotated[
        Literal["cosine", "wsd"],
        "How the rate falls: along a cosine, or at the end in a straight line (arXiv 2404.06395).",
    ] = "cosine"
    decay_fraction: Annotated[PositiveFraction, "Of wsd: share of steps that it falls in."] = 0.2
    final_rate: Annotated[Fraction, "What the rate falls to, as a share of the peak."] = 0.0
    betas: Annotated[tuple[Beta, Beta], "Betas of AdamW."] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0), "AdamW's, on matrices, not norms and biases."] = 0.1
    decay_embeddings: Annotated[bool, "Whether embeddings decay too."] = False
    clip: Annotated[Positive, "Largest norm of the gradient."] = 1.0
    document_mask: Annotated[bool, "Tokens attend within their own document alone."] = False
    ignored_tokens: Annotated[tuple[str, ...], "Read but never learnt, such as padding."] = ()
    activation_checkpointing: Recomputed = False
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "bf16_gathered"],
        "What models compute in; bf16_gathered (docs/cluster.md) is of several processes alone.",
    ] = "auto"
    teacher_dtype: Annotated[
        Literal["auto", "stored", "fp32", "bf16"], "What a teacher computes in; records tell which."
    ] = "auto"

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

    device: Annotated[str, "cpu, cuda or cuda:1; auto is the GPU where there is one."] = "auto"
    teacher_device: Annotated[str, "Where teachers run; same is where the students are."] = "same"
    teacher_offload: Annotated[bool, "Teachers' layers lie in the host's memory."] = False
    workers: Annotated[
        Literal["auto"] | Annotated[int, Field(gt=0)],
        "Processes; auto is one a core, or one a GPU and more of them as long as that gains.",
    ] = "auto"
    gpus_per_column: Annotated[
        Count, "GPUs of a sweep's machine that share each task (FSDP2); on CPUs, processes."
    ] = 1
    shard_size: Annotated[
        Count | None, "Processes that share one copy of the weights (HSDP); all if none."
    ] = None
    checkpoint_seconds: Annotated[float, Field(ge=0), "Least time between checkpoints."] = 30.0
    checkpoint_share: Annotated[ProperFraction, "Most that checkpoints take of the time."] = 0.02
    lease_seconds: Annotated[
        Positive, "Other processes take over a task whose own is not heard of for so long."
    ] = 60.0
    checkpoints: Annotated[int, Field(ge=1), "Checkpoints of a running task that are kept."] = 2
    compile: Annotated[
        Literal["auto", "on", "off"],
        "torch.compile for layers, and on a GPU the loss; auto keeps the faster of both.",
    ] = "auto"
