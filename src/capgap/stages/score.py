"""The stage `score`: how much each unit of a model matters, measured once for many cuts."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.corpus.mixture import Given
from capgap.errors import UserError
from capgap.prune.methods import Depth, Method, check_methods, reading_methods
from capgap.scrub import scrub
from capgap.stages.inputs import check_model, open_text, text_identity, warn_of_beginning

if TYPE_CHECKING:
    from capgap.corpus.mixture import TrainingText
    from capgap.prune.importance import ScoringState

SAVED_EVERY = 30.0  # seconds
SAID_EVERY = 10.0


@dataclass(frozen=True)
class ScoreRequest:
    """Whose units are scored, on what and how; see `capgap.prune.importance.score`.

    `corpus` may be None where the method reads no text.
    """

    teacher: str
    out: Path
    corpus: Given | None = None
    method: Method = "activation"
    depth: Depth | None = None
    tokens: int = 32_768
    window: int = 512
    batch_windows: int = 8
    seed: int = 0
    dtype: str = "stored"
    device: str = "auto"
    activation_checkpointing: bool = False


def run_score(
    request: ScoreRequest,
    *,
    say: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Writes the scores as one safetensors file; returns what `capgap score --json` prints.

    Stopped or killed, the same call goes on from the last batches that were saved, and the scores
    are those of an uninterrupted call. UserError for the user's mistakes, before any work;
    Interrupted when `should_stop` said so.
    """
    import torch

    from capgap.machine import resolve_device
    from capgap.models.build import DTYPES, checkpoint_activations, load_model
    from capgap.models.parts import Parts
    from capgap.prune.importance import score
    from capgap.prune.scores import load_state, save_importance, save_state
    from capgap.train.loop import Interrupted

    check_methods(request.method, request.depth)
    if request.dtype not in DTYPES:
        raise UserError(f"--dtype {request.dtype!r}: take one of {', '.join(DTYPES)}")
    if request.batch_windows < 1:
        raise UserError(f"--batch-windows {request.batch_windows} must be above 0")
    device = torch.device(resolve_device(request.device))
    corpus = _corpus(request)
    found = _found(request)
    provenance = _provenance(request, corpus)
    if found is not None:
        if found.provenance != provenance:
            _refuse(request.out, found.provenance, provenance)
        return _told(request, found, 0.0)
    batches = _batches(request, corpus)
    model = load_model(request.teacher, dtype=DTYPES[request.dtype]).to(device)
    if corpus is not None:
        warn_of_beginning(Parts(model), corpus, request.teacher, say)
    if request.activation_checkpointing:
        checkpoint_activations(model)
    partial = request.out.with_name(f".{request.out.name}.partial")
    state = load_state(partial, provenance, device)
    done = 0 if state is None else state.batches
    began = saved = said = time.monotonic()

    def on_batch(now_state: "ScoringState") -> None:
        nonlocal saved, said
        now, stopping = time.monotonic(), should_stop()
        if stopping or now - saved > SAVED_EVERY:
            saved = now
            save_state(partial, now_state, provenance)
        if stopping:
            raise Interrupted
        if now - said > SAID_EVERY:
            said = now
            batch_seconds = (now - began) / (now_state.batches - done)
            left = (len(batches) - now_state.batches) * batch_seconds
            say(f"score: {now_state.batches} of {len(batches)} batches, {left / 60:.1f} min to go")

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


def _corpus(request: ScoreRequest) -> "TrainingText | None":
    if not reading_methods(request.method, request.depth):
        return None
    if request.corpus is None:
        raise UserError(
            f"--method {request.method} reads text: give --corpus, a folder that `capgap corpus "
            f"SOURCE --out FOLDER --tokenizer {request.teacher}` made"
        )
    corpus = open_text(request.corpus, request.window)
    check_model(request.teacher, corpus)
    return corpus


def _batches(request: ScoreRequest, corpus: "TrainingText | None") -> list[Any]:
    from capgap.prune.text import scoring_batches

    if corpus is None:
        return []
    return scoring_batches(
        corpus, request.tokens, batch_windows=request.batch_windows, seed=request.seed
    )


def _provenance(request: ScoreRequest, corpus: "TrainingText | None") -> dict[str, Any]:
    """What decides the scores."""
    from capgap.models.identity import model_hash

    text = {}
    if corpus is not None:
        text = {
            **text_identity(corpus),
            "tokens_asked": request.tokens,
            "window": request.window,
            "batch_windows": request.batch_windows,
        }
    return {
        "teacher": scrub(request.teacher),
        "teacher_hash": model_hash(request.teacher),
        "method": request.method,
        "depth": request.depth,
        "seed": request.seed,
        "dtype": request.dtype,
        **text,
    }


def _found(request: ScoreRequest) -> Any:
    from capgap.prune.scores import load_importance

    return load_importance(request.out) if request.out.exists() else None


def _refuse(out: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    keys = [key for key in {**asked, **found} if found.get(key) != asked.get(key)]
    first = keys[0]
    raise UserError(
        f"{out} holds scores with another {first} ({found.get(first)}, now {asked.get(first)}): "
        "choose another --out"
    )


def _told(request: ScoreRequest, importance: Any, seconds: float) -> dict[str, Any]:
    return {
        "file": str(request.out),
        **importance.provenance,
        "tokens": importance.tokens,
        "flops": importance.flops,
        "seconds": seconds,
    }
