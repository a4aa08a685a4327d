"""The stage `corpus`: text becomes token shards with a manifest."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar

from capgap.corpus.names import chunks_beside
from capgap.in_order import On
from capgap.section import BeginWindows, Count, TextOptions, TextSource
from capgap.sizes import format_count
from capgap.stage import ARGUMENT, HOW, Mark, Say, Stage, paced


class TextSection(TextOptions):
    """Text in: stdlib, pydoc, a file, a folder, a glob or a Hugging Face dataset."""

    source: Annotated[TextSource, ARGUMENT, Mark.SOURCE]


class Prepare(TextSection, Stage):
    """Turn text into token shards with a manifest; unchanged text is not read twice, and what was
    stopped goes on file by file."""

    command_name: ClassVar[str] = "corpus"
    continues: ClassVar[bool] = False
    saves_when_asked: ClassVar[bool] = False

    out: Annotated[Path, HOW, "Folder for tokenizer, token shards and manifest."]
    vocabulary: Annotated[Count, "Tokens of the tokenizer to train."] = 2048
    tokenizer: Annotated[
        str | None, Mark.MODEL, "Take this tokenizer, a folder or a name on the Hub, instead."
    ] = None
    heldout_source: Annotated[
        str | None, Mark.SOURCE, "Text to hold out; if none, documents of SOURCE are."
    ] = None
    begin_windows: BeginWindows = False
    workers: Annotated[Count, HOW, "Processes that read and tokenize files."] = 1
    on: Annotated[On, HOW, "Read and tokenize files here, or on a Ray cluster:"] = "here"

    @property
    def kept(self) -> Path | None:
        found = chunks_beside(self.out)
        return found if found.exists() else None

    def run(self, *, say: Say = lambda text: None, **_: Any) -> dict[str, Any]:
        """Writes OUT, whole or not at all; returns what `capgap corpus --json` prints."""
        from capgap.corpus.prepare import prepare_corpus

        made = prepare_corpus(
            self.source,
            self.out,
            **self.model_dump(exclude={"source", "out"}),
            progress=corpus_progress(say),
        )
        say(_what_was_read(made.manifest))
        return {
            "folder": str(made.directory),
            "train_tokens": made.train_tokens,
            "vocabulary": made.vocabulary,
            "corpus_hash": made.corpus_hash,
            "tokenizer_hash": made.token_hash,
            "manifest": str(made.directory / "manifest.json"),
        }

    def told(self, found: dict[str, Any]) -> str:
        tokens, words = found["train_tokens"], found["vocabulary"]
        return f"{tokens:,} training tokens, vocabulary {words}, in {self.out}"

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        teacher = self.tokenizer or "TEACHER"
        return ("score", teacher, "--corpus", self.out, "--out", "scores.safetensors")

    def result(self, found: dict[str, Any]) -> str:
        return f"{format_count(found['train_tokens'])} tokens, vocabulary {found['vocabulary']:,}"


def corpus_progress(say: Say) -> Any:
    """Says now and then how far the preparation of a corpus is: for `prepare_corpus`."""
    tell = paced(say)

    def progress(part: str, done: int, total: int | None) -> None:
        of_all = "" if total is None else f" of {total / 1e6:,.0f}"
        tell(lambda: f"corpus, {part}: {done / 1e6:,.0f}{of_all} MB of text")

    return progress


def _what_was_read(manifest: dict[str, Any]) -> str:
    """Documents, files, what was left out, and how much is held out."""
    from capgap.corpus.sources import describe_left_out

    source, heldout, train = (manifest[name] for name in ("source", "heldout", "train"))
    line = f"{manifest['documents']['read']:,} documents"
    files = source.get("files", [])
    if files:
        endings = Counter(f"*{Path(one['path']).suffix}" for one in files)
        kinds = ", ".join(f"{count:,} {ending}" for ending, count in sorted(endings.items()))
        line += f" of {len(files):,} files ({kinds})"
    if source.get("left_out"):
        line += f"; left out: {describe_left_out(source['left_out'])}"
    share = heldout["bytes"] / max(1, heldout["bytes"] + train["bytes"])
    return f"{line}; held out: {heldout['documents']:,} documents, {share:.1%} of the text"
