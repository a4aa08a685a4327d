"""The stage `prune`: a student of an exact size, cut out of a teacher tensor by tensor."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from capgap.artifact import file_hash
from capgap.errors import UserError
from capgap.models.shape import Shape
from capgap.prune.shape import (
    Distance,
    Target,
    changed_shape,
    from_axes,
    from_ladder,
    keep_target,
    suited,
)
from capgap.section import Count, PositiveFraction, Section
from capgap.sizes import clock_time, format_bytes, format_count
from capgap.stage import ARGUMENT, HOW, Mark, Say, ShouldStop, Stage, paced, text_table

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from capgap.prune.importance import Importance
    from capgap.prune.surgery import Kept

PROVENANCE = "pruning.json"
TOLD_CANDIDATES = 8
TRIED_CONFIGS = 200
# A cut of at most so much is opened when it is written, whole; a larger one where it is used
TRIED_BYTES = 10**9
# What a plain disk reads or writes, bytes a second: the time of a cut is that of reading twice
# (once for the hash) and writing once
DISK_SPEED = 500e6
Prefer = Literal["axes", "ladder", "score"]


def _sizes(given: Any) -> Any:
    """ "hidden=3072,layers=24" as numbers."""
    if not isinstance(given, str):
        return given
    sizes = {}
    for part in given.split(","):
        name, _, number = part.partition("=")
        if not number.strip().isdigit():
            raise ValueError(
                f"{part!r} is not of the form hidden=3072 (sizes are parted by commas)"
            )
        sizes[name.strip()] = int(number)
    return sizes


class Cut(Section):
    """How large the student is to be; with a shape, one of the ways to say it."""

    keep: Annotated[
        PositiveFraction | None,
        "Share of the non-embedding parameters, such as 0.4.",
    ] = None
    params: Annotated[Count | None, "Non-embedding parameters, such as 3B."] = None
    total_params: Annotated[Count | None, "All parameters, such as 3B."] = None

    @property
    def sizes(self) -> dict[str, int]:
        """Of a shape, those that are named."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = {"keep": self.keep, "params": self.params, "total_params": self.total_params}
        given = [name for name, value in ways.items() if value is not None]
        given += ["shape"] if self.sizes else []
        if len(given) != 1:
            told = " and ".join(given) or "none"
            raise ValueError(
                "give one of keep, params, total_params and shape (some of hidden, heads, kv_heads,"
                f" ffn and layers) for the student's size, not {told}"
            )
        return self


