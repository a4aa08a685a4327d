"""The stage `adapt`: a model learns another language or a code base, with pieces of its own for it.

OUT/extended/     tokenizer and model with the new pieces, before training
OUT/corpora/      the new and the old text in the new tokens
OUT/training/     the record and the steps of the training
OUT/model/        the model in the end: a Hugging Face folder with tokenizer
OUT/adapt.json    what was asked for and what came out of it
"""

import json
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from capgap.corpus.given import Weighted
from capgap.errors import UserError
from capgap.machine import started
from capgap.records import write_json_atomically
from capgap.scrub import scrub
from capgap.section import Count, LearningRate, Section
from capgap.sizes import parse_count
from capgap.stage import ARGUMENT, Mark, Say, ShouldStop
from capgap.stages.distill import Train
from capgap.stages.run_folder import begin
from capgap.stages.training import TrainingStage
from capgap.train.recipe import ABOUT_A_TEACHER

if TYPE_CHECKING:
    from capgap.evaluate.measured import Measured

# Text to learn pieces on: so much a piece, within limits that bound the time
SAMPLE_BYTES_PER_PIECE = 8_000
SAMPLE_BYTES = (4_000_000, 64_000_000)
# Held-out text of each kind to measure on
MEASURED_BYTES = 256_000
NEW_SHARE = 0.5
WAIT = 0.5  # seconds


def _tokens(given: Any) -> Any:
    return 0 if str(given).strip() == "0" else parse_count(given)


class _Extension(Section):
    """What the model is to learn with how many new tokens, beside which old text.

    `old` is text of the kind that the model knows: pieces that would change its tokens are not
    taken, and it is trained on along with the new, whose share of the tokens is `new_share` (half
    if None; all without `old`).
    """

    pieces: Annotated[Count, "New tokens, such as 16k."]
    old: Annotated[
        str | None,
        Mark.SOURCE,
        "Text like what the model knows: its tokens stay, and it is trained on too.",
    ] = None
    new_share: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        "The new text's share of the tokens; half beside old text, all without.",
    ] = None

    @model_validator(mode="after")
    def _beside_old(self) -> Self:
        if self.new_share is not None and self.old is None:
            raise ValueError(
                f"new_share {self.new_share:g} is of the new text beside old: give one"
            )
        return self

    @property
    def share(self) -> float:
        """The new text's, of the training tokens."""
        if self.old is None:
            return 1.0
        return NEW_SHARE if self.new_share is None else self.new_share


class AdaptSection(_Extension):
    """The teacher learns the text `source` with `pieces` new tokens, beside `old` text."""

    source: str
    tokens: Count
    learning_rate: LearningRate = "auto"


