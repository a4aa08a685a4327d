"""The stage `prune`: a student of an exact size, cut out of a teacher tensor by tensor."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from capgap.artifact import file_hash, write_json
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
from capgap.section import Count, PositiveFraction, Section, Size
from capgap.sizes import clock_time, format_bytes, format_count, parse_size
from capgap.stage import ARGUMENT, HOW, Mark, Say, Stage, paced, text_table

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from capgap.prune.importance import Importance

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


@dataclass(frozen=True)
class Candidates:
    """The shapes of a student to choose from, the best first."""

    teacher: Shape
    target: Target
    shapes: list[Shape]
    rule: str
    distance: Distance | None = None

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def sizes(self) -> dict[str, Any]:
        """What pruning.json and `--json` say of them alike."""
        return {
            "teacher_shape": vars(self.teacher),
            "shape": vars(self.shape),
            "parameters": self.shape.parameters().as_dict(),
            "rule": self.rule,
        }


class Cut(Section):
    """How large the student is to be; with a shape, one of the ways to say it."""

    keep: Annotated[
        PositiveFraction | None,
        "Share of the non-embedding parameters, such as 0.4.",
    ] = None
    params: Annotated[
        Size | None, "Parameters, 3B without embeddings or `3.2B total` with them."
    ] = None

    @property
    def sizes(self) -> dict[str, int]:
        """Of a shape, those that are named."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = {"keep": self.keep, "params": self.params}
        given = [name for name, value in ways.items() if value is not None]
        given += ["shape"] if self.sizes else []
        if len(given) != 1:
            told = " and ".join(given) or "none"
            raise ValueError(
                "give one of keep, params and shape (some of hidden, heads, kv_heads, ffn and "
                f"layers) for the student's size, not {told}"
            )
        return self

    def candidates(
        self,
        teacher: Shape,
        *,
        multiple: int | None = None,
        prefer: Prefer | None = None,
        lost: Distance | None = None,
    ) -> Candidates:
        """Of a teacher; `lost` is how `prefer` score compares them."""
        if self.sizes:
            shape = changed_shape(teacher, self.sizes)
            target = Target(shape.parameters().non_embedding)
            return Candidates(teacher, target, [shape], "as asked")
        if self.keep is not None:
            target = keep_target(teacher, self.keep)
        else:
            assert self.params is not None
            target = Target(*parse_size(self.params))
        layers = None
        prefer = prefer or ("ladder" if self.keep is None else "axes")
        if prefer == "axes":
            rule, layers = "hidden, and heads with ffn, cut alike", teacher.layers
            distance = from_axes(teacher, target.parameters / target.count(teacher))
        elif prefer == "ladder":
            rule = "in balance with the family's ladder"
            distance = from_ladder(teacher, target)
        else:
            assert lost is not None
            rule, distance = "the most score kept", lost
        shapes = suited(teacher, target, distance, layers=layers, multiple=multiple)
        return Candidates(teacher, target, shapes, rule, distance)


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

    def run(self, *, say: Say = lambda text: None, **_: Any) -> dict[str, Any]:
        """Writes the student as a Hugging Face folder with pruning.json beside it.

        One tensor of the teacher and one file of the student are in memory at a time. UserError for
        the user's mistakes; nothing is written then, and no half folder stays when it is stopped.
        """
        return _told(self, *_plan(self)[:2]) if self.dry_run else _run(self, say)

    def told(self, found: dict[str, Any]) -> str:
        """The candidates, the chosen one, and what it takes."""
        return _table(found) + _summary(found)

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        if not found["written"]:
            return ()
        asked = ("--corpus", "CORPUS", "--tokens", "TOKENS", "--out", "distilled")
        return ("distill", self.teacher, self.out, *asked)

    def result(self, found: dict[str, Any]) -> str:
        return f"{format_count(found['parameters']['non_embedding'])} non-embedding parameters"

    @property
    def record_file(self) -> Path:
        return self.out / PROVENANCE


