"""The stage `evaluate`: a model on benchmarks, and its loss on held-out text."""

import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.errors import UserError
from capgap.evaluate.scores import missing_set, six_mean
from capgap.evaluate.sets import CODE, HELDOUT, SETS, SIX, check_shots, check_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from capgap.corpus.tokens import Corpus
    from capgap.evaluate.local_data import LocalSet
    from capgap.stages.measure import Reader

# Tokens of a row of held-out text, where the model can read so many
WINDOW = 512
# Whose task files and functions are used
HARNESS = (0, 4, 13)
HARNESS_BELOW = (0, 5)


@dataclass(frozen=True)
class EvaluateRequest:
    """What is evaluated, and how.

    `tasks` of `capgap.evaluate.sets.NAMES`; `data` a folder of local copies; `corpora` prepared
    ones, for `heldout`; `shots` by set, where not its own number; `limit` questions of every part
    of a set; `allow_code` lets programs that the model wrote run, for `humaneval`;
    `trust_remote_code` the code that a checkpoint of an unknown architecture brings; `out` gets
    the record as JSON, `samples` every question and answer as a line of JSON.
    """

    model: str
    tasks: tuple[str, ...] = SIX
    data: Path | None = None
    corpora: tuple[Path, ...] = ()
    shots: Mapping[str, int] = field(default_factory=dict)
    limit: int | None = None
    window: int = WINDOW
    batch_size: int = 8
    dtype: str = "stored"
    device: str = "auto"
    allow_code: bool = False
    trust_remote_code: bool = False
    out: Path | None = None
    samples: Path | None = None


