"""The stage `adapt`: a model learns another language or a code base, with pieces of its own for it.

OUT/extended/     tokenizer and model with the new pieces, before training
OUT/corpora/      the new and the old text in the new tokens
OUT/training/     the record and the steps of the training
OUT/model/        the model in the end: a Hugging Face folder with tokenizer
OUT/adapt.json    what was asked for and what came out of it
"""

import shutil
import time
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from capgap.artifact import begun, read_json, write_json
from capgap.corpus.names import Weighted
from capgap.errors import Interrupted, UserError
from capgap.machine import machine, resolve_device, started, versions
from capgap.scrub import scrub
from capgap.section import Count, LearningRate, ProperFraction, TextOptions
from capgap.sizes import format_bytes, parse_count
from capgap.stage import ARGUMENT, Mark, Say, ShouldStop
from capgap.stages.distill import Tokens, Train, TrainingStage
from capgap.train.recipe import ABOUT_A_TEACHER

# Text to learn pieces on: so much a piece, within limits that bound the time
SAMPLE_BYTES_PER_PIECE = 8_000
SAMPLE_BYTES = (4_000_000, 64_000_000)
# Held-out text of each kind to measure on
MEASURED_BYTES = 256_000
NEW_SHARE = 0.5
WAIT = 0.5  # seconds


def _tokens(given: Any) -> Any:
    return 0 if str(given).strip() == "0" else parse_count(given)


class _Extension(TextOptions):
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
        ProperFraction | None,
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
        """The new text's share of the training tokens."""
        return 1.0 if self.old is None else self.new_share or NEW_SHARE


class AdaptSection(_Extension):
    """The teacher learns the text `source` with `pieces` new tokens, beside `old` text."""

    source: Annotated[str, "The new text, as `capgap corpus` takes it."]
    tokens: Tokens
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
        identity = super().identity() | {"new_share": self.share}
        for name in ABOUT_A_TEACHER:
            del identity["training"][name]
        return identity

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
        _check(self)
        if started()[0]:
            return _follow(self, say, should_stop)
        with begun(self.record_file, self.identity()) as record:
            if record["finished"]:
                return record
            run = _Run(self, record, say)
            parts = [
                run.extend,
                run.prepare,
                lambda: run.measure("before", self.model),
                lambda: run.measure("extended", str(run.extended)),
                lambda: run.train(should_stop),
                lambda: run.measure("after", str(run.model)),
            ]
            for part in parts if self.tokens else parts[:4]:
                part()
                if should_stop():
                    raise Interrupted
            run.finish()
            return record

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        asked = ("--tokenizer", found["folder"], "--out", "corpus")
        return ("corpus", self.new, *asked)

    def told(self, found: dict[str, Any]) -> str:
        tokenizer = found["tokenizer"]
        lines = [
            f"{tokenizer['pieces']:,} new tokens, {tokenizer['words']:,} in all, "
            f"{tokenizer['rows']:,} rows; {found['folder']}"
        ]
        for name, fertility in found["fertility"].items():
            before, after = (fertility[when]["tokens_per_byte"] for when in ("before", "after"))
            lines.append(
                f"{name} text: {before:.3f} -> {after:.3f} tokens per byte, "
                f"{fertility['joined_share']:.1%} of the tokens joined"
            )
        for name, losses in found["heldout"].items():
            bits = " -> ".join(
                f"{one['bits_per_byte']:.4f} ({when})" for when, one in losses.items() if one
            )
            lines.append(f"{name} text, bits per byte: {bits}")
        return "\n".join(lines)

    def result(self, found: dict[str, Any]) -> str:
        bits = {
            name: [one["bits_per_byte"] for one in losses.values() if one]
            for name, losses in found["heldout"].items()
        }
        return "; ".join(
            f"{name} text {one[0]:.3f} -> {one[-1]:.3f} bits per byte"
            for name, one in bits.items()
            if one
        )


def _check(request: Adapt) -> None:
    from capgap.corpus.sources import open_source
    from capgap.models.build import shape_of
    from capgap.stages.inputs import check_window
    from capgap.stages.measure import Reader
    from capgap.train.trackers import check_trackers

    check_trackers(request.track)
    config = Reader.of(request.model).config
    check_window(request.model, shape_of(config).positions, request.window)
    for source in request.sources.values():
        open_source(source, text_column=request.text_column, separator=request.separator)


