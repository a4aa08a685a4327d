"""One folder a run, one `record.json` in it: the database of a sweep.

Every number that a table, a law or a report shows is read from here, never from a log.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from capgap.artifact import read_json, write_json
from capgap.errors import UserError
from capgap.section import Init

SCHEMA: Literal[1] = 1
RECORD_FILE = "record.json"

# a misspelt key and a NaN are both refused when a record is made, not when it is read
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _missing_if_not_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The last steps of a run that broke are not finite; JSON has no such number, so they become
# null, and the record's `failure` says why.
_Trace = list[Annotated[float | None, BeforeValidator(_missing_if_not_finite)]]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Failure:
    """Why a run stopped: the step and the windows of the batch, where there was one."""

    message: str
    step: int | None = None
    windows: list[int] | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Parameters:
    """Plain parameter counts by part; `non_embedding` = attention + ffn + norms."""

    embedding: int
    attention: int
    ffn: int
    norms: int
    head: int
    non_embedding: int = Field(gt=0)
    total: int = Field(gt=0)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Flops:
    """Floating-point operations by part: 0 where there was none, None where it is not known."""

    teacher_training: int | None = None
    teacher_forward: int | None = None
    pruning: int | None = None
    student: int | None = None
    evaluation: int | None = None

    @property
    def total(self) -> int | None:
        """Sum of the known parts; None if none is known."""
        parts = [part for part in dataclasses.astuple(self) if part is not None]
        return sum(parts) if parts else None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Heldout:
    """Held-out loss in nats per token, with its standard error over documents.

    `document_losses` are summed nats and `document_tokens` token counts, document by document in
    one order for all records of a sweep, so that differences between runs can be paired.
    """

    loss: float
    loss_stderr: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_stderr: float | None = None
    tokens: int = Field(gt=0)
    bytes: int | None = None
    document_losses: list[float] = Field(min_length=1)
    document_tokens: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)

    @model_validator(mode="after")
    def _same_documents(self) -> "Heldout":
        if len(self.document_losses) != len(self.document_tokens):
            raise ValueError(
                f"{len(self.document_losses)} document_losses but "
                f"{len(self.document_tokens)} document_tokens: give one of each per document"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AfterCut:
    """Held-out loss in nats per token right after pruning, before any training."""

    loss: float
    loss_stderr: float | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AssistantRun:
    """The model between teacher and student in a chain; losses are held out, nats per token."""

    parameters: Parameters
    shape: dict[str, Any]
    tokens: int
    learning_rate: float
    after_cut: float | None = None
    loss: float | None = None
    loss_stderr: float | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainingCurve:
    """Training metrics, each the mean since the point before; null where no teacher took part."""

    step: list[int] = Field(default_factory=list)
    tokens: list[int] = Field(default_factory=list)
    ce: _Trace = Field(default_factory=list)
    kl: _Trace = Field(default_factory=list)
    teacher_ce: _Trace = Field(default_factory=list)
    teacher_entropy: _Trace = Field(default_factory=list)
    agreement: _Trace = Field(default_factory=list)
    gradient_norm: _Trace = Field(default_factory=list)
    learning_rate: _Trace = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunRecord:
    """One run: a teacher's training, a cell (a distilled student) or its CE-only baseline.

    `student_size` and `teacher_size` are the non-embedding sizes asked for in the recipe, which
    group runs into curves; the sizes reached are in `parameters` and `teacher_parameters`. `tokens`
    are those asked for, `steps` x `batch_tokens` those that the run itself took: less than asked
    where an assistant took a part of the same FLOPs. A baseline with `equal_flops_to` has the FLOPs
    of that cell, its teacher's forward passes included, in place of its tokens.
    """

    schema: Literal[1] = SCHEMA
    kind: Literal["teacher", "cell", "baseline"]
    id: str = Field(min_length=1)
    status: Literal["done", "failed"]
    failure: Failure | None = None
    architecture: str
    seed: int
    init: Init | None = None
    student_size: int | None = None
    teacher_size: int | None = None
    teacher: str | None = None
    parameters: Parameters
    teacher_parameters: Parameters | None = None
    shape: dict[str, Any] | None = None
    tokens: int
    steps: int
    batch_tokens: int
    learning_rate: float | None
    alpha: float
    temperature: float
    divergence: str = "forward_kl"
    teacher_dtype: str | None = None
    recipe_hash: str
    corpus_hash: str
    flops: Flops
    heldout: Heldout | None = None
    after_cut: AfterCut | None = None
    assistant: AssistantRun | None = None
    equal_flops_to: str | None = None
    curve: TrainingCurve
    wall_seconds: float | None = None
    versions: dict[str, str]
    machine: dict[str, Any]
    started: str | None = None
    finished: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> "RunRecord":
        if self.status == "done" and self.heldout is None:
            raise ValueError("status is done but heldout is missing")
        if self.status == "failed" and self.failure is None:
            raise ValueError("status is failed but failure is missing")
        needed = {
            "teacher": ("teacher_size",),
            "cell": ("init", "student_size", "teacher_size", "teacher", "teacher_parameters"),
            "baseline": ("init", "student_size"),
        }[self.kind]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"a {self.kind} record needs {', '.join(missing)}")
        return self


_ADAPTER: TypeAdapter[RunRecord] = TypeAdapter(RunRecord)


def record_from_dict(values: dict[str, Any], *, source: str = "record") -> RunRecord:
    """Check plain values, as read from JSON, and return the record they make.

    `source` names them in the error. Raises UserError for an unknown schema, an unknown or
    missing key, a wrong type or a number that is not finite.
    """
    found = values.get("schema") if isinstance(values, dict) else None
    if found != SCHEMA:
        raise UserError(
            f"{source}: schema {found!r} is not known; this version of capgap reads schema {SCHEMA}"
        )
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{source}: {place + ': ' if place else ''}{first['msg']}; mend or delete it"
        ) from None


def write_record(folder: Path | str, record: RunRecord) -> Path:
    """Write `record` as folder/record.json in one atomic step and return that path."""
    path = Path(folder) / RECORD_FILE
    write_json(path, dataclasses.asdict(record))
    return path


def read_record(folder: Path | str) -> RunRecord:
    """Read folder/record.json. Raises UserError, naming the file, if it is missing or broken."""
    path = Path(folder) / RECORD_FILE
    if not path.exists():
        raise UserError(f"{path} does not exist: give the folder of a finished run")
    return record_from_dict(read_json(path), source=str(path))


def read_records(out_folder: Path | str) -> list[RunRecord]:
    """Read records/*/record.json of a sweep's output folder, sorted by id.

    A run folder without a record is a run not finished yet, and is passed over.
    Raises UserError if there is no records folder, or for the first broken file.
    """
    root = Path(out_folder) / "records"
    if not root.is_dir():
        raise UserError(f"{root} does not exist: give the output folder of a sweep")
    records = [read_record(path.parent) for path in root.glob(f"*/{RECORD_FILE}")]
    return sorted(records, key=lambda record: record.id)
