"""The stage `evaluate`: a model on benchmarks, and its loss on held-out text."""

import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from capgap.artifact import locked_file, read_json
from capgap.errors import UserError
from capgap.evaluate.sets import CODE, HELDOUT, SETS, SIX, NotMeasured, check_tasks, parse_shots
from capgap.machine import install_command
from capgap.section import Count, Dtype, PositiveFinite, Section, Words
from capgap.stage import ARGUMENT, HOW, SEVERAL, FieldError, Mark, Say, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from capgap.corpus.tokens import Corpus
    from capgap.evaluate.record import Record
    from capgap.evaluate.sources import SetSource
    from capgap.stages.measure import Reader

# The versions of lm-evaluation-harness whose task files and functions are used
HARNESS = ">=0.4.13,<0.5"
FORGOTTEN = 0.05  # nats a token, from which on it is warned of


def _shots(given: Any) -> Any:
    """From Python also {"mmlu": 0}."""
    is_mapping = isinstance(given, Mapping)
    return [f"{name}={number}" for name, number in given.items()] if is_mapping else given


Tasks = Annotated[
    Words,
    AfterValidator(check_tasks),
    "Sets parted by commas: mmlu, ceval, drop, humaneval, bbh, gsm8k; bbh_cot, blimp, lambada, "
    "piqa; heldout.",
]
Shots = Annotated[tuple[str, ...], BeforeValidator(_shots)]


