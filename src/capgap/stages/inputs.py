"""What a stage is given by name: checked before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.config import CorpusSection
from capgap.corpus.given import Given
from capgap.corpus.mixture import Mixture, TrainingText, mix, source_epochs
from capgap.corpus.tokens import Corpus, load_corpus
from capgap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from capgap.models.parallel import Ranks
    from capgap.models.parts import Parts


def open_corpus(folder: Path, window: int) -> Corpus:
    """A prepared corpus; UserError tells how to make one."""
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"{folder} holds no prepared corpus: make one with `capgap corpus SOURCE --out "
            f"{folder} --tokenizer TEACHER`"
        )
    return load_corpus(folder, window=window)


def open_text(given: Given, window: int) -> TrainingText:
    """One prepared corpus, or several as a mixture; UserError as `open_corpus` and `mix`."""
    if isinstance(given, Path):
        return open_corpus(given, window)
    sources = [open_corpus(one.folder, window) for one in given]
    if len(sources) == 1:
        return sources[0]
    # all weigh the same where none has a weight
    return mix(sources, [one.weight or 1.0 for one in given])


def text_identity(text: TrainingText) -> dict[str, Any]:
    """Which text it is: what a run that continues must agree on."""
    shares = list(text.shares) if isinstance(text, Mixture) else None
    return {"corpus_hash": text.corpus_hash, "shares": shares}


def sources_read(text: TrainingText, tokens: int) -> list[dict[str, Any]]:
    """What so many training tokens read of every source, for a record."""
    epochs = source_epochs(text, tokens)
    return [
        {
            "name": name,
            "folder": str(source.directory),
            "corpus_hash": source.corpus_hash,
            "share": share,
            "train_tokens": source.train_tokens,
            "epochs": epochs[name],
        }
        for name, source, share in zip(text.names, text.sources, text.shares, strict=True)
    ]


def warn_of_epochs(text: TrainingText, tokens: int, say: Callable[[str], None]) -> None:
    """Tells which sources are read more often than a sweep would let them be."""
    most = CorpusSection().max_epochs
    for name, epochs in source_epochs(text, tokens).items():
        if epochs > most:
            say(
                f"warning: {name} is read {epochs:.1f} times, more than {most:g}: more text or "
                "fewer tokens would serve better"
            )


def warn_of_beginning(
    parts: "Parts",
    corpus: TrainingText,
    name: str,
    say: Callable[[str], None],
    ranks: "Ranks | None" = None,
) -> None:
    """Tells where a model reads the corpus much better with another beginning."""
    from capgap.evaluate.beginning import better_beginning
    from capgap.models.parallel import ALONE

    found = better_beginning(
        parts,
        corpus.heldout_documents(),
        corpus.marks,
        corpus.tokenizer,
        vocabulary=corpus.vocabulary,
        ranks=ranks or ALONE,
    )
    if found is not None:
        say(found.warning(name))


def check_model(path_or_name: str, corpus: TrainingText) -> "PreTrainedConfig":
    """The config of a model that can read the corpus.

    UserError: no such model, another tokenizer (the first token that differs), a table with fewer
    rows than the tokenizer has tokens, a context shorter than the window.
    """
    from capgap.corpus.tokenizer import compare_tokenizers, load_tokenizer
    from capgap.models.stored import positions_of, read_config

    difference = compare_tokenizers(corpus.tokenizer, load_tokenizer(path_or_name))
    if difference is not None:
        raise UserError(
            f"the tokenizer of {path_or_name} is not that of the corpus {corpus.directory}: "
            f"{difference}; prepare the corpus with `--tokenizer {path_or_name}`"
        )
    config: Any = read_config(path_or_name)
    check_words(path_or_name, config, corpus.vocabulary)
    positions = positions_of(config)
    if positions is not None and positions < corpus.window:
        raise UserError(
            f"{path_or_name} reads at most {positions} tokens, the window has {corpus.window}: "
            f"take --window {positions} or less"
        )
    return config


def check_words(path_or_name: str, config: Any, words: int) -> None:
    """UserError where a model's table has fewer rows than its tokenizer has words."""
    from capgap.models.stored import text_config

    rows = text_config(config).vocab_size
    if rows < words:
        raise UserError(
            f"{path_or_name} has {rows} tokens, its tokenizer {words}: give a model "
            "with its own tokenizer"
        )
