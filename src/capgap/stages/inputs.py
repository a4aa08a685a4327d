"""What a stage is given by name: checked before any work."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.corpus.tokens import Corpus, load_corpus
from capgap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def open_corpus(folder: Path, window: int) -> Corpus:
    """A prepared corpus; UserError tells how to make one."""
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"{folder} holds no prepared corpus: make one with `capgap corpus SOURCE --out "
            f"{folder} --tokenizer TEACHER`"
        )
    return load_corpus(folder, window=window)


def check_model(path_or_name: str, corpus: Corpus) -> "PreTrainedConfig":
    """The config of a model that can read the corpus.

    UserError: no such model, another tokenizer (the first token that differs), a table with fewer
    rows than the tokenizer has tokens, a context shorter than the window.
    """
    from capgap.corpus.tokenizer import compare_tokenizers, load_tokenizer
    from capgap.models.stored import read_config

    difference = compare_tokenizers(corpus.tokenizer, load_tokenizer(path_or_name))
    if difference is not None:
        raise UserError(
            f"the tokenizer of {path_or_name} is not that of the corpus {corpus.directory}: "
            f"{difference}; prepare the corpus with `--tokenizer {path_or_name}`"
        )
    config: Any = read_config(path_or_name)
    check_words(path_or_name, config, corpus.vocabulary)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < corpus.window:
        raise UserError(
            f"{path_or_name} reads at most {positions} tokens, the window has {corpus.window}: "
            f"take --window {positions} or less"
        )
    return config


def check_words(path_or_name: str, config: Any, words: int) -> None:
    """UserError where a model's table has fewer rows than its tokenizer has words."""
    if config.vocab_size < words:
        raise UserError(
            f"{path_or_name} has {config.vocab_size} tokens, its tokenizer {words}: give a model "
            "with its own tokenizer"
        )