class EvaluateSection(Section):
    """What the student, and the model that answers in the end, are measured by."""

    tasks: Tasks = (HELDOUT,)
    data: Annotated[
        Path | None,
        Mark.FOLDER,
        "Folder with local copies of sets, as archives or folders; others are of the Hub.",
    ] = None
    shots: Annotated[
        Shots, SEVERAL, "mmlu=0: other examples in the prompt than the set's own number."
    ] = ()
    limit: Annotated[Count | None, "Only so many questions of every part of a set."] = None
    batch_size: Annotated[Count, HOW, "Prompts that the model reads at once."] = 8
    allow_code: Annotated[bool, "Run programs the model writes, for humaneval."] = False

    @field_validator("shots")
    @classmethod
    def _of_tasks(cls, shots: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if "tasks" in info.data:
            parse_shots(shots, info.data["tasks"])
        return shots

    def shots_of(self, name: str) -> int:
        """Examples before every question of a set."""
        return parse_shots(self.shots, self.tasks).get(name, SETS[name].shots)


class Evaluate(EvaluateSection, Stage):
    """Evaluate a model: benchmarks with their published shots, and held-out loss; the same command
    goes on with what is missing."""

    # every set that is measured is in the record
    saves_when_asked: ClassVar[bool] = False

    model: Annotated[str, ARGUMENT, Mark.MODEL, "A Hugging Face folder or name."]
    tasks: Tasks = SIX
    corpus: Annotated[tuple[Path, ...], SEVERAL, "For heldout: what `capgap corpus` prepared."] = ()
    window: Annotated[Count, "For heldout: tokens of a row, or what the model can read."] = 512
    dtype: Annotated[Dtype, "The model's:"] = "stored"
    device: Annotated[str, HOW, "auto, cpu, cuda or cuda:1."] = "auto"
    trust_remote_code: Annotated[bool, "Run the model's own code, for other architectures."] = False
    out: Annotated[
        Path | None,
        HOW,
        "The record; what it has of the same model and request is not measured again.",
    ] = Path("evaluate.json")
    samples: Annotated[Path | None, HOW, "Every prompt and answer, as lines of JSON."] = None
    figure: Annotated[Path | None, HOW, "Draw the model beside published ones: .png or .svg."] = (
        None
    )
    flops: Annotated[
        PositiveFinite | None,
        HOW,
        "For --figure: what the model took, such as 4e21; if none, of its distillation.",
    ] = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (HELDOUT in self.tasks) != bool(self.corpus):
            raise ValueError("tasks heldout and corpus FOLDER go together: give both or neither")
        if self.flops is not None and self.figure is None:
            raise ValueError("flops is of use with figure alone")
        return self

    def run(self, *, say: Say = lambda text: None, **_: Any) -> dict[str, Any]:
        """The record, which docs/evaluation.md describes; written anew after every set.

        What the record at `out` has already of the same model, measured alike, is kept as it is. A
        set that cannot be had is left missing with its reason. UserError, before the model is
        loaded, for a model that cannot be read, a local copy that is broken, a corpus that is none,
        and benchmarks without the harness.
        """
        flops = _check(self)
        with locked_file(self.out) if self.out else nullcontext():
            found = _run(self, say)
        if self.figure is not None and flops is not None and found["mean_percent"] is not None:
            from capgap.report.draw import write_picture
            from capgap.report.published_charts import OwnResult, benchmark_chart

            own = OwnResult(Path(self.model).name, flops, found["mean_percent"])
            write_picture(benchmark_chart([own]), self.figure)
        return found

    @property
    def record_file(self) -> Path | None:
        return self.out

    @property
    def writes(self) -> tuple[Path, ...]:
        return () if self.out is None else (self.out,)

    def result(self, found: dict[str, Any]) -> str:
        told = [
            f"held-out loss on {Path(name).name} "
            + ("missing" if one["missing"] else f"{one['loss']:.3f}")
            for name, one in (found["heldout"] or {}).items()
        ]
        told += [
            f"{name} missing" if one["missing"] else f"{name} {one['score']:.3f}"
            for name, one in found["tasks"].items()
        ]
        return ", ".join(told)

    def told(self, found: dict[str, Any]) -> str:
        from capgap.evaluate.scores import record_text

        drawn = self.figure is not None and found["mean_percent"] is not None
        where = f"record: {self.out}" + (f", picture: {self.figure}" if drawn else "")
        return "\n".join(filter(None, (record_text(found), where)))

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        return ("export", self.model, "--out", "final")

    def failure(self, found: dict[str, Any]) -> str:
        if self.figure is not None and found["mean_percent"] is None:
            why = found["mean_missing"] or "none of the six benchmarks was asked for"
            return f"no picture: {why}"
        results = (*found["tasks"].values(), *(found["heldout"] or {}).values())
        return "nothing was measured" if all(one["missing"] for one in results) else ""


def _check(request: Evaluate) -> float | None:
    """The FLOPs that the model took, where a picture is asked for."""
    if request.data is not None and not request.data.is_dir():
        raise FieldError("data", f"{request.data} is no folder: give one with local copies of sets")
    for field, path in (("out", request.out), ("samples", request.samples)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise FieldError(field, f"{path}: give the name of a file in a folder that is there")
    if request.figure is None:
        return None
    from capgap.evaluate.scores import known_flops
    from capgap.report.draw import check_picture

    check_picture(request.figure)
    flops = request.flops or known_flops(request.model)
    if flops is None:
        raise FieldError("figure", "needs the FLOPs that the model took: give flops, such as 4e21")
    return flops


def _run(request: Evaluate, say: Say) -> dict[str, Any]:
    from capgap.corpus.tokenizer import tokenizer_hash
    from capgap.corpus.tokens import load_corpus
    from capgap.evaluate.record import Record
    from capgap.evaluate.scores import missing_set
    from capgap.machine import machine, resolve_device, versions
    from capgap.models.build import DTYPES, load_model
    from capgap.models.identity import model_hash
    from capgap.stages.measure import Reader

    device = resolve_device(request.device)
    reader = Reader.of(request.model, trust_remote_code=request.trust_remote_code)
    corpora = {str(folder): load_corpus(folder, window=1) for folder in request.corpus}
    names = [name for name in request.tasks if name in SETS]
    # held-out loss needs no harness
    harness = _harness_versions() if names else {}
    about = {
        "schema": 1,
        "model": request.model,
        "model_hash": model_hash(request.model),
        "tokenizer_hash": tokenizer_hash(reader.tokenizer),
        "dtype_asked": request.dtype,
        "batch_size": request.batch_size,
        "limit": request.limit,
        "versions": versions() | harness,
        "machine": machine(device, None),
    }
    record = Record(about, folders=corpora, tasks=names, out=request.out, samples=request.samples)
    window = min(request.window, reader.positions or request.window)
    for folder, corpus in list(corpora.items()):
        if record.keep("heldout", folder, corpus_hash=corpus.corpus_hash, window=window):
            say(f"{folder}: was measured before")
            del corpora[folder]
    sources = {}
    for name in names:
        try:
            source = _source(request, name)
        except NotMeasured as reason:
            say(f"{name}: missing, {reason}")
            record.results["tasks"][name] = missing_set(str(reason))
            continue
        if record.keep("tasks", name, shots=request.shots_of(name), source=source.about):
            say(f"{name}: was measured before")
        else:
            sources[name] = source
    record.drop_samples()
    if corpora or sources:
        dtype, own_code = DTYPES[request.dtype], request.trust_remote_code
        model = load_model(request.model, dtype, trust_remote_code=own_code)
        record.loaded["parameters"] = sum(weights.numel() for weights in model.parameters())
        record.loaded["dtype"] = str(model.dtype).removeprefix("torch.")
        model = model.to(device).eval()
        for folder, corpus in corpora.items():
            record.add("heldout", folder, heldout_loss(model, reader, corpus, window, say))
        if sources:
            _run_sets(request, model, reader, sources, record, say)
    return record.write(finished=True)


def _harness_versions() -> dict[str, str]:
    """UserError where the harness is not there, or is one whose tasks are not known here."""
    from packaging.specifiers import SpecifierSet

    fix = f"{install_command('evaluate')} brings lm-eval {HARNESS.replace(',', ', ')}"
    try:
        found = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"benchmarks need lm-evaluation-harness: {fix}") from None
    if not SpecifierSet(HARNESS).contains(found, prereleases=True):
        raise UserError(f"lm-eval {found} is another one than is known here: {fix}")
    try:
        import capgap.evaluate.harness  # noqa: F401
    except ImportError as error:
        raise UserError(f"lm-eval {found} does not load ({error}): {fix}") from None
    return {"lm_eval": found, "datasets": importlib.metadata.version("datasets")}


def _source(request: Evaluate, name: str) -> "SetSource":
    """NotMeasured for a set that cannot be had."""
    from capgap.evaluate.harness import part_names
    from capgap.evaluate.sources import find_source

    if name == CODE and not request.allow_code:
        raise NotMeasured("runs programs that the model wrote, which allow_code allows")
    return find_source(SETS[name], request.data, part_names(SETS[name]))


def heldout_loss(
    model: "PreTrainedModel", reader: "Reader", corpus: "Corpus", window: int, say: Say
) -> dict[str, Any]:
    """A corpus's held-out loss, in rows of `window` tokens; the text is cut anew for a model with
    other tokens."""
    from capgap.corpus.excerpt import heldout_passages
    from capgap.corpus.tokenizer import tokenizer_hash
    from capgap.evaluate.losses import evaluate_heldout
    from capgap.models.parts import Parts

    documents, marks = corpus.heldout_documents(), corpus.marks
    is_same = tokenizer_hash(reader.tokenizer) == corpus.token_hash
    if not is_same:
        documents, _ = reader.documents(heldout_passages(corpus))
        marks = corpus.marks_for(reader.tokenizer)
    say(f"heldout: {len(documents)} documents of {corpus.directory}")
    try:
        parts = Parts(model)
    except UserError as error:
        # of its own code: the other measures may still be had
        return {"missing": str(error)}
    rows = reader.rows(parts, documents, marks, window, reader.source, say)
    loss = evaluate_heldout(parts, rows).as_dict()
    numbers = {
        key: value if value is not None and math.isfinite(value) else None
        for key, value in loss.items()
        if not key.startswith("document_")
    }
    return {
        **numbers,
        "missing": "the loss is not finite" if numbers["loss"] is None else None,
        "documents": len(documents),
        "window": window,
        "same_tokenizer": is_same,
        "corpus_hash": corpus.corpus_hash,
    }


def corpora_of(model: str, given: Sequence[Path]) -> "list[Corpus]":
    """The given corpora; without any, those that the model was distilled on, if they are there."""
    from capgap.corpus.tokens import load_corpus
    from capgap.models.stored import local_folder

    found = [load_corpus(folder, window=1) for folder in given]
    record = local_folder(model) / "distill.json"
    for source in read_json(record)["sources"] if record.is_file() and not given else []:
        with suppress(UserError):
            corpus = load_corpus(source["folder"], window=1)
            found += [corpus] if corpus.corpus_hash == source["corpus_hash"] else []
    return found


def forgotten(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What a person reads of held-out losses by corpus, with a warning where they rose."""
    for folder, one in before.items():
        was, now = (each["loss"] or math.nan for each in (one, after[folder]))
        yield f"held-out loss of the text in {folder} {was:.4f} -> {now:.4f} nats a token"
        if not now - was <= FORGOTTEN:
            less = "a lower learning rate, fewer epochs or LoRA keep more"
            yield f"warning: it forgot {now - was:.2f} nats a token of that text: {less}"


def _run_sets(
    request: Evaluate,
    model: "PreTrainedModel",
    reader: "Reader",
    sources: "Mapping[str, SetSource]",
    record: "Record",
    say: Say,
) -> None:
    from capgap.evaluate.harness import CountingModel, run_set
    from capgap.evaluate.scores import missing_set

    counting = CountingModel(model, reader.tokenizer, request.batch_size)
    record.loaded["context"] = counting.max_length
    for name, source in sources.items():
        shots, about = request.shots_of(name), source.about
        say(f"{name}: {shots} shots, from {about.get('path') or 'the Hub, ' + about['dataset']}")
        try:
            scores, samples = run_set(
                SETS[name], counting, source.local, shots=shots, limit=request.limit, say=say
            )
        except NotMeasured as reason:
            say(f"{name}: missing, {reason}")
            record.add("tasks", name, missing_set(str(reason)))
            continue
        if scores["cut_prompts"]:
            say(
                f"{name}: {scores['cut_prompts']:,} of {scores['questions']:,} prompts were cut to "
                f"the {counting.max_length} tokens that the model reads"
            )
        record.add("tasks", name, scores | {"source": about}, samples)
