"""The stage `prune`: a student of an exact size, cut out of a teacher tensor by tensor."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedConfig

    from capgap.prune.importance import Importance
    from capgap.prune.surgery import Kept

PROVENANCE = "pruning.json"
TOLD_CANDIDATES = 8
TRIED_CONFIGS = 200
SAID_EVERY = 10.0  # seconds
# A cut of at most so much is opened when it is written, whole; a larger one where it is used
TRIED_BYTES = 10**9
# What a plain disk reads or writes, bytes a second: the time of a cut is that of reading twice
# (once for the hash) and writing once
DISK_SPEED = 500e6
Prefer = Literal["axes", "ladder", "score"]
PREFER = ("axes", "ladder", "score")


@dataclass(frozen=True)
class PruneRequest:
    """What is cut out of whom. One of keep, params, total_params and sizes says the size.

    keep: share of the non-embedding parameters; params: of these a number, total_params of all;
    sizes: a shape, such as {"hidden": 3072, "layers": 24}, the rest as the teacher has it. `prefer`
    orders shapes of one size: by default `axes` for keep, `ladder` for a number.
    """

    teacher: str
    out: Path
    scores: Path | None = None
    keep: float | None = None
    params: int | None = None
    total_params: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    multiple: int | None = None
    prefer: Prefer | None = None


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


def parse_sizes(text: str) -> dict[str, int]:
    """ "hidden=3072,layers=24" as numbers; UserError for anything else."""
    sizes = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if not number.strip().isdigit():
            raise UserError(
                f"--shape {text!r}: {part!r} is not of the form hidden=3072 (sizes are parted by "
                "commas)"
            )
        sizes[name.strip()] = int(number)
    return sizes


def plan_prune(request: PruneRequest) -> dict[str, Any]:
    """Shape, parameters, memory and time of a cut, without reading weights or writing anything."""
    return _told(request, _plan(request))


def run_prune(
    request: PruneRequest, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Writes the student as a Hugging Face folder with pruning.json beside it.

    One tensor of the teacher and one file of the student are in memory at a time. UserError for the
    user's mistakes; nothing is written then, and no half folder stays when it is stopped.
    """
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
    from capgap.records import write_json_atomically

    if request.out.exists():
        raise UserError(f"{request.out} exists: choose another --out, or delete it")
    if request.scores is None:
        raise UserError(
            f"a cut needs --scores: make some with `capgap score {request.teacher} --corpus FOLDER "
            "--out scores.safetensors`"
        )
    began = said = time.monotonic()
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
        nonlocal done, said
        done += 1
        if time.monotonic() - said > SAID_EVERY:
            said = time.monotonic()
            say(f"prune: {done} of {len(skeleton)} tensors")
        return surgery.tensor(name, weights)

    with written_beside(request.out) as folder:
        config.save_pretrained(folder)
        write_weights(folder, skeleton, make)
        copy_companions(source, folder)
        write_json_atomically(folder / PROVENANCE, _provenance(request, plan, kept, teacher_hash))
        if sum(one.nbytes for one in skeleton.values()) <= TRIED_BYTES:
            load_model(folder)  # refuses a model whose logits are not those of its parts
    return _told(request, plan) | {"written": True, "seconds": time.monotonic() - began}


def _provenance(
    request: PruneRequest, plan: _Plan, kept: "Kept", teacher_hash: str
) -> dict[str, Any]:
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
            "sha256": hashlib.sha256(request.scores.read_bytes()).hexdigest(),
            "tokens": plan.importance.tokens,
            **plan.importance.provenance,
        },
        "kept": {
            name: getattr(kept, name).tolist() for name in ("layers", "hidden", "heads", "neurons")
        },
    }


def _plan(request: PruneRequest) -> _Plan:
    from capgap.models.build import shape_of
    from capgap.models.stored import read_config
    from capgap.prune.scores import load_importance
    from capgap.prune.surgery import check_cut_config

    _check_options(request)
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


def _check_options(request: PruneRequest) -> None:
    asked = {
        "--keep": request.keep is not None,
        "--params": request.params is not None,
        "--total-params": request.total_params is not None,
        "--shape": bool(request.sizes),
    }
    given = [name for name, is_given in asked.items() if is_given]
    if len(given) != 1:
        told = " and ".join(given) if given else "none"
        raise UserError(f"give one of {', '.join(asked)} for the student's size, not {told}")
    if request.multiple is not None and request.multiple < 1:
        raise UserError(f"--multiple {request.multiple} must be above 0")
    if request.prefer not in (None, *PREFER):
        raise UserError(f"--prefer {request.prefer!r}: take one of {', '.join(PREFER)}")
    if request.prefer == "score" and request.scores is None:
        raise UserError("--prefer score needs --scores")


def _target(request: PruneRequest, own: Shape) -> tuple[Target, Prefer]:
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


def _check_scores(request: PruneRequest, importance: "Importance", teacher_hash: str) -> None:
    measured = importance.provenance.get("teacher_hash")
    if measured not in (None, teacher_hash):
        raise UserError(
            f"{request.scores} holds scores of another model ({importance.provenance['teacher']}): "
            f"make some with `capgap score {request.teacher}`"
        )


def _told(request: PruneRequest, plan: _Plan) -> dict[str, Any]:
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


def print_cut(found: dict[str, Any], console: "Console") -> None:
    """The same for a person: the candidates, the chosen one, and what it takes."""
    from rich.table import Table

    from capgap.sizes import clock_time, format_bytes, format_count

    counted = found["target"]["counted"]
    if len(found["candidates"]) > 1:
        table = Table(box=None, title_justify="left", pad_edge=False)
        names = ("layers", "hidden", "heads", "kv_heads", "ffn")
        for name in (*names, counted.replace("_", "-"), "off target", "distance"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in found["candidates"]:
            table.add_row(
                *(str(one["shape"][name]) for name in names),
                f"{one['parameters']:,}",
                f"{one['error']:+.2%}",
                f"{one['distance']:.4f}",
            )
        console.print(
            f"{found['num_candidates']:,} shapes come within 1% of "
            f"{found['target']['parameters']:,} {counted.replace('_', '-')} parameters; "
            f"preferred: {found['rule']}"
        )
        console.print(table)
        console.print()
    shape, parameters = found["shape"], found["parameters"]
    of = parameters["non_embedding"] / found["teacher_parameters"]["non_embedding"]
    console.print(
        f"{found['architecture']} of {shape['layers']} layers, hidden {shape['hidden']}, "
        f"{shape['heads']} heads of {shape['head_size']}, ffn {shape['ffn']}, vocabulary "
        f"{shape['vocabulary']}: {format_count(parameters['non_embedding'])} non-embedding "
        f"parameters ({of:.1%} of the teacher's), {format_count(parameters['total'])} in all"
    )
    size = format_bytes(found["student_bytes"])
    if found["written"]:
        console.print(f"{size} in {found['folder']}")
    else:
        console.print(
            f"{size} in {found['dtype']}; the cut takes at most {format_bytes(found['peak_bytes'])}"
            f" of memory beside Python's, and about {clock_time(found['expected_seconds'])} "
            f"with a disk of {DISK_SPEED / 1e6:.0f} MB/s"
        )
