"""The stage `measure`: models that stand for choice read the same text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.errors import UserError
from capgap.evaluate.measured import Measured, Measurement
from capgap.stage import FieldError, Say, paced
from capgap.stages.inputs import check_words

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

    from capgap.corpus.excerpt import Passage
    from capgap.corpus.tokens import HeldoutDocument, Marks
    from capgap.evaluate.losses import HeldoutSet
    from capgap.models.parts import Parts

# Tokens of a row, where all models can read so many
WINDOW = 1024
# What a teacher writes for a student to read
WRITTEN, WRITTEN_TOKENS, PROMPT_TOKENS = 16, 128, 32


@dataclass(frozen=True)
class Reader:
    """A model by its tokenizer, which it is known to fit. `words`: tokens that text can hold;
    `positions` that the model reads, None where it sets no limit."""

    source: str
    tokenizer: "PreTrainedTokenizerFast"
    config: "PreTrainedConfig"
    words: int
    positions: int | None

    @classmethod
    def of(cls, source: str, *, trust_remote_code: bool = False) -> "Reader":
        """UserError for a model that is not there, or is smaller than its tokenizer."""
        from capgap.corpus.tokenizer import load_tokenizer, num_words
        from capgap.models.stored import StoredWeights, positions_of, read_config

        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        config = read_config(source, trust_remote_code=trust_remote_code)
        if Path(source).is_dir():
            # missing files are told before the first model reads, not after
            StoredWeights(Path(source))
        words = num_words(tokenizer)
        check_words(source, config, words)
        return cls(source, tokenizer, config, words, positions_of(config))

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

    def rows(
        self,
        parts: "Parts",
        documents: "Sequence[HeldoutDocument]",
        marks: "Marks",
        window: int,
        name: str,
        say: Say,
    ) -> "HeldoutSet":
        """The documents for the model to read; tells where it reads them much better with another
        beginning."""
        from capgap.evaluate.beginning import better_beginning
        from capgap.evaluate.losses import heldout_set

        read = (parts, documents, marks, self.tokenizer)
        warning = better_beginning(name, *read, vocabulary=self.words)
        if warning is not None:
            say(warning)
        return heldout_set(documents, marks, window, self.words)


def run_measure(
    corpus: str,
    models: Mapping[str, str],
    *,
    num_bytes: int = 256_000,
    dtype: str = "stored",
    device: str = "auto",
    student: str | None = None,
    say: Say = lambda text: None,
) -> Measurement:
    """Every model's loss, entropy and calibration on a sample of the text, `corpus` as for
    `capgap.corpus.excerpt.excerpt`.

    `models` by name: a Hugging Face folder or a name on the Hub, with its own tokenizer. All read
    the same documents in windows of the same number of tokens. `student`: a model that then reads
    text that each of them writes. UserError, before any work, for a model that is not there, cannot
    be read, or is smaller than its tokenizer.
    """
    from capgap.corpus.excerpt import excerpt, prepared
    from capgap.corpus.tokens import Marks
    from capgap.evaluate.losses import heldout_set, measure_model
    from capgap.machine import resolve_device
    from capgap.models.build import DTYPES, load_model
    from capgap.models.parts import Parts

    if dtype not in DTYPES:
        raise FieldError("dtype", f"{dtype!r}: take one of {', '.join(DTYPES)}")
    device = resolve_device(device)
    readers = {name: Reader.of(source) for name, source in models.items()}
    taught = None if student is None else Reader.of(student)
    window = min([WINDOW, *(one.positions for one in readers.values() if one.positions)])
    own = prepared(corpus)
    texts = excerpt(corpus, num_bytes)
    say(f"measure: {len(texts)} documents, {sum(len(text) for text, _ in texts):,} bytes")

    def load(reader: Reader) -> Any:
        return load_model(reader.source, dtype=DTYPES[dtype]).to(device)

    def measure(name: str, reader: Reader) -> Measured:
        marks = (Marks.of if own is None else own.marks_for)(reader.tokenizer)
        documents, changed = reader.documents(texts)
        parts, tell = Parts(load(reader)), paced(say)
        try:
            return measure_model(
                parts,
                reader.rows(parts, documents, marks, window, name, say),
                changed_documents=changed,
                on_batch=lambda done, rows: tell(lambda: f"measure: {name}: {done} of {rows} rows"),
            )
        except FloatingPointError as error:
            raise UserError(
                f"{name}: {error} with `dtype` {dtype}: try `dtype` fp32, or leave it out"
            ) from None

    measured, ratios = {}, {}
    for name, reader in readers.items():
        measured[name] = one = measure(name, reader)
        say(f"measure: {name}: {one.nats_per_byte:.4f} nats a byte, {one.seconds:.0f} s")
    if taught is not None:
        marks = Marks.of(taught.tokenizer)
        for name, reader in readers.items():
            positions = min(one.positions or WINDOW for one in (reader, taught))
            written = _written(load(reader).eval(), reader, texts[:WRITTEN], positions)
            rows = heldout_set(taught.documents(written)[0], marks, positions, taught.words)
            ratios[name] = measure_model(Parts(load(taught)), rows).rank_surprisal
            say(f"measure: {name}: rank-surprisal ratio {ratios[name]:.2f}")
    return Measurement(corpus, window, dtype, device, measured, ratios)


def _written(
    model: Any, reader: Reader, texts: "Sequence[Passage]", positions: int
) -> "list[Passage]":
    """What a model writes after the beginnings of documents."""
    from capgap.corpus.excerpt import Passage
    from capgap.evaluate.sample import sample_text

    prompt = min(PROMPT_TOKENS, positions // 4)
    written = []
    for seed, (text, _) in enumerate(texts):
        ids = reader.tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False)
        sample = sample_text(
            model,
            reader.tokenizer,
            reader.tokenizer.decode(ids[:prompt]),
            max_new_tokens=min(WRITTEN_TOKENS, positions - prompt - 1),
            temperature=1.0,
            top_p=1.0,
            seed=seed,
        )
        written += [Passage(sample.encode(), whole=False)] if sample.strip() else []
    if not written:
        raise UserError(f"{reader.source} writes nothing: leave `student_model` away")
    return written
