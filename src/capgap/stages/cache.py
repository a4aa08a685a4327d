"""The stage `cache`: a teacher reads a corpus once, for all who learn from it later."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.corpus.given import Given
from capgap.errors import UserError
from capgap.stages.inputs import check_model, open_text, warn_of_beginning


@dataclass(frozen=True)
class CacheRequest:
    """Whose signal is kept, for which tokens, and how.

    Part (i, n) writes every n-th shard; without one, every process of torchrun writes its own.
    """

    teacher: str
    corpus: Given
    out: Path
    window: int = 512
    top_k: int = 12
    samples: int = 16
    temperature: float = 1.0
    document_mask: bool = False
    dtype: str = "auto"
    device: str = "auto"
    offload: bool = False
    batch_windows: int = 8
    part: tuple[int, int] | None = None


def parse_part(text: str) -> tuple[int, int]:
    """ "2/4" to (1, 4); UserError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--part {text!r} is not of the form 2/4: the second of four")
    return int(found[1]) - 1, int(found[2])


def run_cache(
    request: CacheRequest, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Writes what the cache in the folder still lacks; `say` is told now and then how far it is.

    Returns what `capgap cache --json` prints. UserError for the user's mistakes, before any work.
    """
    import torch

    from capgap.distill.cache import CacheIdentity, CacheProgress, CacheWriter, write_cache
    from capgap.distill.cache_format import CacheFormat
    from capgap.distill.teacher import load_teacher
    from capgap.machine import resolve_device, started
    from capgap.models.build import DTYPES
    from capgap.models.identity import model_hash
    from capgap.train.precision import teacher_dtype

    if request.dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {request.dtype!r}: take one of auto, {', '.join(DTYPES)}")
    if request.batch_windows < 1:
        raise UserError(f"--batch-windows {request.batch_windows} must be above 0")
    device = resolve_device(request.device)
    corpus = open_text(request.corpus, request.window)
    check_model(request.teacher, corpus)
    try:
        kept = CacheFormat(corpus.vocabulary, request.top_k, request.samples, request.temperature)
    except ValueError as error:
        raise UserError(str(error)) from None
    dtype = teacher_dtype(request.dtype, "auto", device)
    teacher = load_teacher(request.teacher, device, dtype=dtype, offload=request.offload)
    identity = CacheIdentity.of(
        request.teacher,
        model_hash(request.teacher),
        teacher.dtype,
        corpus,
        document_mask=request.document_mask,
    )
    if request.document_mask:
        teacher.parts.check_documents()
    writer = CacheWriter(request.out, identity, kept)
    warn_of_beginning(teacher.parts, corpus, request.teacher, say)
    began = said = time.monotonic()

    def on_batch(progress: CacheProgress) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < 10.0:
            return
        said = now
        rate = progress.windows * corpus.window / (now - began)
        left = (progress.of_windows - progress.windows) * corpus.window / rate
        say(
            f"cache: {progress.windows:,} of {progress.of_windows:,} windows, {rate:,.0f} tokens/s,"
            f" about {left / 60:.0f} min to go"
        )

    missing = write_cache(
        writer,
        teacher,
        corpus,
        device=torch.device(device),
        part=request.part or started(),
        batch_windows=request.batch_windows,
        on_batch=on_batch,
    )
    return {
        "folder": str(request.out),
        "complete": missing == 0,
        "shards": writer.num_shards,
        "missing_shards": missing,
        "windows": corpus.windows,
        "tokens": corpus.windows * corpus.window,
        "token_bytes": kept.token_bytes,
        "bytes": corpus.windows * writer.window_bytes,
        "teacher_hash": identity.teacher_hash,
        "dtype": identity.dtype,
        "corpus_hash": identity.corpus_hash,
        "seconds": time.monotonic() - began,
    }
