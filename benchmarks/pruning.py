"""What a score of units is worth: held-out loss right after the cut, and after distillation.

    python benchmarks/pruning.py --out runs/pruning --source TEXT --heldout TEXT

Teachers of two families and two seeds are trained, cut to four sizes by every score, and distilled
for a fixed number of tokens. Width: hidden units, heads and neurons go, layers stay. Depth: layers
go. Every finished column is a line of results.jsonl; a restart goes on. With `--draw FOLDER` the
tables and the picture of docs/results/pruning.md are made from it.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

FAMILIES = {"llama": 384, "gpt_neox": 576}  # FFN widths that give both about 1.06M
SEEDS = (0, 1)
KEEPS = (0.8, 0.6, 0.4, 0.2)
WIDTH_SCORES = ("first_order", "weights", "activation", "norm", "random")
# layers by a method of their own, or as the score of the units has it
DEPTH_SCORES = {
    "first_order": ("first_order", None),
    "weights": ("weights", None),
    "influence": ("activation", None),
    "norm": ("norm", None),
    "ends": ("random", "ends"),
    "random": ("random", None),
}
WINDOW = 128
BATCH_WINDOWS = 8
TEACHER_TOKENS = 3_000_000
STUDENT_TOKENS = 500_000
SCORED_WINDOWS = 256


def teacher_shape(family: str) -> Any:
    from capgap.models.shape import Shape

    return Shape(family, 128, 5, 8, 8, 16, FAMILIES[family], 2048, WINDOW, True)


def train_teacher(family: str, seed: int, folder: Path) -> None:
    import torch

    from capgap.corpus.text import Text
    from capgap.models.build import build_model, save_model
    from capgap.train.learner import Learner
    from capgap.train.learning_rate import auto_learning_rate
    from capgap.train.loop import LoopSettings, train

    torch.set_num_threads(1)
    if (folder / f"{family}-seed{seed}").exists():
        return
    corpus = Text.open([(folder / "corpus", None)], WINDOW)
    shape = teacher_shape(family)
    model = build_model(shape, seed=seed)
    rate = auto_learning_rate(shape.parameters().non_embedding)
    learner = Learner("teacher", model, TEACHER_TOKENS // (BATCH_WINDOWS * WINDOW), rate)
    settings = LoopSettings(BATCH_WINDOWS, BATCH_WINDOWS, data_seed=1_000_003 + seed)
    train([learner], corpus, settings, checkpoint_folder=folder / "work" / f"{family}-{seed}")
    save_model(model, folder / f"{family}-seed{seed}", corpus.tokenizer)


def students(family: str, kind: str, keep: float) -> tuple[Any, Iterable[tuple[str, Any, Any]]]:
    """The shape, and (name, method, depth) of every score."""
    from capgap.prune.shape import from_axes, keep_target, search

    own = teacher_shape(family)
    if kind == "depth":
        shape = replace(own, layers=round(keep * own.layers))
        return shape, [(name, *how) for name, how in DEPTH_SCORES.items()]
    shapes = search(own, keep_target(own, keep), from_axes(own, keep), layers=own.layers)
    return shapes[0], [(name, name, "ends") for name in WIDTH_SCORES]


def measure(family: str, seed: int, kind: str, keep: float, folder: Path) -> dict[str, Any]:
    """One column: students of one shape, chosen by every score, distilled side by side."""
    import torch

    from capgap.corpus.text import Text, batch_indices
    from capgap.distill.teacher import load_teacher
    from capgap.evaluate.losses import evaluate_heldout, heldout_set
    from capgap.models.build import load_model
    from capgap.models.parts import Parts
    from capgap.prune.importance import score
    from capgap.prune.surgery import choose, cut
    from capgap.train.learner import Learner
    from capgap.train.learning_rate import auto_learning_rate
    from capgap.train.loop import LoopSettings, train

    torch.set_num_threads(1)
    corpus = Text.open([(folder / "corpus", None)], WINDOW)
    heldout = heldout_set(corpus.heldout_documents(), corpus.marks, WINDOW, corpus.vocabulary)
    path = folder / f"{family}-seed{seed}"
    model = load_model(path)
    indices = batch_indices(
        seed=3_000_017, step=0, batch_windows=SCORED_WINDOWS, num_windows=corpus.windows
    )
    batches = torch.from_numpy(corpus.train.windows_at(indices)).split(8)
    shape, scores = students(family, kind, keep)
    rate = auto_learning_rate(shape.parameters().non_embedding, is_cut=True)
    learners: dict[str, Learner] = {}
    names: dict[str, str] = {}
    after_cut: dict[str, float] = {}
    for name, method, depth in scores:
        importance = score(model, batches, method=method, depth=depth, seed=seed)
        kept = choose(importance, shape)
        # scores that keep the same units make the same student
        units = str([indices.tolist() for indices in kept.values()])
        if units not in names:
            names[units] = name
            steps = STUDENT_TOKENS // (BATCH_WINDOWS * WINDOW)
            learners[name] = Learner(name, cut(model, importance, shape), steps, rate, 0.5)
            after_cut[name] = evaluate_heldout(Parts(learners[name].model), heldout).loss
        names[name] = names[units]
    work = folder / "work" / f"{family}-{seed}-{kind}-{keep:g}"
    train(
        list(learners.values()),
        corpus,
        LoopSettings(BATCH_WINDOWS, BATCH_WINDOWS, data_seed=2_000_003 + seed),
        teacher=load_teacher(path, "cpu"),
        checkpoint_folder=work,
    )
    losses = {
        name: evaluate_heldout(Parts(learner.model), heldout).loss
        for name, learner in learners.items()
    }
    return {
        "family": family,
        "seed": seed,
        "kind": kind,
        "keep": keep,
        "parameters": shape.parameters().non_embedding,
        "shape": vars(shape),
        "teacher": evaluate_heldout(Parts(model), heldout).loss,
        "scores": {
            name: {"after_cut": after_cut[names[name]], "distilled": losses[names[name]]}
            for name, *_ in scores
        },
    }


def table(results: list[dict[str, Any]], kind: str, what: str) -> str:
    """Mean over seeds; the lowest of every row in bold, and beside it how far seeds scatter."""
    names = WIDTH_SCORES if kind == "width" else tuple(DEPTH_SCORES)
    lines = ["| family, keep | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for family, keep in itertools.product(FAMILIES, KEEPS):
        runs = _of(results, kind, family, keep)
        if not runs:
            continue
        means = {
            name: _mean(runs, lambda run, name=name: run["scores"][name][what]) for name in names
        }
        best = f"{min(means.values()):.3f}"
        cells = [f"**{best}**" if f"{one:.3f}" == best else f"{one:.3f}" for one in means.values()]
        lines.append(f"| {family}, {keep:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(results: list[dict[str, Any]], kind: str, what: str) -> str:
    """How far above the best of its column a score is: mean and standard error over columns."""
    names = WIDTH_SCORES if kind == "width" else tuple(DEPTH_SCORES)
    lines = [
        "| score | above the best of its column | columns in which it is the best |",
        "|---|---|---|",
    ]
    runs = [run for run in results if run["kind"] == kind]
    above: dict[str, list[float]] = {name: [] for name in names}
    for run in runs:
        lowest = min(run["scores"][name][what] for name in names)
        for name in names:
            above[name].append(run["scores"][name][what] - lowest)
    for name, values in sorted(above.items(), key=lambda one: statistics.mean(one[1])):
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        wins = sum(value == 0 for value in values)
        lines.append(
            f"| {name} | {statistics.mean(values):.3f} ± {error:.3f} | {wins} of {len(values)} |"
        )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    import altair
    import vl_convert

    panels = [
        _panel(results, *place)
        for place in itertools.product(FAMILIES, ("width", "depth"), ("after_cut", "distilled"))
    ]
    drawn = altair.concat(*panels, columns=4).resolve_scale(y="independent")
    svg = vl_convert.vegalite_to_svg(drawn.to_dict(), allowed_base_urls=[])
    path.write_bytes(vl_convert.svg_to_png(svg, scale=1.3))


def _panel(results: list[dict[str, Any]], family: str, kind: str, what: str) -> Any:
    """Held-out loss over the kept share by every score, and the teacher's."""
    import altair

    rows = [
        {"score": name, "keep": keep, "loss": _mean(runs, lambda run: run["scores"][name][what])}  # noqa: B023
        for name in (WIDTH_SCORES if kind == "width" else DEPTH_SCORES)
        for keep in KEEPS
        if (runs := _of(results, kind, family, keep))
    ]
    own = [run for run in results if run["family"] == family]
    teacher = [{"loss": _mean(own, lambda run: run["teacher"])}]
    told = "after the cut" if what == "after_cut" else "after distillation"
    names = list(dict.fromkeys((*WIDTH_SCORES, *DEPTH_SCORES)))
    scale = altair.Scale(domain=names)
    axis = altair.Axis(values=list(KEEPS))
    share = altair.Scale(reverse=True, zero=False)
    base = altair.Chart(altair.InlineData(values=rows)).encode(
        x=altair.X("keep:Q", title="kept share of the parameters", scale=share, axis=axis),
        y=altair.Y("loss:Q", title="held-out loss, nats per token", scale=altair.Scale(zero=False)),
        color=altair.Color("score:N", scale=scale, title=None),
        shape=altair.Shape("score:N", scale=scale, title=None),
    )
    line = altair.Chart(altair.InlineData(values=teacher)).mark_rule(strokeDash=[2, 2])
    marks = altair.layer(base.mark_line(), base.mark_point(filled=True), line.encode(y="loss:Q"))
    return marks.properties(title=f"{family}, {kind}: {told}", width=240, height=220)


