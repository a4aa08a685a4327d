"""A small sample of a text, the same for all who read it. Imports no torch."""

from pathlib import Path
from typing import NamedTuple

from capgap.corpus.sources import open_source
from capgap.corpus.split import HELDOUT_FRACTION, SAMPLE_BYTES, scan, split_for
from capgap.corpus.tokenizer import TokenCodec
from capgap.corpus.tokens import MANIFEST, Corpus, load_corpus
from capgap.corpus.write import cut_text, fair_limit, num_enough
from capgap.errors import UserError

# A source is read so far
READ_BYTES = 1 << 28
# So many documents are taken that this much of each, if it has it, makes up the sample
DOCUMENT_BYTES = 4096


class Passage(NamedTuple):
    """Text of one document from its beginning on; `whole` where it goes on to the end."""

    text: bytes
    whole: bool


def excerpt(source: str, num_bytes: int) -> list[Passage]:
    """Beginnings of documents, about `num_bytes` in all, valid UTF-8.

    Those of the smallest digests come first: what `capgap corpus` holds out of the same text, and
    then what it trains on. Of a folder that it prepared, only the held-out documents are taken.
    UserError: nothing there, no text.
    """
    valid = [
        Passage(text.decode("utf-8", "ignore").encode(), whole)
        for text, whole in _documents(source, num_bytes)
    ]
    passages = [one for one in valid if one.text.strip()]
    if not passages:
        raise UserError(f"{source!r} holds no text to measure on")
    sizes = (min(len(text), DOCUMENT_BYTES) for text, _ in passages)
    passages = passages[: num_enough(sizes, num_bytes)]
    limit = fair_limit([len(text) for text, _ in passages], num_bytes)
    return [
        Passage(cut_text(text, limit), whole and len(text) <= limit) for text, whole in passages
    ]


def training_sample(source: str, num_bytes: int) -> list[bytes]:
    """Documents of a source that `capgap corpus` trains on, not of those it holds out: about
    `num_bytes` of the smallest digests.

    UserError: nothing there, no text, one document alone.
    """
    found = scan(open_source(source), max_bytes=READ_BYTES, sample_bytes=num_bytes)
    if len(found.digests) < 2:
        raise UserError(
            f"{source!r} has {len(found.digests)} documents: 2 or more are needed, one of them to "
            "hold out; a line <|endoftext|> parts those of a text file"
        )
    return found.training_sample(split_for(HELDOUT_FRACTION, found.digests))


def heldout_passages(corpus: Corpus) -> list[Passage]:
    """The text of a corpus's held-out documents, for models with other tokens or marks."""
    codec = TokenCodec(corpus.tokenizer)
    documents = zip(
        corpus.heldout_documents(), corpus.manifest["heldout"]["evaluated"], strict=True
    )
    return [Passage(codec.decode(one.tokens[1:]), entry["whole"]) for one, entry in documents]


def prepared(source: str) -> Corpus | None:
    """What `capgap corpus` made, where the source is its folder."""
    folder = Path(source).expanduser()
    return load_corpus(folder, window=1) if (folder / MANIFEST).is_file() else None


def _documents(source: str, num_bytes: int) -> list[Passage]:
    corpus = prepared(source)
    if corpus is not None:
        return heldout_passages(corpus)
    limit = max(SAMPLE_BYTES, num_bytes)
    found = scan(open_source(source), max_bytes=READ_BYTES, candidate_bytes=limit, sample_bytes=0)
    return [Passage(document, whole=True) for _, document in found.candidates]
