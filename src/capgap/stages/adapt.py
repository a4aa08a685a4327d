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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.config import StageSettings
from capgap.corpus.given import Given, Weighted
from capgap.errors import UserError
from capgap.machine import started
from capgap.records import write_json_atomically
from capgap.stages.run_folder import begin

if TYPE_CHECKING:
    from capgap.evaluate.measured import Measured
    from capgap.stages.distill import DistillRequest

RECORD = "adapt.json"
# Text to learn pieces on: so much a piece, within limits that bound the time
SAMPLE_BYTES_PER_PIECE = 8_000
SAMPLE_BYTES = (4_000_000, 64_000_000)
# Held-out text of each kind to measure on
MEASURED_BYTES = 256_000
NEW_SHARE = 0.5
WAIT = 0.5  # seconds

Say = Callable[[str], None]


@dataclass(frozen=True)
class AdaptRequest:
    """Which model learns which text; sources are what `capgap corpus` takes.

    `old` is text of the kind that the model knows: pieces that would change its tokens are not
    taken, and it is trained on along with the new, whose share of the tokens is `new_share` (half
    if None; all without `old`). `tokens` 0 extends and measures, and trains nothing.
    """

    model: str
    new: str
    out: Path
    pieces: int
    tokens: int
    old: str | None = None
    new_share: float | None = None
    window: int = 512
    learning_rate: float | None = None
    seed: int = 0
    settings: StageSettings = field(default_factory=StageSettings)
    track: tuple[str, ...] = ()

    def asked(self) -> dict[str, Any]:
        """What a run in the same folder must agree on to be continued."""
        return {
            "model": self.model,
            "new": self.new,
            "old": self.old,
            "pieces": self.pieces,
            "tokens": self.tokens,
            "new_share": self.share,
            "window": self.window,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "training": self.training().asked()["training"],
        }

    @property
    def share(self) -> float:
        """The new text's, of the training tokens."""
        if self.old is None:
            return 1.0
        return NEW_SHARE if self.new_share is None else self.new_share

    def training(self) -> "DistillRequest":
        """The continued pre-training, by the stage that `capgap train` is."""
        from capgap.stages.distill import DistillRequest

        new, old = Weighted(self.text("new"), self.share), self.text("old")
        corpus: Given = (new, Weighted(old, 1 - self.share))
        return DistillRequest(
            None,
            (str(self.out / "extended"),),
            new.folder if self.old is None else corpus,
            self.out / "training",
            self.tokens,
            window=self.window,
            learning_rate=self.learning_rate,
            seed=self.seed,
            settings=self.settings,
            track=self.track,
        )

    def text(self, part: str) -> Path:
        """Where the new or the old text lies prepared."""
        return self.out / "corpora" / part

    @property
    def sources(self) -> dict[str, str]:
        """The texts by their part."""
        return {"new": self.new} | ({} if self.old is None else {"old": self.old})


def run_adapt(
    request: AdaptRequest,
    *,
    say: Say = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Extends tokenizer and model, trains on, and writes OUT/model; returns adapt.json.

    Stopped or killed, the same call goes on where it was; finished, it returns the record. Started
    by torchrun, its processes share the training, and the first one does the rest.
    UserError for the user's mistakes, before any work where they can be known; Interrupted when
    `should_stop` said so.
    """
    from transformers.utils import logging as transformers_logging

    from capgap.train.loop import Interrupted

    transformers_logging.disable_progress_bar()
    _check(request)
    if started()[0]:
        return _follow(request, say, should_stop)
    record = begin(request.out / RECORD, request.asked())
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


def _follow(request: AdaptRequest, say: Say, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """What the other processes do: they wait for the extended model and train with the first."""
    from capgap.train.loop import Interrupted

    path = request.out / RECORD
    while request.tokens:
        if should_stop():
            raise Interrupted
        record = json.loads(path.read_text()) if path.exists() else {}
        measured = record.get("heldout", {})
        if record.get("asked") == request.asked() and _is_measured(request, measured, "extended"):
            _Run(request, record, say).train(should_stop)
            return record
        time.sleep(WAIT)
    return {}


def _is_measured(request: AdaptRequest, heldout: dict[str, Any], when: str) -> bool:
    return all(when in heldout.get(name, {}) for name in request.sources)


def _check(request: AdaptRequest) -> None:
    from capgap.corpus.sources import open_source
    from capgap.corpus.tokenizer import load_tokenizer
    from capgap.models.build import shape_of
    from capgap.models.stored import read_config
    from capgap.stages.distill import check_request
    from capgap.stages.inputs import check_words
    from capgap.train.trackers import check_trackers

    if request.new_share is not None and request.old is None:
        raise UserError(
            f"--new-share {request.new_share:g} is of the new text beside --old: give one"
        )
    if not 0 < request.share < 1 and request.old is not None:
        raise UserError(f"--new-share {request.share:g} must be between 0 and 1")
    if request.pieces < 1:
        raise UserError(f"--pieces {request.pieces} must be 1 or more")
    if request.tokens:
        check_request(request.training())
        check_trackers(request.track)
    tokenizer = load_tokenizer(request.model)
    config: Any = read_config(request.model)
    shape = shape_of(config)
    check_words(request.model, config, max(tokenizer.get_vocab().values()) + 1)
    if shape.positions < request.window:
        raise UserError(
            f"{request.model} reads at most {shape.positions} tokens, the window has "
            f"{request.window}: take --window {shape.positions} or less"
        )
    for source in request.sources.values():
        open_source(source)


class _Run:
    """One call; every part finds out whether it is done already."""

    def __init__(self, request: AdaptRequest, record: dict[str, Any], say: Say) -> None:
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
                device=self.request.settings.run.device,
            )
            measured = run_measure(asked, {when: model}).models[when]
            heldout[name][when] = _bits(measured)
            self.say(
                f"adapt: {when}: {heldout[name][when]['bits_per_byte']:.4f} bits per byte on "
                f"{name} text"
            )
        self._record(heldout=heldout)

    def train(self, should_stop: Callable[[], bool]) -> None:
        """The extended model learns from the mixture."""
        from capgap.stages.distill import run_distill

        asked = self.request.training()
        if self.model.exists():
            return
        found = run_distill(asked, say=self.say, should_stop=should_stop)
        if started()[0]:
            return
        (one,) = found["after"].values()
        if one["failure"]:
            raise UserError(
                f"the training failed ({one['failure']['message']}): take another --out and a "
                "smaller --learning-rate"
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
        write_json_atomically(asked.record, found)

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
            machine=machine(resolve_device(self.request.settings.run.device), None),
        )

    def _record(self, **values: Any) -> None:
        self.record |= values
        write_json_atomically(self.request.out / RECORD, self.record)


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