class Adapt(_Extension, TrainingStage):
    """Teach a model another language or a code base, with new tokens for it."""

    model: Annotated[str, ARGUMENT, Mark.MODEL, "A Hugging Face folder or name."]
    new: Annotated[str, Mark.SOURCE, "Text to learn: as for `capgap corpus`."]
    tokens: Annotated[
        int, BeforeValidator(_tokens), "Training tokens, such as 10M; 0 only extends."
    ]

    @model_validator(mode="after")
    def _can_train(self) -> Self:
        if self.tokens:
            self.continued()
        return self

    def identity(self) -> dict[str, Any]:
        found = super().identity() | {"new_share": self.share}
        for name in ABOUT_A_TEACHER:
            del found["training"][name]
        return found

    def continued(self) -> Train:
        """The continued pre-training."""
        shares = {"new": self.share, "old": 1 - self.share}
        shared = ("tokens", "window", "learning_rate", "seed", "training", "running", "track")
        return Train(
            models=(str(self.out / "extended"),),
            corpus=tuple(Weighted(self.text(part), shares[part]) for part in self.sources),
            out=self.out / "training",
            **{name: getattr(self, name) for name in shared},
        )

    def text(self, part: str) -> Path:
        """Where the new or the old text lies prepared."""
        return self.out / "corpora" / part

    @property
    def sources(self) -> dict[str, str]:
        """The texts by their part."""
        return {"new": self.new} | ({} if self.old is None else {"old": self.old})

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Extends tokenizer and model, trains on, and writes OUT/model; returns adapt.json.

        Started by torchrun, its processes share the training, and the first one does the rest.
        """
        return _run(self, say, should_stop)

    def told(self, found: dict[str, Any]) -> str:
        tokenizer = found["tokenizer"]
        lines = [
            f"{tokenizer['pieces']:,} new tokens, {tokenizer['words']:,} in all, "
            f"{tokenizer['rows']:,} rows; {found['folder']}"
        ]
        for name, told in found["fertility"].items():
            before, after = (told[when]["tokens_per_byte"] for when in ("before", "after"))
            lines.append(
                f"{name} text: {before:.3f} -> {after:.3f} tokens per byte, "
                f"{told['joined_share']:.1%} of the tokens joined"
            )
        for name, losses in found["heldout"].items():
            bits = " -> ".join(
                f"{one['bits_per_byte']:.4f} ({when})" for when, one in losses.items() if one
            )
            lines.append(f"{name} text, bits per byte: {bits}")
        return "\n".join(lines)

    def result(self, found: dict[str, Any]) -> str:
        told = []
        for name, losses in found["heldout"].items():
            bits = [one["bits_per_byte"] for one in losses.values() if one]
            if bits:
                told.append(f"{name} text {bits[0]:.3f} -> {bits[-1]:.3f} bits per byte")
        return "; ".join(told)


def _run(request: Adapt, say: Say, should_stop: ShouldStop) -> dict[str, Any]:
    from capgap.errors import Interrupted

    _check(request)
    if started()[0]:
        return _follow(request, say, should_stop)
    record = begin(request.record_file, request.identity())
    if record["finished"]:
        return record
    run = _Run(request, record, say)
    parts = [
        run.extend,
        run.prepare,
        lambda: run.measure("before", request.model),
        lambda: run.measure("extended", str(run.extended)),
        lambda: run.train(should_stop),
        lambda: run.measure("after", str(run.model)),
    ]
    for part in parts if request.tokens else parts[:4]:
        part()
        if should_stop():
            raise Interrupted
    run.finish()
    return record


def _follow(request: Adapt, say: Say, should_stop: ShouldStop) -> dict[str, Any]:
    """What the other processes do: they wait for the extended model and train with the first."""
    from capgap.errors import Interrupted

    path = request.record_file
    while request.tokens:
        if should_stop():
            raise Interrupted
        record = json.loads(path.read_text()) if path.exists() else {}
        measured = record.get("heldout", {})
        if record.get("asked") == scrub(request.identity()) and _is_measured(
            request, measured, "extended"
        ):
            _Run(request, record, say).train(should_stop)
            return record
        time.sleep(WAIT)
    return {}


def _is_measured(request: Adapt, heldout: dict[str, Any], when: str) -> bool:
    return all(when in heldout.get(name, {}) for name in request.sources)


def _check(request: Adapt) -> None:
    from capgap.corpus.sources import open_source
    from capgap.corpus.tokenizer import load_tokenizer
    from capgap.models.build import shape_of
    from capgap.models.stored import read_config
    from capgap.stages.inputs import check_words
    from capgap.train.trackers import check_trackers

    check_trackers(request.track)
    tokenizer = load_tokenizer(request.model)
    config: Any = read_config(request.model)
    shape = shape_of(config)
    check_words(request.model, config, max(tokenizer.get_vocab().values()) + 1)
    if shape.positions < request.window:
        raise UserError(
            f"{request.model} reads at most {shape.positions} tokens, the window has "
            f"{request.window}: take window {shape.positions} or less"
        )
    for source in request.sources.values():
        open_source(source)


class _Run:
    """One call; every part finds out whether it is done already."""

    def __init__(self, request: Adapt, record: dict[str, Any], say: Say) -> None:
        self.request = request
        self.record = record
        self.say = say
        self.extended = request.out / "extended"
        self.model = request.out / "model"

    def extend(self) -> None:
        """The tokenizer learns pieces, the model gets rows for them."""
        from capgap.corpus.excerpt import training_sample
        from capgap.corpus.extend import extend_tokenizer
        from capgap.corpus.tokenizer import load_tokenizer
        from capgap.models.extend import extend_model
        from capgap.models.identity import model_hash

        if "tokenizer" in self.record:
            return
        request = self.request
        least, most = SAMPLE_BYTES
        num_bytes = min(max(least, request.pieces * SAMPLE_BYTES_PER_PIECE), most)
        texts = {name: training_sample(one, num_bytes) for name, one in request.sources.items()}
        self.say(f"adapt: learns {request.pieces} pieces on {_size(texts['new'])} of new text")
        began = time.monotonic()
        tokenizer = load_tokenizer(request.model)
        extension = extend_tokenizer(
            tokenizer, texts["new"], request.pieces, old=texts.get("old", [])
        )
        rows = extend_model(
            request.model,
            self.extended,
            extension.tokenizer,
            first=extension.first,
            origins=extension.origins,
        )
        self._record(
            model_hash=model_hash(request.model),
            tokenizer={
                "words_before": extension.first,
                "words": extension.words,
                "rows": rows,
                "pieces": len(extension.origins),
                "refused": extension.refused,
                "seconds": time.monotonic() - began,
            },
        )

    def prepare(self) -> None:
        """The texts in the new tokens, and how these differ from the old ones."""
        from capgap.corpus.excerpt import excerpt
        from capgap.corpus.extend import compare_fertility
        from capgap.corpus.prepare import prepare_corpus
        from capgap.corpus.tokenizer import load_tokenizer

        # a run that was killed between its last two steps has no other
        after = load_tokenizer(self.extended if self.extended.exists() else self.model)
        for name, source in self.request.sources.items():
            made = prepare_corpus(
                source, self.request.text(name), tokenizer=after, window=self.request.window
            )
            self.say(f"adapt: {made.train_tokens:,} tokens of {name} text")
        if "fertility" not in self.record:
            before = load_tokenizer(self.request.model)
            texts = {
                name: [text for text, _ in excerpt(str(self.request.text(name)), MEASURED_BYTES)]
                for name in self.request.sources
            }
            self._record(
                fertility={
                    name: compare_fertility(before, after, one) for name, one in texts.items()
                }
            )

    def measure(self, when: str, model: str) -> None:
        """Bits per byte of a model, with its own tokenizer, on the held-out text of each kind."""
        from capgap.stages.measure import MeasureRequest, run_measure

        heldout = self.record.get("heldout", {name: {} for name in self.request.sources})
        if _is_measured(self.request, heldout, when):
            return
        for name in self.request.sources:
            asked = MeasureRequest(
                str(self.request.text(name)),
                MEASURED_BYTES,
                device=self.request.running.device,
            )
            measured = run_measure(asked, {when: model}).models[when]
            heldout[name][when] = _bits(measured)
            self.say(
                f"adapt: {when}: {heldout[name][when]['bits_per_byte']:.4f} bits per byte on "
                f"{name} text"
            )
        self._record(heldout=heldout)

    def train(self, should_stop: ShouldStop) -> None:
        """The extended model learns from the mixture."""
        asked = self.request.continued()
        if self.model.exists():
            return
        found = asked.run(say=self.say, should_stop=should_stop)
        if started()[0]:
            return
        (one,) = found["after"].values()
        if one["failure"]:
            raise UserError(
                f"the training failed ({one['failure']['message']}): take another out and a "
                "smaller learning_rate"
            )
        self._record(
            training={key: found[key] for key in ("steps", "flops", "sources")}
            | {"learning_rate": one["learning_rate"]},
        )
        # moved before the record says so: a call that was killed between finds the model in place
        trained = Path(one["folder"])
        trained.rename(self.model)
        trained.parent.rmdir()
        one["folder"] = str(self.model)
        write_json_atomically(asked.record_file, found)

    def finish(self) -> None:
        """The model in its place, the record, and no model twice."""
        from capgap.machine import machine, resolve_device, versions

        if not self.model.exists():
            self.extended.rename(self.model)
        shutil.rmtree(self.extended, ignore_errors=True)
        for found in self.record["heldout"].values():
            found.setdefault("after", None)
        self._record(
            finished=True,
            folder=str(self.model),
            training=self.record.get("training"),
            versions=versions(),
            machine=machine(resolve_device(self.request.running.device), None),
        )

    def _record(self, **values: Any) -> None:
        self.record |= values
        write_json_atomically(self.request.record_file, self.record)


def _bits(measured: "Measured") -> dict[str, Any]:
    """What models of different tokenizers can be compared by comes first."""
    from capgap.evaluate.measured import ratio_standard_error

    bits = [loss / math.log(2) for loss in measured.document_losses]
    return {
        "bits_per_byte": sum(bits) / measured.bytes,
        "bits_per_byte_stderr": ratio_standard_error(bits, measured.document_bytes),
        "nats_per_token": measured.nats_per_token,
        "tokens": measured.tokens,
        "bytes": measured.bytes,
    }


def _size(texts: list[bytes]) -> str:
    from capgap.sizes import format_bytes

    return format_bytes(sum(map(len, texts)))