def _follow(request: Adapt, say: Say, should_stop: ShouldStop) -> dict[str, Any]:
    """The other processes wait for the extended model and train with the first."""
    path = request.record_file
    while request.tokens:
        if should_stop():
            raise Interrupted
        record = read_json(path) if path.exists() else {}
        run = _Run(request, record, say)
        if record.get("asked") == scrub(request.identity()) and run.is_measured("extended"):
            run.train(should_stop)
            return record
        time.sleep(WAIT)
    return {}


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
        from capgap.models.build import extend_model
        from capgap.models.identity import model_hash

        if "tokenizer" in self.record:
            return
        source, pieces = self.request.model, self.request.pieces
        least, most = SAMPLE_BYTES
        num_bytes = min(max(least, pieces * SAMPLE_BYTES_PER_PIECE), most)
        texts = {
            name: training_sample(one, num_bytes, **self.request.reading)
            for name, one in self.request.sources.items()
        }
        size = format_bytes(sum(map(len, texts["new"])))
        self.say(f"adapt: learns {pieces} pieces on {size} of new text")
        began = time.monotonic()
        old = texts.get("old", [])
        extension = extend_tokenizer(load_tokenizer(source), texts["new"], pieces, old=old)
        rows = extend_model(source, self.extended, extension)
        self._record(
            model_hash=model_hash(source),
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

        request = self.request
        # a run that was killed between its last two steps has no other
        after = load_tokenizer(self.extended if self.extended.exists() else self.model)
        for name, source in request.sources.items():
            how = {"tokenizer": after, "window": request.window, **request.reading}
            made = prepare_corpus(source, request.text(name), **how)
            self.say(f"adapt: {made.train_tokens:,} tokens of {name} text")
        if "fertility" not in self.record:
            before = load_tokenizer(request.model)
            fertility = {}
            for name in request.sources:
                texts = [text for text, _ in excerpt(str(request.text(name)), MEASURED_BYTES)]
                fertility[name] = compare_fertility(before, after, texts)
            self._record(fertility=fertility)

    def is_measured(self, when: str) -> bool:
        heldout = self.record.get("heldout", {})
        return all(when in heldout.get(name, {}) for name in self.request.sources)

    def measure(self, when: str, model: str) -> None:
        """Bits per byte of a model, with its own tokenizer, on the held-out text of each kind."""
        from capgap.evaluate.measured import HeldoutLoss
        from capgap.stages.measure import run_measure

        if self.is_measured(when):
            return
        heldout = self.record.get("heldout", {name: {} for name in self.request.sources})
        for name, losses in heldout.items():
            text, device = str(self.request.text(name)), self.request.running.device
            found = run_measure(text, {when: model}, num_bytes=MEASURED_BYTES, device=device)
            values = HeldoutLoss.as_dict(found.models[when])
            # what models of different tokenizers can be compared by comes first
            kept = ("bits_per_byte", "bits_per_byte_stderr", "tokens", "bytes")
            losses[when] = {key: values[key] for key in kept} | {"nats_per_token": values["loss"]}
            rate = losses[when]["bits_per_byte"]
            self.say(f"adapt: {when}: {rate:.4f} bits per byte on {name} text")
        self._record(heldout=heldout)

    def train(self, should_stop: ShouldStop) -> None:
        """The extended model learns from the mixture."""
        if self.model.exists():
            return
        asked = self.request.continued()
        trained = asked.run(say=self.say, should_stop=should_stop)
        if started()[0]:
            return
        (one,) = trained["after"].values()
        if one["failure"]:
            raise UserError(
                f"the training failed ({one['failure']['message']}): take another folder and a "
                "smaller learning_rate"
            )
        kept = {key: trained[key] for key in ("steps", "flops", "sources")}
        self._record(training=kept | {"learning_rate": one["learning_rate"]})
        # moved before the record says so: a call that was killed between finds the model there
        folder = Path(one["folder"])
        folder.rename(self.model)
        folder.parent.rmdir()
        one["folder"] = str(self.model)
        write_json(asked.record_file, trained)

    def finish(self) -> None:
        """The model in its folder, the record, and no model twice."""
        if not self.model.exists():
            self.extended.rename(self.model)
        shutil.rmtree(self.extended, ignore_errors=True)
        for losses in self.record["heldout"].values():
            losses.setdefault("after", None)
        self._record(
            finished=True,
            folder=str(self.model),
            training=self.record.get("training"),
            versions=versions(),
            machine=machine(resolve_device(self.request.running.device), None),
        )
        shutil.copyfile(self.request.record_file, self.model / self.request.record_file.name)

    def _record(self, **values: Any) -> None:
        self.record |= values
        write_json(self.request.record_file, self.record)
