"""The stage `score`: how much each unit of a model matters, measured once for many cuts."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from capgap.artifact import difference, locked_file, plain
from capgap.corpus.names import Given
from capgap.errors import UserError
from capgap.prune import Depth, Method, reading_methods
from capgap.section import Count, Dtype, Recomputed, Section, TextOptions
from capgap.stage import ARGUMENT, HOW, SEVERAL, Mark, Say, ShouldStop, Stage, paced

if TYPE_CHECKING:
    from capgap.corpus.text import Text
    from capgap.prune.importance import Importance, ScoringState

SAVED_EVERY = 30.0  # seconds


class ScoreSection(Section):
    """How the teacher's units are scored before the cut."""

    method: Annotated[Method, "How units are scored:"] = "activation"
    depth: Annotated[Depth | None, "How layers are, if not by the method:"] = None
    tokens: Annotated[Count, "Tokens to score on; all of a corpus that has fewer."] = 32_768
    window: Annotated[int, Field(ge=8), "Tokens of a window."] = 512


class Score(ScoreSection, TextOptions, Stage):
    """Measure how much every unit of a model matters, once for many cuts."""

    takes_text: ClassVar[bool] = True

    teacher: Annotated[str, ARGUMENT, Mark.MODEL, "A Hugging Face folder or name."]
    out: Annotated[Path, HOW, "File for the scores (safetensors)."]
    corpus: Annotated[
        Given | None,
        SEVERAL,
        "FOLDER[=WEIGHT] that `capgap corpus` prepared, or text; several are mixed; "
        "not for norm, random.",
    ] = None
    batch_windows: Annotated[Count, "Windows read at once; scores are means over such batches."] = 8
    seed: Annotated[int, "Decides the windows, and random scores."] = 0
    dtype: Annotated[Dtype, "What the teacher reads in (sums are in fp32):"] = "stored"
    device: Annotated[str, HOW, "auto, cpu, cuda or cuda:1."] = "auto"
    activation_checkpointing: Annotated[Recomputed, HOW] = False

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        with locked_file(self.out):
            return _run(self, say, should_stop)

    def told(self, found: dict[str, Any]) -> str:
        read = f" on {found['tokens']:,} tokens" if found["tokens"] else ""
        return f"{found['method']} scores of {self.teacher}{read}, in {self.out}"

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        asked = ("--scores", self.out, "--keep", 0.5, "--out", "student")
        return ("prune", self.teacher, *asked)


def _run(request: Score, say: Say, should_stop: ShouldStop) -> dict[str, Any]:
    import torch

    from capgap.errors import Interrupted
    from capgap.machine import resolve_device
    from capgap.models.build import DTYPES, checkpoint_activations, load_model
    from capgap.models.parts import Parts
    from capgap.prune.importance import (
        load_importance,
        load_state,
        save_importance,
        save_state,
        score,
        scoring_batches,
    )
    from capgap.stages.inputs import warn_of_beginning

    device = torch.device(resolve_device(request.device))
    corpus = _corpus(request, say)
    provenance = _provenance(request, corpus)
    if request.out.exists():
        found = load_importance(request.out)
        other = difference(found.provenance, provenance)
        if other is not None:
            raise UserError(f"{request.out} holds other scores ({other}): choose another file")
        return _told(request, found, 0.0)
    batches: list[torch.Tensor] = []
    if corpus is not None:
        rows, seed = request.batch_windows, request.seed
        batches = scoring_batches(corpus, request.tokens, batch_windows=rows, seed=seed)
    model = load_model(request.teacher, dtype=DTYPES[request.dtype]).to(device)
    if corpus is not None:
        warn_of_beginning(Parts(model), corpus, request.teacher, say)
    if request.activation_checkpointing:
        checkpoint_activations(model)
    partial = request.out.with_name(f".{request.out.name}.partial")
    state = load_state(partial, provenance, device)
    done = 0 if state is None else state.batches
    began = saved = time.monotonic()
    tell = paced(say)

    def on_batch(now_state: "ScoringState") -> None:
        nonlocal saved
        now, stopping = time.monotonic(), should_stop()
        if stopping or now - saved > SAVED_EVERY:
            saved = now
            save_state(partial, now_state, provenance)
        if stopping:
            raise Interrupted
        batch_seconds = (now - began) / (now_state.batches - done)
        left = (len(batches) - now_state.batches) * batch_seconds / 60
        tell(lambda: f"score: {now_state.batches} of {len(batches)} batches, {left:.1f} min to go")

    importance = score(
        model,
        batches[done:],
        method=request.method,
        depth=request.depth,
        seed=request.seed,
        state=state,
        on_batch=on_batch,
    )
    importance.provenance.update(provenance)
    save_importance(request.out, importance)
    partial.unlink(missing_ok=True)
    return _told(request, importance, time.monotonic() - began)


def _corpus(request: Score, say: Say) -> "Text | None":
    from capgap.stages.inputs import check_model, open_text

    if not reading_methods(request.method, request.depth):
        return None
    if request.corpus is None:
        raise UserError(
            f"`method` {request.method} reads text: give `corpus`, a folder that `capgap corpus "
            f"SOURCE --out FOLDER --tokenizer {request.teacher}` made"
        )
    into, teacher = request.out.with_suffix(".corpus"), request.teacher
    given, reading = request.corpus, request.reading
    corpus = open_text(given, request.window, into=into, tokenizer=teacher, say=say, **reading)
    check_model(request.teacher, corpus)
    return corpus


def _provenance(request: Score, corpus: "Text | None") -> dict[str, Any]:
    """What decides the scores, as their file holds it."""
    from capgap.models.identity import model_hash

    names = ["teacher", "method", "depth", "seed", "dtype"]
    text = {}
    if corpus is not None:
        names += ["window", "batch_windows"]
        text = corpus.identity | {"tokens_asked": request.tokens}
    asked = {name: getattr(request, name) for name in names}
    return dict(plain(asked | text | {"teacher_hash": model_hash(request.teacher)}))


def _told(request: Score, importance: "Importance", seconds: float) -> dict[str, Any]:
    return {
        "file": str(request.out),
        **importance.provenance,
        "tokens": importance.tokens,
        "flops": importance.flops,
        "seconds": seconds,
    }
