"""The stage `measure`: models that stand for choice read the same text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.errors import UserError
from capgap.evaluate.measured import Measured, Measurement
from capgap.stage import paced
from capgap.stages.inputs import check_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from capgap.corpus.excerpt import Passage
    from capgap.corpus.marks import Marks
    from capgap.corpus.tokens import HeldoutDocument

# Tokens of a row, where all models can read so many
WINDOW = 1024
# What a teacher writes for a student to read
WRITTEN, WRITTEN_TOKENS, PROMPT_TOKENS = 16, 128, 32


@dataclass(frozen=True)
class MeasureRequest:
    """On what models are measured, and how; `corpus` as for `capgap.corpus.excerpt.excerpt`.
    `student`: a model that then reads text that each of them writes."""

    corpus: str
    num_bytes: int = 256_000
    dtype: str = "stored"
    device: str = "auto"
    student: str | None = None


def run_measure(
    request: MeasureRequest,
    models: Mapping[str, str],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Every model's loss, entropy and calibration on a sample of the text.

    `models` by name: a Hugging Face folder or a name on the Hub, with its own tokenizer. All read
    the same documents in windows of the same number of tokens. UserError, before any work, for a
    model that is not there, cannot be read, or is smaller than its tokenizer.
    """
    import torch

    from capgap.corpus.excerpt import excerpt, prepared
    from capgap.corpus.marks import Marks
    from capgap.machine import resolve_device
    from capgap.models.build import DTYPES

    if request.dtype not in DTYPES:
        raise UserError(f"--dtype {request.dtype!r}: take one of {', '.join(DTYPES)}")
    device = torch.device(resolve_device(request.device))
    readers = {name: Reader.of(source) for name, source in models.items()}
    student = None if request.student is None else Reader.of(request.student)
    window = min([WINDOW, *(one.positions for one in readers.values() if one.positions)])
    corpus = prepared(request.corpus)
    texts = excerpt(request.corpus, request.num_bytes)
    num_bytes = sum(len(text) for text, _ in texts)
    say(f"measure: {len(texts)} documents, {num_bytes:,} bytes")
    found = {}
    for name, reader in readers.items():
        marks = Marks.of if corpus is None else corpus.marks_for
        found[name] = measured = _measure(
            name, reader, texts, marks(reader.tokenizer), window, request.dtype, device, say
        )
        say(f"measure: {name}: {measured.nats_per_byte:.4f} nats a byte, {measured.seconds:.0f} s")
    ratios = {}
    if student is not None:
        for name, reader in readers.items():
            ratios[name] = _rank_surprisal(reader, student, texts, request.dtype, device)
            say(f"measure: {name}: rank-surprisal ratio {ratios[name]:.2f}")
    return Measurement(request.corpus, window, request.dtype, str(device), found, ratios)


def _rank_surprisal(
    teacher: "Reader", student: "Reader", texts: "Sequence[Passage]", dtype: str, device: Any
) -> float:
    """The student on what the teacher writes after the beginnings of some documents."""
    from capgap.corpus.excerpt import Passage
    from capgap.corpus.marks import Marks
    from capgap.evaluate.losses import heldout_set, measure_model
    from capgap.evaluate.sample import sample_text
    from capgap.models.build import DTYPES, load_model
    from capgap.models.parts import Parts

    positions = min(one.positions or WINDOW for one in (teacher, student))
    prompt = min(PROMPT_TOKENS, positions // 4)
    writer = load_model(teacher.source, dtype=DTYPES[dtype]).to(device).eval()
    written = []
    for seed, (text, _) in enumerate(texts[:WRITTEN]):
        ids = teacher.tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False)
        one = sample_text(
            writer,
            teacher.tokenizer,
            teacher.tokenizer.decode(ids[:prompt]),
            max_new_tokens=min(WRITTEN_TOKENS, positions - prompt - 1),
            temperature=1.0,
            top_p=1.0,
            seed=seed,
        )
        if one.strip():
            written.append(Passage(one.encode(), whole=False))
    if not written:
        raise UserError(f"{teacher.source} writes nothing: leave --student-model away")
    documents, _ = student.documents(written)
    reader = Parts(load_model(student.source, dtype=DTYPES[dtype]).to(device))
    marks = Marks.of(student.tokenizer)
    return measure_model(
        reader, heldout_set(documents, marks, positions, student.words)
    ).rank_surprisal


@dataclass(frozen=True)
class Reader:
    """A model that is known to fit its tokenizer. `words` that this has; `positions` that the model
    reads, None where it sets no limit."""

    source: str
    tokenizer: "PreTrainedTokenizerFast"
    words: int
    positions: int | None

    @classmethod
    def of(cls, source: str, *, trust_remote_code: bool = False) -> "Reader":
        from capgap.corpus.tokenizer import load_tokenizer, num_words
        from capgap.models.stored import StoredWeights, positions_of, read_config

        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        config: Any = read_config(source, trust_remote_code=trust_remote_code)
        if Path(source).is_dir():
            # missing files are told before the first model reads, not after
            StoredWeights(Path(source))
        words = num_words(tokenizer)
        check_words(source, config, words)
        positions = positions_of(config)
        return cls(source, tokenizer, words, positions)

    def documents(self, texts: "Sequence[Passage]") -> "tuple[list[HeldoutDocument], int]":
        """The texts in its tokens, between its marks; and how many of them the tokens do not give
        back."""
        from capgap.corpus.tokenizer import TokenCodec
        from capgap.corpus.tokens import HeldoutDocument

        codec = TokenCodec(self.tokenizer)
        encoded = codec.encode_many([text for text, _ in texts])
        documents = [
            HeldoutDocument(codec.marks.document(ids, whole=whole), len(text))
            for ids, (text, whole) in zip(encoded, texts, strict=True)
        ]
        changed = sum(codec.decode(i) != text for i, (text, _) in zip(encoded, texts, strict=True))
        return documents, changed


def _measure(
    name: str,
    reader: Reader,
    texts: "Sequence[Passage]",
    marks: "Marks",
    window: int,
    dtype: str,
    device: Any,
    say: Callable[[str], None],
) -> Measured:
    from capgap.evaluate.beginning import better_beginning
    from capgap.evaluate.losses import heldout_set, measure_model
    from capgap.models.build import DTYPES, load_model
    from capgap.models.parts import Parts

    documents, changed = reader.documents(texts)
    parts = Parts(load_model(reader.source, dtype=DTYPES[dtype]).to(device))
    better = better_beginning(parts, documents, marks, reader.tokenizer, vocabulary=reader.words)
    if better is not None:
        say(better.warning(name))
    tell = paced(say)
    try:
        return measure_model(
            parts,
            heldout_set(documents, marks, window, reader.words),
            changed_documents=changed,
            on_batch=lambda done, rows: tell(lambda: f"measure: {name}: {done} of {rows} rows"),
        )
    except FloatingPointError as error:
        raise UserError(
            f"{name}: {error} with --dtype {dtype}: try --dtype fp32, or leave it out"
        ) from None
