"""What a stage is given by name: checked before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.corpus.names import MANIFEST, Given, Weighted
from capgap.corpus.text import Text
from capgap.errors import UserError
from capgap.section import MAX_EPOCHS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from capgap.models.parallel import Ranks
    from capgap.models.parts import Parts


def open_text(
    given: Given,
    window: int,
    *,
    into: Path | None = None,
    tokenizer: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    **reading: Any,
) -> Text:
    """The text of prepared corpora, as `--corpus` names them; UserError as `Text.open`.

    With a folder `into`, text as `capgap corpus` takes it may stand for a corpus: it is prepared
    there (one of several in a numbered folder beside it) with the tokenizer of the model
    `tokenizer`, or with a new one, and found there later; `reading` and UserError also as
    `prepare_corpus`.
    """
    from capgap.corpus.prepare import prepare_corpus
    from capgap.corpus.sources import check_text
    from capgap.stages.corpus import corpus_progress

    opened = []
    for number, (named, weight) in enumerate(given, 1):
        folder = named
        if into is not None and not (named / MANIFEST).is_file():
            folder = into if len(given) == 1 else into.with_name(f"{into.name}-{number}")
            check_text(named)
            reading |= {"tokenizer": tokenizer, "window": window, "progress": corpus_progress(say)}
            made = prepare_corpus(str(named), folder, **reading)
            whose = "a new tokenizer" if tokenizer is None else f"the tokenizer of {tokenizer}"
            say(f"corpus: {made.train_tokens:,} tokens of {named} by {whose}, in {folder}")
        opened.append(Weighted(folder, weight))
    return Text.open(opened, window)


def warn_of_epochs(text: Text, tokens: int, say: Callable[[str], None]) -> None:
    """Tells which sources are read more often than a sweep would let them be."""
    for source in text.read_of_sources(tokens):
        if source["epochs"] > MAX_EPOCHS:
            say(
                f"warning: {source['name']} is read {source['epochs']:.1f} times, more than "
                f"{MAX_EPOCHS:g}: more text or fewer tokens would serve better"
            )


def warn_of_beginning(
    parts: "Parts",
    corpus: Text,
    name: str,
    say: Callable[[str], None],
    ranks: "Ranks | None" = None,
) -> None:
    """Tells where a model reads the corpus much better with another beginning."""
    from capgap.evaluate.beginning import better_beginning
    from capgap.models.parallel import ALONE

    documents, words = corpus.heldout_documents(), corpus.vocabulary
    read = (parts, documents, corpus.marks, corpus.tokenizer)
    warning = better_beginning(name, *read, vocabulary=words, ranks=ranks or ALONE)
    if warning is not None:
        say(warning)


def check_model(path_or_name: str, corpus: Text) -> None:
    """UserError for a model that cannot read the corpus: no such model, another tokenizer (the
    first token that differs), a table with fewer rows than the tokenizer has tokens, a context
    shorter than the window."""
    from capgap.corpus.tokenizer import compare_tokenizers, load_tokenizer
    from capgap.models.stored import positions_of, read_config

    difference = compare_tokenizers(corpus.tokenizer, load_tokenizer(path_or_name))
    if difference is not None:
        raise UserError(
            f"the tokenizer of {path_or_name} is not that of the corpus {corpus.directory}: "
            f"{difference}; prepare the corpus with `--tokenizer {path_or_name}`"
        )
    config = read_config(path_or_name)
    check_words(path_or_name, config, corpus.vocabulary)
    check_window(path_or_name, positions_of(config), corpus.window)


def check_words(path_or_name: str, config: "PreTrainedConfig", words: int) -> None:
    """UserError where a model's table has fewer rows than its tokenizer has tokens."""
    from capgap.models.stored import text_config

    rows = text_config(config).vocab_size
    if rows < words:
        raise UserError(
            f"{path_or_name} has {rows} tokens, its tokenizer {words}: give a model "
            "with its own tokenizer"
        )


def check_window(path_or_name: str, positions: int | None, window: int) -> None:
    """UserError where a model cannot read a window; positions: how many tokens it can, None for
    any number."""
    if positions is not None and positions < window:
        raise UserError(
            f"{path_or_name} reads at most {positions} tokens, the window has {window}: take "
            f"window {positions} or less"
        )
