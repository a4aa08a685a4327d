"""From a recipe's [training] and [run] to the loop's settings."""

from capgap.corpus.text import Text
from capgap.distill.divergences import Divergence
from capgap.errors import UserError
from capgap.train.loop import LoopSettings
from capgap.train.optimizer import Schedule
from capgap.train.precision import autocast_dtype
from capgap.train.recipe import RunSection, TrainingSection


def loop_settings(
    training: TrainingSection,
    run: RunSection,
    corpus: Text,
    *,
    data_seed: int,
    device: str,
    heldout_steps: int | None = None,
) -> LoopSettings:
    """Counts in tokens become counts in windows, tokens become their ids.

    UserError for a precision the device lacks, and for an ignored token that is not one.
    """
    micro = training.micro_batch_tokens or training.batch_tokens
    return LoopSettings(
        batch_windows=training.batch_tokens // corpus.window,
        micro_batch_windows=micro // corpus.window,
        data_seed=data_seed,
        temperature=training.temperature,
        divergence=Divergence(training.divergence, training.divergence_mix),
        schedule=Schedule(
            training.schedule,
            training.warmup_fraction,
            training.decay_fraction,
            training.final_rate,
        ),
        betas=training.betas,
        weight_decay=training.weight_decay,
        decay_embeddings=training.decay_embeddings,
        clip=training.clip,
        document_mask=training.document_mask,
        ignored_labels=_ids(training.ignored_tokens, corpus),
        activation_checkpointing=training.activation_checkpointing,
        autocast_dtype=autocast_dtype(training.precision, device),
        checkpoint_seconds=run.checkpoint_seconds,
        checkpoint_share=run.checkpoint_share,
        checkpoints=run.checkpoints,
        heldout_steps=heldout_steps,
        compile=run.compile,
    )


def _ids(tokens: tuple[str, ...], corpus: Text) -> tuple[int, ...]:
    if not tokens:
        return ()
    words = corpus.tokenizer.get_vocab()
    for token in tokens:
        if token not in words:
            raise UserError(
                f"training.ignored_tokens: {token!r} is no token of the corpus {corpus.directory}"
            )
    return tuple(words[token] for token in tokens)