def _of(results: list[dict[str, Any]], kind: str, family: str, keep: float) -> list[dict[str, Any]]:
    wanted = (kind, family, keep)
    return [run for run in results if (run["kind"], run["family"], run["keep"]) == wanted]


def _mean(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.mean(value(run) for run in runs)


def main() -> None:
    from capgap.corpus.prepare import prepare_corpus

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--heldout")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--draw", type=Path, help="a folder for pruning.png; runs nothing")
    arguments = parser.parse_args()
    path = arguments.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.draw is None:
        prepare_corpus(
            arguments.source,
            arguments.out / "corpus",
            vocabulary=2048,
            window=WINDOW,
            max_bytes=40_000_000,
            heldout_source=arguments.heldout,
        )
        done = {(run["family"], run["seed"], run["kind"], run["keep"]) for run in results}
        with ProcessPoolExecutor(arguments.workers) as pool, path.open("a") as log:
            teachers = itertools.product(FAMILIES, SEEDS)
            for made in [pool.submit(train_teacher, *one, arguments.out) for one in teachers]:
                made.result()
            asked = itertools.product(("width", "depth"), KEEPS, SEEDS, FAMILIES)
            waiting = [
                pool.submit(measure, family, seed, kind, keep, arguments.out)
                for kind, keep, seed, family in asked
                if (family, seed, kind, keep) not in done
            ]
            for future in as_completed(waiting):
                results.append(future.result())
                log.write(json.dumps(results[-1]) + "\n")
                log.flush()
    else:
        draw(results, arguments.draw / "pruning.png")
    for kind in ("width", "depth"):
        for what in ("after_cut", "distilled"):
            print(f"\n{kind}, {what}\n\n{table(results, kind, what)}")
            print(f"\n{summary(results, kind, what)}")


if __name__ == "__main__":
    main()
