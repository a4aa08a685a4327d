"""A source becomes a folder of token shards with a manifest: built whole or not at all, reused."""

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.artifact import difference, folder_written, only_process, plain
from capgap.corpus.sources import DEFAULT_SEPARATOR, open_source
from capgap.corpus.split import HELDOUT_FRACTION
from capgap.corpus.tokenizer import check_vocabulary, load_tokenizer, tokenizer_hash
from capgap.corpus.tokens import SCHEMA, Corpus, damage, load_corpus, read_manifest
from capgap.corpus.write import Options, Progress, write_corpus
from capgap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

DEFAULT_VOCABULARY = 2048
NEW = "it is new"
SOURCES = ("source", "heldout_source")


def prepare_corpus(
    source: str,
    directory: Path | str,
    *,
    vocabulary: int = DEFAULT_VOCABULARY,
    tokenizer: "PreTrainedTokenizerFast | str | Path | None" = None,
    text_column: str = "text",
    separator: str = DEFAULT_SEPARATOR,
    window: int = 128,
    heldout_source: str | None = None,
    heldout_fraction: float = HELDOUT_FRACTION,
    heldout_tokens: int = 60_000,
    max_bytes: int | None = None,
    max_train_tokens: int | None = None,
    begin_windows: bool = False,
    expected_hash: str | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """Turn text into tokens for training and evaluation, or reuse what lies there unchanged.

    Exact duplicates go first. Then every document belongs to one part by its content alone, and
    adding documents moves none. The folder is written beside its place and renamed, so it is
    never half there; processes that prepare the same one wait for each other.

    Args:
        source: what `open_source` takes.
        directory: the folder to make. A corpus in it is made anew, and a warning says so, where
            its source's files changed, it is damaged, or another version made it.
        vocabulary: tokens of the tokenizer trained on the training part; not used with `tokenizer`.
        tokenizer: one to use instead, such as a teacher's: itself, its folder or its hub name.
        text_column: the column with the text, for JSON lines, parquet and datasets.
        separator: the line that parts documents within a text file.
        window: tokens a training window predicts; another number needs no new preparation.
        heldout_source: text to evaluate on; the source itself is then all for training, save
            documents that this text has too.
        heldout_fraction: share of documents held out otherwise; more of few documents, see
            `split_for`.
        heldout_tokens: upper limit of the tokens to evaluate on.
        max_bytes: take documents from the source until they are so many bytes.
        max_train_tokens: upper limit of training tokens.
        begin_windows: whether every window begins with the token that the tokenizer itself puts
            before a text; without such a token it changes nothing.
        expected_hash: the `corpus_hash` it must have; text that gives another is refused, and
            the corpus that lies there stays.
        replace: whether the corpus of another request gives way too.
        progress: called with ("read" | "tokenize", bytes done, bytes in all or None).

    Raises:
        UserError: unreadable, empty or too small source; impossible options; no disk space; a
            folder of something else or of another request; not the expected text.
    """
    _check(
        heldout_fraction,
        heldout_tokens=heldout_tokens,
        max_bytes=max_bytes,
        max_train_tokens=max_train_tokens,
    )
    if tokenizer is None:
        check_vocabulary(vocabulary)
    opened = open_source(source, text_column=text_column, separator=separator)
    heldout = None
    if heldout_source is not None:
        heldout = open_source(heldout_source, text_column=text_column, separator=separator)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    options = Options(
        vocabulary=vocabulary if tokenizer is None else None,
        tokenizer_hash=None if tokenizer is None else tokenizer_hash(tokenizer),
        heldout_fraction=heldout_fraction,
        heldout_tokens=heldout_tokens,
        max_bytes=max_bytes,
        max_train_tokens=max_train_tokens,
        begin_windows=begin_windows,
    )
    request = {
        "options": asdict(options),
        "source": opened.fingerprint(),
        "heldout_source": None if heldout is None else heldout.fingerprint(),
    }
    directory = Path(directory).expanduser().absolute()
    with only_process(directory):
        reason = _why_prepare(directory, plain(request), replace=replace)
        if reason is not None:
            if reason == NEW:
                logger.info("preparing the corpus in %s: %s", directory, reason)
            else:
                logger.warning("making the corpus in %s anew: %s", directory, reason)
            with folder_written(directory) as partial:
                made = write_corpus(
                    partial,
                    opened,
                    heldout,
                    options,
                    tokenizer=tokenizer,
                    request=request,
                    window=window,
                    progress=progress or (lambda stage, done, total: None),
                )
                if expected_hash not in (None, made):
                    raise UserError(
                        f"the corpus is not the one that was used before ({source}: {reason}; its "
                        f"hash was {expected_hash[:12]}, now {made[:12]}): bring the text back, or "
                        "choose another output folder"
                    )
    return load_corpus(directory, window=window)


def _check(heldout_fraction: float, **limits: int | None) -> None:
    if not 0 < heldout_fraction < 1:
        raise UserError(f"heldout_fraction {heldout_fraction} must lie between 0 and 1")
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise UserError(f"{name} {limit} must be 1 or more")


def _why_prepare(directory: Path, asked: dict[str, Any], *, replace: bool) -> str | None:
    """Why the folder has to be filled (anew), in words; None if what lies there is as asked.

    UserError: it holds something else, or the corpus of another request without `replace`.
    """
    if not directory.exists():
        return NEW
    manifest = read_manifest(directory)
    if manifest is None:
        if not directory.is_dir() or any(directory.iterdir()):
            raise UserError(f"{directory} exists and is no corpus: name another folder for it")
        return NEW
    if manifest.get("schema") != SCHEMA:
        return "it was made by another version"
    had = manifest["request"]
    other = difference(_lasting(had), _lasting(asked))
    if other is not None and not replace:
        raise UserError(
            f"{directory} holds another corpus ({other}): choose another output folder, or delete "
            "this one"
        )
    other = other or _changed_files(asked, had)
    if other is not None:
        return other
    problem = damage(directory, manifest, contents=True)
    return None if problem is None else f"it is damaged: {problem}"


def _lasting(request: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, whatever the text itself holds; paths in one spelling."""
    found = dict(request["options"])
    for role in SOURCES:
        source = request[role] or {}
        name = os.path.normpath(source["name"]) if source else None
        settings = {key: source.get(key) for key in ("text_column", "separator")}
        found[role] = {"name": name, **settings}
    return found


def _changed_files(asked: dict[str, Any], had: dict[str, Any]) -> str | None:
    for role in SOURCES:
        now, before = (
            {path: rest for path, *rest in request[role]["files"]} if request[role] else {}
            for request in (asked, had)
        )
        changed = sorted(path for path in before | now if before.get(path) != now.get(path))
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            return f"the {role.replace('_', ' ')} changed: {changed[0]}{more}"
    return None