def run_evaluate(
    request: EvaluateRequest, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The record, which docs/evaluation.md describes; written anew after every set.

    What the record at `out` has already of the same model, measured alike, is kept as it is. A set
    that cannot be had is left missing with its reason. UserError, before the model is loaded, for a
    wrong request, a model that cannot be read, a local copy that is broken, a corpus that is none,
    and benchmarks without the harness.
    """
    from capgap.corpus.tokenizer import tokenizer_hash
    from capgap.evaluate.earlier import Earlier
    from capgap.machine import machine, resolve_device, versions
    from capgap.models.identity import model_hash
    from capgap.stages.inputs import open_corpus
    from capgap.stages.measure import Reader

    _check(request)
    device = resolve_device(request.device)
    reader = Reader.of(request.model, trust_remote_code=request.trust_remote_code)
    corpora = [open_corpus(folder, 1) for folder in request.corpora]
    names = [name for name in request.tasks if name in SETS]
    versions_now = versions() | (_harness_versions() if names else {})
    found: dict[str, tuple[dict[str, Any], LocalSet | None] | str] = {
        name: _source(request, name) for name in names
    }
    record: dict[str, Any] = {
        "schema": 1,
        "finished": False,
        "model": request.model,
        "model_hash": model_hash(request.model),
        "tokenizer_hash": tokenizer_hash(reader.tokenizer),
        "parameters": None,
        "context": None,
        "dtype": None,
        "dtype_asked": request.dtype,
        "batch_size": request.batch_size,
        "limit": request.limit,
        "tasks": {},
        "heldout": None,
        "mean_percent": None,
        "mean_missing": None,
        "versions": versions_now,
        "machine": machine(device, None),
    }
    earlier = Earlier(request.out, request.samples, record)
    record |= {key: earlier.record.get(key) for key in ("parameters", "context", "dtype")}
    window = min(request.window, reader.positions or request.window)
    losses = {
        str(one.directory): earlier.heldout(str(one.directory), one.corpus_hash, window)
        for one in corpora
    }
    scores = {
        name: None if isinstance(one, str) else earlier.task(name, _shots(request, name), one[0])
        for name, one in found.items()
    }
    kept = {name: one for name, one in scores.items() if one is not None}
    # in the record from its first writing on, or a second interruption would lose them
    record["tasks"] = dict(kept)
    for name in (*(folder for folder, one in losses.items() if one is not None), *kept):
        say(f"{name}: was measured before")
    model = None
    wanted = [name for name, one in found.items() if not isinstance(one, str)]
    if None in losses.values() or any(name not in kept for name in wanted):
        model = _load(request, device, record)
    for one in corpora:
        folder = str(one.directory)
        if losses[folder] is None:
            assert model is not None
            losses[folder] = _heldout(model, reader, one, window, say)
        record["heldout"] = {name: loss for name, loss in losses.items() if loss is not None}
        _write(request, record)
    _run_sets(request, model, reader, found, record, say)
    # in the order that was asked for
    record["tasks"] = {name: record["tasks"][name] for name in names}
    if any(name in SIX for name in names):
        mean, why = six_mean(record["tasks"], limit=request.limit)
        record |= {"mean_percent": mean, "mean_missing": why}
    record["finished"] = True
    _write(request, record)
    return record


def _check(request: EvaluateRequest) -> None:
    from capgap.models.build import DTYPES

    for name in request.tasks:
        check_task(name)
    check_shots(request.shots)
    unused = [name for name in request.shots if name not in request.tasks]
    if unused:
        raise UserError(f"--shots {unused[0]}={request.shots[unused[0]]}: it is not in --tasks")
    for option, value in (
        ("--limit", request.limit),
        ("--batch-size", request.batch_size),
        ("--window", request.window),
    ):
        if value is not None and value < 1:
            raise UserError(f"{option} {value} must be above 0")
    if request.dtype not in DTYPES:
        raise UserError(f"--dtype {request.dtype!r}: take one of {', '.join(DTYPES)}")
    if (HELDOUT in request.tasks) != bool(request.corpora):
        raise UserError("--tasks heldout and --corpus FOLDER go together: give both or neither")
    if request.data is not None and not request.data.is_dir():
        raise UserError(f"--data {request.data} is no folder: give one with local copies of sets")
    for option, path in (("--out", request.out), ("--samples", request.samples)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{option} {path}: give the name of a file in a folder that is there")


def _harness_versions() -> dict[str, str]:
    """UserError where the harness is not there, or is one whose tasks are not known here."""
    low, below = (".".join(map(str, one)) for one in (HARNESS, HARNESS_BELOW))
    fix = f"pip install 'capgap[evaluate]' brings lm-eval >={low}, <{below}"
    try:
        found = importlib.metadata.version("lm_eval")
        numbers = tuple(int(part) for part in found.split(".")[:3])
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"benchmarks need lm-evaluation-harness: {fix}") from None
    except ValueError:
        numbers = ()
    if not HARNESS <= numbers < HARNESS_BELOW:
        raise UserError(f"lm-eval {found} is another one than is known here: {fix}")
    try:
        import capgap.evaluate.harness  # noqa: F401
    except ImportError as error:
        raise UserError(f"lm-eval {found} does not load ({error}): {fix}") from None
    return {"lm_eval": found, "datasets": importlib.metadata.version("datasets")}


def _source(request: EvaluateRequest, name: str) -> "tuple[dict[str, Any], LocalSet | None] | str":
    """Where a set comes from, with its records if from a local copy; or why it is missing."""
    from capgap.evaluate.harness import part_names
    from capgap.evaluate.local_data import read_local

    if name == CODE and not request.allow_code:
        return "runs programs that the model wrote, which --allow-code allows"
    if request.data is not None:
        local = read_local(request.data, name, part_names(SETS[name]))
        if local is not None:
            path, records = local
            return {"kind": "local", "path": str(path), "sha256": _sha256(path)}, records
    return _on_hub(SETS[name].hub, "" if request.data is None else f" in {request.data}")


def _sha256(path: Path) -> str:
    """Of an archive, or of all files of a folder with their names."""
    import hashlib

    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    whole = hashlib.sha256()
    for one in sorted(path.rglob("*")):
        if one.is_file():
            whole.update(f"{one.relative_to(path)}\0{_sha256(one)}\n".encode())
    return whole.hexdigest()


def _on_hub(dataset: str, where: str) -> tuple[dict[str, Any], None] | str:
    """One request, because the harness' loader would try again for most of a minute."""
    import datasets

    from capgap.corpus.hub import hub_revision

    source = {"kind": "hub", "dataset": dataset, "revision": None}
    try:
        source["revision"] = hub_revision(dataset, kind="dataset")
    except UserError as error:
        kept = Path(datasets.config.HF_DATASETS_CACHE) / dataset.replace("/", "___").lower()
        if not kept.is_dir():
            cause = str(error).partition(": there is no file")[0]
            return f"no local copy{where}, and {cause}"
    return source, None


def _load(request: EvaluateRequest, device: str, record: dict[str, Any]) -> "PreTrainedModel":
    from capgap.models.build import DTYPES, load_model

    model = load_model(
        request.model, DTYPES[request.dtype], trust_remote_code=request.trust_remote_code
    )
    model = model.to(device).eval()
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    record["dtype"] = str(model.dtype).removeprefix("torch.")
    return model


def _heldout(
    model: "PreTrainedModel",
    reader: "Reader",
    corpus: "Corpus",
    window: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """A corpus's held-out loss, in rows of `window` tokens; the text is cut anew for a model with
    other tokens."""
    from capgap.corpus.excerpt import heldout_passages
    from capgap.corpus.tokenizer import tokenizer_hash
    from capgap.evaluate.beginning import better_beginning
    from capgap.evaluate.heldout import evaluate_heldout, heldout_set
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
    better = better_beginning(parts, documents, marks, reader.tokenizer, vocabulary=reader.words)
    if better is not None:
        say(better.warning(reader.source))
    found = evaluate_heldout(parts, heldout_set(documents, marks, window, reader.words)).as_dict()
    kept = {key: value for key, value in found.items() if not key.startswith("document_")}
    return {
        **{key: value if _is_finite(value) else None for key, value in kept.items()},
        "missing": None if _is_finite(found["loss"]) else "the loss is not finite",
        "documents": len(documents),
        "window": window,
        "same_tokenizer": is_same,
        "corpus_hash": corpus.corpus_hash,
    }


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _run_sets(
    request: EvaluateRequest,
    model: "PreTrainedModel | None",
    reader: "Reader",
    found: "Mapping[str, tuple[dict[str, Any], LocalSet | None] | str]",
    record: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """The scores of the sets that the record does not have yet."""
    counting = None
    kept = tuple(record["tasks"])
    with _samples(request.samples, kept) as on_sample:
        for name, source in found.items():
            if name in kept:
                continue
            if isinstance(source, str):
                record["tasks"][name] = missing_set(source)
            else:
                from capgap.evaluate.harness import counting_model

                if counting is None:
                    assert model is not None
                    counting = counting_model(model, reader.tokenizer, request.batch_size)
                    record["context"] = counting.max_length
                record["tasks"][name] = _run_one(request, name, source, counting, on_sample, say)
            why = record["tasks"][name]["missing"]
            if why:
                say(f"{name}: missing, {why}")
            _write(request, record)


def _run_one(
    request: EvaluateRequest,
    name: str,
    source: "tuple[dict[str, Any], LocalSet | None]",
    model: Any,
    on_sample: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    from capgap.evaluate.harness import NotMeasured, run_set

    where, local = source
    shots = _shots(request, name)
    say(f"{name}: {shots} shots, from {where.get('path') or 'the Hub, ' + where['dataset']}")
    try:
        scores = run_set(
            SETS[name],
            model,
            local,
            shots=shots,
            limit=request.limit,
            say=say,
            on_sample=on_sample,
        )
    except NotMeasured as reason:
        return missing_set(str(reason))
    found = scores.as_dict() | {"source": where}
    if scores.cut_prompts:
        say(
            f"{name}: {scores.cut_prompts:,} of {scores.questions:,} prompts were cut to the "
            f"{model.max_length} tokens that the model reads"
        )
    return found


def _shots(request: EvaluateRequest, name: str) -> int:
    return request.shots.get(name, SETS[name].shots)


@contextmanager
def _samples(path: Path | None, kept: Sequence[str]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What takes a sample: a line in the file, behind those of the sets that are kept."""
    from capgap.evaluate.earlier import keep_samples

    if path is None:
        yield lambda sample: None
        return
    keep_samples(path, kept)
    with path.open("a") as file:

        def write(sample: dict[str, Any]) -> None:
            file.write(json.dumps(sample, ensure_ascii=False, default=str) + "\n")

        yield write


def _write(request: EvaluateRequest, record: dict[str, Any]) -> None:
    from capgap.records import write_json_atomically

    if request.out is not None:
        write_json_atomically(request.out, record)