def _run(request: Prune, say: Say) -> dict[str, Any]:
    from capgap.models import stored
    from capgap.models.build import load_model
    from capgap.models.identity import model_hash
    from capgap.prune.surgery import Surgery, check_cut, choose, cut_config

    if request.out.exists():
        raise UserError(f"{request.out} exists: choose another folder, or delete it")
    if request.scores is None:
        raise UserError(
            f"a cut needs scores: make some with `capgap score {request.teacher} --corpus FOLDER "
            "--out scores.safetensors`"
        )
    began, tell = time.monotonic(), paced(say)
    teacher_config, found, importance = _plan(request)
    assert importance is not None
    check_cut(found.teacher, importance, found.shape)
    source = stored.local_folder(request.teacher)
    _check_words(source, found)
    weights = stored.StoredWeights(source)
    kept = choose(importance, found.shape)
    surgery = Surgery(found.teacher, found.shape, kept)
    weights.check(one.name for one in surgery.sources.values())
    teacher_hash, scored = model_hash(source), importance.provenance
    if scored.get("teacher_hash") not in (None, teacher_hash):
        raise UserError(
            f"{request.scores} holds scores of another model ({scored['teacher']}): make some with "
            f"`capgap score {request.teacher}`"
        )
    provenance = {
        "schema": 1,
        "teacher": request.teacher,
        "teacher_hash": teacher_hash,
        **found.sizes,
        "scores": {"sha256": file_hash(request.scores), "tokens": importance.tokens, **scored},
        "kept": {unit: indices.tolist() for unit, indices in kept.items()},
    }
    config = cut_config(teacher_config, found.shape, kept["layers"].tolist())
    skeleton = {
        name: tensor.to(weights.dtype(surgery.sources[name].name))
        for name, tensor in stored.skeleton_of(config).items()
    }
    assert skeleton.keys() == surgery.sources.keys()

    def make(name: str) -> "Tensor":
        return surgery.tensor(name, weights)

    def on_tensor(done: int) -> None:
        tell(lambda: f"prune: {done} of {len(skeleton)} tensors")

    with stored.written_beside(request.out) as folder:
        config.save_pretrained(folder)
        stored.write_weights(folder, skeleton, make, on_tensor=on_tensor)
        stored.copy_companions(source, folder)
        write_json(folder / PROVENANCE, provenance)
        if sum(one.nbytes for one in skeleton.values()) <= TRIED_BYTES:
            load_model(folder)  # refuses a model whose logits are not those of its parts
    told = _told(request, teacher_config, found)
    return told | {"written": True, "seconds": time.monotonic() - began}


def _plan(request: Prune) -> "tuple[PreTrainedConfig, Candidates, Importance | None]":
    """The teacher's config, the shapes of which transformers takes the config, from the first that
    it takes, and the scores, where there are some. UserError where it takes none."""
    from capgap.models.build import shape_of
    from capgap.models.stored import read_config
    from capgap.prune.importance import load_importance
    from capgap.prune.surgery import check_cut, check_cut_config, score_lost

    config = read_config(request.teacher)
    own = shape_of(config)
    importance = None if request.scores is None else load_importance(request.scores)
    lost = None
    if request.prefer == "score" and importance is not None and not request.sizes:
        check_cut(own, importance, own)
        lost = score_lost(importance)
    found = request.candidates(own, multiple=request.multiple, prefer=request.prefer, lost=lost)
    problems = []
    for place, shape in enumerate(found.shapes[:TRIED_CONFIGS]):
        try:
            check_cut_config(config, shape)
            return config, replace(found, shapes=found.shapes[place:]), importance
        except UserError as error:
            problems.append(error)
    raise problems[0]


def _check_words(source: Path, found: Candidates) -> None:
    """Rows that pad the table may go, those of tokens may not."""
    if found.shape.vocabulary == found.teacher.vocabulary:
        return
    from capgap.corpus.tokenizer import load_tokenizer, num_words

    words = num_words(load_tokenizer(source))
    if found.shape.vocabulary < words:
        raise UserError(
            f"cannot cut to vocabulary {found.shape.vocabulary}: the tokenizer of {source} has "
            f"{words} tokens"
        )


def _told(request: Prune, config: "PreTrainedConfig", found: Candidates) -> dict[str, Any]:
    """What `capgap prune --json` prints."""
    from capgap.models.stored import SHARD_BYTES, empty_model

    width = getattr(config.dtype, "itemsize", 4)
    largest = width * max(one.numel() for one in empty_model(config).parameters())
    teacher, sizes = found.teacher.parameters(), found.sizes
    student_bytes = width * sizes["parameters"]["total"]
    return {
        "folder": str(request.out),
        "written": False,
        "architecture": found.teacher.architecture,
        **sizes,
        "teacher_parameters": teacher.as_dict(),
        "target": {
            "parameters": found.target.parameters,
            "counted": "total" if found.target.total else "non_embedding",
        },
        "num_candidates": len(found.shapes),
        "candidates": [
            {
                "shape": vars(shape),
                "parameters": found.target.count(shape),
                "error": found.target.error(shape),
                "distance": None if found.distance is None else found.distance(shape),
            }
            for shape in found.shapes[:TOLD_CANDIDATES]
        ],
        "dtype": str(config.dtype or "float32").removeprefix("torch."),
        "student_bytes": student_bytes,
        "largest_tensor_bytes": largest,
        "peak_bytes": min(student_bytes, SHARD_BYTES) + largest,
        "expected_seconds": (2 * width * teacher.total + student_bytes) / DISK_SPEED,
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