class PruneSection(Cut):
    """What is cut out of the teacher; sizes that are not named stay as the teacher has them."""

    hidden: Annotated[Count | None, "Hidden width."] = None
    heads: Annotated[Count | None, "Query heads."] = None
    kv_heads: Annotated[Count | None, "Key-value heads."] = None
    ffn: Annotated[Count | None, "FFN width."] = None
    layers: Annotated[Count | None, "Layers."] = None

    @property
    def sizes(self) -> dict[str, int]:
        names = ("hidden", "heads", "kv_heads", "ffn", "layers")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class Prune(Cut, Stage):
    """Cut a student of an exact size out of a teacher."""

    continues: ClassVar[bool] = False
    saves_when_asked: ClassVar[bool] = False

    teacher: Annotated[str, ARGUMENT, Mark.MODEL, "A Hugging Face folder or name."]
    out: Annotated[Path, HOW, "Folder for the student; it must not exist."]
    scores: Annotated[
        Path | None, "What `capgap score` measured of the teacher; only --dry-run goes without."
    ] = None
    shape: Annotated[
        Annotated[dict[str, int], BeforeValidator(_sizes)] | None,
        "hidden=3072,heads=24,ffn=8192,layers=24, also kv_heads and vocabulary: the rest stays.",
    ] = None
    multiple: Annotated[
        Count | None,
        "Hidden and FFN width are multiples of it; if none, of 128 from 500M on and else of 8.",
    ] = None
    prefer: Annotated[
        Prefer | None, "Of shapes of one size, axes for --keep, else ladder, if not given:"
    ] = None
    dry_run: Annotated[
        bool, HOW, "Tell shape, parameters, memory and time; read no weights, write nothing."
    ] = False

    @property
    def sizes(self) -> dict[str, int]:
        return self.shape or {}

    @model_validator(mode="after")
    def _scored(self) -> Self:
        if self.prefer == "score" and self.scores is None:
            raise ValueError("prefer score needs scores")
        return self

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Writes the student as a Hugging Face folder with pruning.json beside it.

        One tensor of the teacher and one file of the student are in memory at a time. UserError for
        the user's mistakes; nothing is written then, and no half folder stays when it is stopped.
        """
        return _told(self, _plan(self)) if self.dry_run else _run(self, say)

    def told(self, found: dict[str, Any]) -> str:
        """The candidates, the chosen one, and what it takes."""
        return _table(found) + _summary(found)

    def result(self, found: dict[str, Any]) -> str:
        return f"{format_count(found['parameters']['non_embedding'])} non-embedding parameters"

    @property
    def record_file(self) -> Path:
        return self.out / PROVENANCE


@dataclass(frozen=True)
class _Plan:
    """The shape and what it was chosen from, the best first."""

    config: "PreTrainedConfig"
    own: Shape
    shape: Shape
    target: Target
    candidates: list[Shape]
    rule: str
    distance: Distance | None
    importance: "Importance | None"


def _run(request: Prune, say: Say) -> dict[str, Any]:
    from capgap.artifact import write_json
    from capgap.models.build import load_model
    from capgap.models.identity import model_hash
    from capgap.models.stored import (
        StoredWeights,
        copy_companions,
        empty_model,
        local_folder,
        write_weights,
        written_beside,
    )
    from capgap.prune.surgery import Surgery, check_cut, choose, cut_config

    if request.out.exists():
        raise UserError(f"{request.out} exists: choose another folder, or delete it")
    if request.scores is None:
        raise UserError(
            f"a cut needs scores: make some with `capgap score {request.teacher} --corpus FOLDER "
            "--out scores.safetensors`"
        )
    began = time.monotonic()
    tell = paced(say)
    plan = _plan(request)
    assert plan.importance is not None
    check_cut(plan.own, plan.importance, plan.shape)
    source = local_folder(request.teacher)
    _check_words(source, plan)
    weights = StoredWeights(source)
    kept = choose(plan.importance, plan.shape)
    surgery = Surgery(plan.own, plan.shape, kept)
    weights.check(one.name for one in surgery.sources.values())
    teacher_hash = model_hash(source)
    _check_scores(request, plan.importance, teacher_hash)
    config = cut_config(plan.config, plan.shape, kept.layers.tolist())
    model = empty_model(config)
    config.architectures = [type(model).__name__]
    skeleton = {
        name: tensor.to(weights.dtype(surgery.sources[name].name))
        for name, tensor in model.named_parameters()
    }
    assert skeleton.keys() == surgery.sources.keys()
    done = 0

    def make(name: str) -> Any:
        nonlocal done
        done += 1
        tell(lambda: f"prune: {done} of {len(skeleton)} tensors")
        return surgery.tensor(name, weights)

    with written_beside(request.out) as folder:
        config.save_pretrained(folder)
        write_weights(folder, skeleton, make)
        copy_companions(source, folder)
        write_json(folder / PROVENANCE, _provenance(request, plan, kept, teacher_hash))
        if sum(one.nbytes for one in skeleton.values()) <= TRIED_BYTES:
            load_model(folder)  # refuses a model whose logits are not those of its parts
    return _told(request, plan) | {"written": True, "seconds": time.monotonic() - began}


def _provenance(request: Prune, plan: _Plan, kept: "Kept", teacher_hash: str) -> dict[str, Any]:
    """What was cut out of what, and why these units."""
    assert request.scores is not None
    assert plan.importance is not None
    return {
        "schema": 1,
        "teacher": request.teacher,
        "teacher_hash": teacher_hash,
        "teacher_shape": vars(plan.own),
        "shape": vars(plan.shape),
        "parameters": plan.shape.parameters().as_dict(),
        "rule": plan.rule,
        "scores": {
            "sha256": file_hash(request.scores),
            "tokens": plan.importance.tokens,
            **plan.importance.provenance,
        },
        "kept": {
            name: getattr(kept, name).tolist() for name in ("layers", "hidden", "heads", "neurons")
        },
    }


def _plan(request: Prune) -> _Plan:
    from capgap.models.build import shape_of
    from capgap.models.stored import read_config
    from capgap.prune.importance import load_importance
    from capgap.prune.surgery import check_cut_config

    config = read_config(request.teacher)
    own = shape_of(config)
    importance = None if request.scores is None else load_importance(request.scores)
    if request.sizes:
        shape = changed_shape(own, request.sizes)
        check_cut_config(config, shape)
        target = Target(shape.parameters().non_embedding)
        return _Plan(config, own, shape, target, [shape], "as asked", None, importance)
    target, prefer = _target(request, own)
    keep = target.parameters / target.count(own)
    distance, rule = {
        "axes": (lambda: from_axes(own, keep), "hidden, and heads with ffn, cut alike"),
        "ladder": (lambda: from_ladder(own, target), "in balance with the family's ladder"),
        "score": (lambda: _score_lost(own, importance), "the most score kept"),
    }[prefer]
    by = distance()
    layers = own.layers if prefer == "axes" else None
    shapes = _taken(config, suited(own, target, by, layers=layers, multiple=request.multiple))
    return _Plan(config, own, shapes[0], target, shapes, rule, by, importance)


def _taken(config: "PreTrainedConfig", shapes: list[Shape]) -> list[Shape]:
    """From the first on whose config transformers takes; UserError where it takes none."""
    from capgap.prune.surgery import check_cut_config

    problem: UserError | None = None
    for place, shape in enumerate(shapes[:TRIED_CONFIGS]):
        try:
            check_cut_config(config, shape)
        except UserError as error:
            problem = problem or error
            continue
        return shapes[place:]
    assert problem is not None
    raise problem


def _target(request: Prune, own: Shape) -> tuple[Target, Prefer]:
    if request.keep is not None:
        target = keep_target(own, request.keep)
        return target, request.prefer or "axes"
    total = request.params is None
    parameters = request.total_params if total else request.params
    assert parameters is not None
    target = Target(parameters, total=total)
    return target, request.prefer or "ladder"


def _score_lost(own: Shape, importance: "Importance | None") -> Distance:
    from capgap.prune.surgery import check_cut, score_lost

    assert importance is not None
    check_cut(own, importance, own)
    return score_lost(importance)


def _check_words(source: Path, plan: _Plan) -> None:
    """Rows that pad the table may go, those of tokens may not."""
    if plan.shape.vocabulary == plan.own.vocabulary:
        return
    from capgap.corpus.tokenizer import load_tokenizer

    words = max(load_tokenizer(source).get_vocab().values()) + 1
    if plan.shape.vocabulary < words:
        raise UserError(
            f"cannot cut to vocabulary {plan.shape.vocabulary}: the tokenizer of {source} has "
            f"{words} tokens"
        )


def _check_scores(request: Prune, importance: "Importance", teacher_hash: str) -> None:
    measured = importance.provenance.get("teacher_hash")
    if measured not in (None, teacher_hash):
        raise UserError(
            f"{request.scores} holds scores of another model ({importance.provenance['teacher']}): "
            f"make some with `capgap score {request.teacher}`"
        )


def _told(request: Prune, plan: _Plan) -> dict[str, Any]:
    """What `capgap prune --json` prints."""
    from capgap.models.stored import SHARD_BYTES, empty_model

    tensors = list(empty_model(plan.config).parameters())
    width = getattr(plan.config.dtype, "itemsize", 4)
    largest = width * max(tensor.numel() for tensor in tensors)
    parameters = plan.shape.parameters()
    own_bytes, own_bytes_cut = width * plan.own.parameters().total, width * parameters.total
    return {
        "folder": str(request.out),
        "written": False,
        "architecture": plan.own.architecture,
        "shape": vars(plan.shape),
        "parameters": parameters.as_dict(),
        "teacher_shape": vars(plan.own),
        "teacher_parameters": plan.own.parameters().as_dict(),
        "target": {
            "parameters": plan.target.parameters,
            "counted": "total" if plan.target.total else "non_embedding",
        },
        "rule": plan.rule,
        "num_candidates": len(plan.candidates),
        "candidates": [
            {
                "shape": vars(shape),
                "parameters": plan.target.count(shape),
                "error": plan.target.error(shape),
                "distance": None if plan.distance is None else plan.distance(shape),
            }
            for shape in plan.candidates[:TOLD_CANDIDATES]
        ],
        "dtype": str(plan.config.dtype or "float32").removeprefix("torch."),
        "student_bytes": own_bytes_cut,
        "largest_tensor_bytes": largest,
        "peak_bytes": min(own_bytes_cut, SHARD_BYTES) + largest,
        "expected_seconds": (2 * own_bytes + own_bytes_cut) / DISK_SPEED,
    }


def _table(found: dict[str, Any]) -> str:
    """Of several candidates; nothing of one."""
    if len(found["candidates"]) < 2:
        return ""
    counted = found["target"]["counted"].replace("_", "-")
    names = ("layers", "hidden", "heads", "kv_heads", "ffn")
    rows = [
        [
            *(str(one["shape"][name]) for name in names),
            f"{one['parameters']:,}",
            f"{one['error']:+.2%}",
            f"{one['distance']:.4f}",
        ]
        for one in found["candidates"]
    ]
    asked = f"{found['target']['parameters']:,} {counted} parameters"
    head = f"{found['num_candidates']:,} shapes come within 1% of {asked}; "
    table = text_table([*names, counted, "off target", "distance"], rows)
    return f"{head}preferred: {found['rule']}\n{table}\n\n"


def _summary(found: dict[str, Any]) -> str:
    shape, parameters = found["shape"], found["parameters"]
    of = parameters["non_embedding"] / found["teacher_parameters"]["non_embedding"]
    told = (
        f"{found['architecture']} of {shape['layers']} layers, hidden {shape['hidden']}, "
        f"{shape['heads']} heads of {shape['head_size']}, ffn {shape['ffn']}, vocabulary "
        f"{shape['vocabulary']}: {format_count(parameters['non_embedding'])} non-embedding "
        f"parameters ({of:.1%} of the teacher's), {format_count(parameters['total'])} in all\n"
    )
    size = format_bytes(found["student_bytes"])
    if found["written"]:
        return f"{told}{size} in {found['folder']}"
    return (
        f"{told}{size} in {found['dtype']}; the cut takes at most "
        f"{format_bytes(found['peak_bytes'])} of memory beside Python's, and about "
        f"{clock_time(found['expected_seconds'])} with a disk of {DISK_SPEED / 1e6:.0f} MB/s"
    )
