"""The stage `cache`: a teacher reads a corpus once, for all who learn from it later."""

import re
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from capgap.corpus.names import Given
from capgap.errors import UserError
from capgap.machine import started
from capgap.section import Count, Dtype
from capgap.stage import ARGUMENT, HOW, SEVERAL, Mark, Say, Stage, paced


def _part(given: str) -> str:
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError("is not of the form 2/4: the second of four")
    return given


class Cache(Stage):
    """Keep a teacher's signal on disk; the same command goes on with what is missing."""

    saves_when_asked: ClassVar[bool] = False
    has_parts: ClassVar[bool] = True

    teacher: Annotated[str, ARGUMENT, Mark.MODEL, "A Hugging Face folder or name."]
    corpus: Annotated[
        Given, ARGUMENT, SEVERAL, "What `capgap corpus` prepared; several for a mixture."
    ]
    out: Annotated[
        Path, HOW, "Folder for the cache: new, empty, or with the same cache unfinished."
    ]
    window: Annotated[int, Field(ge=8), "Tokens of a training window; a cache serves one."] = 512
    top_k: Annotated[Count, "Likeliest words kept with their probability."] = 12
    samples: Annotated[
        int,
        Field(ge=0),
        "Words drawn from the rest; 0 keeps the rest as one bucket, which all divergences take.",
    ] = 16
    temperature: Annotated[
        float, Field(gt=0, allow_inf_nan=False), "Of the probabilities kept."
    ] = 1.0
    document_mask: Annotated[
        bool, "No attention over document borders, as training.document_mask."
    ] = False
    dtype: Annotated[
        Literal["auto"] | Dtype,
        "What the teacher computes in (auto: bf16 on a GPU that has it, else as stored):",
    ] = "auto"
    device: Annotated[str, HOW, "auto (a GPU where there is one), cpu, cuda or cuda:1."] = "auto"
    offload: Annotated[bool, HOW, "Layers lie in host memory (needs accelerate)."] = False
    batch_windows: Annotated[Count, HOW, "Windows the teacher reads at once."] = 8
    part: Annotated[
        Annotated[str, AfterValidator(_part)] | None,
        HOW,
        "2/4: the second of four processes that share the work; torchrun's do so by themselves.",
    ] = None

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        corpora = [word for one in self.corpus for word in ("--corpus", one)]
        asked = (*corpora, "--window", self.window, "--cache", self.out, "--tokens", "TOKENS")
        return ("distill", self.teacher, "STUDENT", *asked, "--out", "distilled")

    def run(self, *, say: Say = lambda text: None, **_: Any) -> dict[str, Any]:
        """Writes what the cache in the folder still lacks; returns what `--json` prints.

        Part "2/4" writes every fourth shard; without one, every process of torchrun its own.
        """
        import torch

        from capgap.distill.cache import CacheFormat, CacheIdentity, CacheWriter, write_cache
        from capgap.distill.teacher import load_teacher
        from capgap.machine import resolve_device
        from capgap.models.identity import model_hash
        from capgap.stages.inputs import check_model, open_text, warn_of_beginning
        from capgap.train.settings import teacher_dtype

        device = resolve_device(self.device)
        corpus = open_text(self.corpus, self.window)
        check_model(self.teacher, corpus)
        try:
            kept = CacheFormat(corpus.vocabulary, self.top_k, self.samples, self.temperature)
        except ValueError as error:
            raise UserError(str(error)) from None
        dtype = teacher_dtype(self.dtype, "auto", device)
        teacher = load_teacher(self.teacher, device, dtype=dtype, offload=self.offload)
        identity = CacheIdentity.of(
            self.teacher,
            model_hash(self.teacher),
            teacher.dtype,
            corpus,
            document_mask=self.document_mask,
        )
        if self.document_mask:
            teacher.parts.check_documents()
        writer = CacheWriter(self.out, identity, kept)
        warn_of_beginning(teacher.parts, corpus, self.teacher, say)
        began = time.monotonic()
        tell = paced(say)

        def on_batch(done: int, total: int) -> None:
            rate = done * corpus.window / (time.monotonic() - began)
            left = (total - done) * corpus.window / rate / 60
            speed = f"{rate:,.0f} tokens/s, about {left:.0f} min to go"
            tell(lambda: f"cache: {done:,} of {total:,} windows, {speed}")

        missing = write_cache(
            writer,
            teacher,
            corpus,
            device=torch.device(device),
            part=self._part(),
            batch_windows=self.batch_windows,
            on_batch=on_batch,
        )
        return {
            "folder": str(self.out),
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

    def _part(self) -> tuple[int, int]:
        """(which, of how many), from 0 on."""
        if self.part is None:
            return started()
        which, number = self.part.split("/")
        return int(which) - 1, int(number)

    def told(self, found: dict[str, Any]) -> str:
        if not found["complete"]:
            missing, shards = found["missing_shards"], found["shards"]
            others = f"other parts lack {missing} of {shards} shards in {self.out}"
            return f"this part is written; {others}"
        size = f"{found['token_bytes']} bytes each, {found['bytes'] / 1e6:,.1f} MB"
        return f"{found['tokens']:,} tokens at {size}, in {self.out}"
