"""Pictures of records: gain, compute, teachers, training, a search. Pure functions."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

import altair

from capgap.law.data import baseline_key, baselines_by_key
from capgap.law.law import Group
from capgap.records import RunRecord
from capgap.report import draw, numbers
from capgap.report.charts import LOSS, TEACHER, student_looks, student_name
from capgap.report.draw import Absent, Frame, Look, Pair, Picture, Row, in_words, row
from capgap.report.results import Results, heldout_loss, safe, slug

MOST_POINTS = 24
FIRST_PART = 0.12
FRONT, TEACHERS, BUDGET = "Pareto front of the students", "teachers", "budget"
# measure -> name of the figure, title, title of the axis
MEASURES = {
    "ce": ("training", "Training loss", f"training cross-entropy ({LOSS})"),
    "kl": ("kl", "Distance to the teacher", f"KL from teacher to student ({LOSS})"),
    "agreement": ("agreement", "Agreement with the teacher", "share of tokens named alike"),
}
SHADES = ["#dd8a57", "#f4f2ee", "#6fa6dd"]
ENDED = {
    "safe": "It ended because every choice is safe.",
    "budget": "It ended because nothing more fits into the budget.",
    "exhausted": "It ended because every run of the grid was made.",
    None: "It has not ended.",
}


def gain_map(results: Results, group: Group) -> Picture | Absent:
    """Gain over the matched cross-entropy baseline, teacher by student; missing stays missing."""
    names = f"gain-{slug(group)}", f"Gain over cross-entropy alone: {group}"
    points = {(c.student_size, p.teacher_size): p for c in results.law.of(group) for p in c.points}
    gains = [point.gain for point in points.values() if point.gain is not None]
    if not gains:
        return Absent(*names, "No cell has a matched cross-entropy baseline to compare with.")
    runs = [one for one in results.records if (one.kind, one.init) == ("cell", group.init)]
    failed = {(one.student_size, one.teacher_size) for one in runs if one.status == "failed"}
    students, teachers = (sorted(set(sizes)) for sizes in zip(*points, strict=True))
    known, missing = [], []
    for student, teacher in ((s, t) for s in students for t in teachers):
        point = points.get((student, teacher))
        tip = f"{student_name(student)}, teacher {numbers.size(teacher)}\n"
        position = numbers.size(teacher), numbers.size(student)
        if point is not None and point.gain is not None:
            text, precise = numbers.gain(point.gain), numbers.gain(point.gain, point.gain_stderr)
            known.append(row("", *position, tip + precise, gain=point.gain, text=text))
        else:
            text = "failed" if (student, teacher) in failed else "not run"
            text = text if point is None else "no baseline"
            missing.append(row("", *position, tip + text, text=text))
    x = {"type": "nominal", "title": TEACHER, "sort": None, "axis": altair.Axis(labelAngle=0)}
    order = [numbers.size(size) for size in reversed(students)]
    frame = Frame(x, {"type": "nominal", "title": "student size", "sort": order}, {})
    most = max(map(abs, gains))
    shades = altair.Scale(domain=[-most, 0, most], range=SHADES, interpolate="rgb")
    legend = altair.Legend(gradientLength=220, titleLimit=260)
    colour = altair.Color("gain:Q", title=f"gain ({LOSS})", scale=shades, legend=legend)
    return Picture(
        *names,
        "Above zero (blue), distilling beat the same student trained as long without a teacher. "
        "With the noise of two runs in each, go by the curves, not by the highest number.",
        [
            *frame.draw("cells", known, {"color": colour}),
            *frame.draw("texts", known, color="#111111"),
            *frame.draw("texts", missing),
        ],
        f"{names[1]}, {len(students)} students by {len(teachers)} teachers: "
        f"{numbers.gain(min(gains))} to {numbers.gain(max(gains))} {LOSS}.",
        height=max(90, 52 * len(students)),
    )


def compute_chart(results: Results, architecture: str, *, given: bool) -> Picture | Absent:
    """Loss against compute with the Pareto front of the students, means over seeds; the teachers'
    training is counted unless they are `given`."""
    stem, counted = ("-given-teacher", "teacher given") if given else ("", "everything counted")
    name = safe(f"compute{stem}-{architecture}")
    names = name, f"Loss against compute, {counted}: {architecture}"
    runs = _mean_runs(results, architecture, given=given)
    students = [run for run in runs if run["key"] != TEACHERS]
    if not students:
        return Absent(*names, "No student of this architecture has finished yet.")
    limits = draw.span([run["x"] for run in runs], 1.4)
    looks = student_looks(results, [run["student_size"] for run in students])
    looks |= {FRONT: Look(draw.MUTED)}
    looks |= {} if given else {TEACHERS: Look(draw.MUTED, "triangle-up")}
    x = draw.log_axis("compute (FLOPs)", limits, draw.POWER)
    frame = Frame(x, draw.linear_axis(f"held-out loss ({LOSS})"), looks)
    front = pareto_front([(run["x"], run["y"]) for run in students])
    corners = [row(FRONT, *point) for point in (*front, (limits[1], front[-1][1]))]
    chains = [run for run in runs if run["is_chain"]]
    return Picture(
        *names,
        "Down and to the left is better. Filled: distilled students; hollow: on cross-entropy "
        f"alone{'; pointing left: through an assistant' if chains else ''}. See whether "
        "distilled students hold the stepped front"
        + ("." if given else " once the teacher's training is paid for."),
        [
            *frame.draw("lines", corners, interpolate="step-after", strokeWidth=1.5),
            *frame.draw("points", [run for run in runs if not run["is_chain"]]),
            *frame.draw("points", chains, shape="triangle-left", size=90),
        ],
        f"{names[1]}. The lowest loss: {in_words([min(students, key=lambda run: run['y'])])}",
    )


def teacher_chart(results: Results, architecture: str) -> Picture | Absent:
    """The teachers' own held-out loss over their size, a line for each seed."""
    names = safe(f"teachers-{architecture}"), f"The teachers' own loss: {architecture}"
    teachers = [one for one in results.done("teacher") if one.architecture == architecture]
    if not teachers:
        return Absent(*names, "No teacher of this architecture has finished yet.")
    rows = []
    for run in sorted(teachers, key=lambda one: one.parameters.non_embedding):
        loss, error = heldout_loss(run), run.heldout.loss_stderr if run.heldout else None
        size, key = run.parameters.non_embedding, f"seed {run.seed}"
        tip = f"teacher {numbers.size(size)}, {key}\n{numbers.size(run.tokens)} tokens"
        rows.append(row(key, size, loss, f"{tip}\nloss {numbers.loss(loss, error)}", error))
    seeds = sorted({teacher.seed for teacher in teachers})
    looks = {f"seed {seed}": draw.look(position) for position, seed in enumerate(seeds)}
    x = draw.size_axis(TEACHER, [one["x"] for one in rows])
    frame = Frame(x, draw.linear_axis(f"held-out loss of the teacher ({LOSS})"), looks)
    own = [one for one in results.law.warnings if one.where.split(",")[0] == architecture]
    notes = [one.message for one in own if one.name == "teacher_loss_not_falling"]
    return Picture(
        *names,
        "The line must fall: where a larger teacher is no better than a smaller one, it is "
        "undertrained, and the students' curves also show that. Bars are one standard error.",
        frame.draw("lines bars points", rows),
        f"{names[1]}: {rows[0]['y']:.3f} of the smallest, {rows[-1]['y']:.3f} of the largest.",
        tuple(f"{message[0].upper()}{message[1:]}." for message in notes),
    )


def training_chart(results: Results, group: Group, measure: str) -> Picture | Absent:
    """Cross-entropy (`ce`), `kl` or `agreement` over the tokens of a training: each student's best
    cell, and beside it the baseline or the cell of the largest teacher."""
    stem, what, label = MEASURES[measure]
    beside = "the same start on cross-entropy alone" if measure == "ce" else "with its largest"
    names = f"{stem}-{slug(group)}", f"{what}: {group}"
    baselines = baselines_by_key(results.records)
    solid: list[list[Row]] = []
    dashed: list[list[Row]] = []
    for curve in results.law.of(group):
        cells = results.cells_of(curve)
        best = cells.get(curve.optimum.best)
        if best is not None:
            largest = cells[max(cells)] if max(cells) != curve.optimum.best else None
            other = baselines.get(baseline_key(best)) if measure == "ce" else largest
            solid.append(_traced(best, measure))
            dashed += [_traced(other, measure)] if other else []
    drawn = [*chain(*solid, *dashed)]
    if not drawn:
        return Absent(*names, "No finished cell of this kind has such a training curve.")
    last = max(one["x"] for one in drawn)
    # the first steps fall so far that what follows would be a flat line
    later = [one["y"] for one in drawn if one["x"] > FIRST_PART * last]
    room = 0.06 * (max(later) - min(later)) or 0.01
    x = draw.linear_axis("training tokens of the student", (0.0, 1.03 * last), labelExpr=draw.COUNT)
    y = draw.linear_axis(label, (min(later) - room, max(later) + room))
    frame = Frame(x, y, student_looks(results, [one["student"] for one in drawn]))
    ends = [line[-1] for line in solid if line]
    ends += [line[-1] | {"hollow": True} for line in dashed if line]
    return Picture(
        *names,
        f"Solid: each student with its best teacher; dashed: {beside}. Lines are means of at most "
        f"{MOST_POINTS} blocks of steps.",
        [
            *frame.draw("lines", chain(*solid), strokeDash=draw.SOLID),
            *frame.draw("lines", chain(*dashed), strokeDash=draw.DASHED),
            *frame.draw("points", ends),
        ],
        f"{names[1]}, over training tokens. At the end: {in_words(ends)}",
    )


def search_chart(results: Results) -> Picture | Absent:
    """The expected loss of each student's choice so far, above its last value, by FLOPs spent."""
    names, search = ("search", "How the search came to its choice"), results.search
    choices: dict[int, list[tuple[float, Any]]] = defaultdict(list)
    for step in search.get("steps", ()):
        for choice in step["choices"]:
            if choice["loss"] is not None:
                choices[choice["student_size"]].append((100 * step["spent_fraction"], choice))
    if not choices:
        return Absent(*names, "The search has not finished a round yet.")
    budget = 100 * search["budget"]
    right = 1.06 * max(budget, *(spent for own in choices.values() for spent, _ in own))
    students = sorted(choices)
    # bars of one round would hide one another
    shifts = [0.008 * right * (i - (len(choices) - 1) / 2) for i in range(len(choices))]
    traces = [_trace(s, choices[s], shift) for s, shift in zip(students, shifts, strict=True)]
    rows = [one for trace in traces for one in trace]
    low, high = (end(float(one["y"]) for one in rows) for end in (min, max))
    # the first rounds know next to nothing, and their bars would leave no room for the rest
    room = 0.5 * (high - low) or 0.01
    looks = {student_name(size): draw.look(position) for position, size in enumerate(students)}
    x = draw.linear_axis("spent (% of the FLOPs of the whole grid)", (0.0, right))
    y = draw.linear_axis(f"loss above the last choice's ({LOSS})", (low - room, high + room))
    frame = Frame(x, y, looks | {BUDGET: Look(draw.MUTED, dash=draw.DASHED)})
    return Picture(
        *names,
        "What was expected of the choice after every round, above what is expected of the last: "
        "a line that settled early was as good for less. Hollow marks changed the teacher.",
        [
            *frame.draw("uprights", [row(BUDGET, budget, None)]),
            *frame.draw("lines", rows, interpolate="step-after", strokeWidth=1.5),
            *frame.draw("bars points", rows),
        ],
        f"{names[1]}, over FLOPs spent. The last choices: {in_words(t[-1] for t in traces)}",
        (ENDED[search.get("stop")],),
    )


def flops_of(record: RunRecord, *, given: bool) -> float | None:
    """FLOPs of a run over its recorded parts, without the training of its teacher if `given`."""
    total = record.flops.total
    if total is None:
        return None
    counted = total - (record.flops.teacher_training or 0) if given else total
    # nothing counted is nothing known: a run costs something
    return float(counted) if counted > 0 else None


def pareto_front(points: Iterable[Pair]) -> list[Pair]:
    """The (cost, loss) pairs that no other pair beats in both, by rising cost."""
    front: list[Pair] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def block_means(x: Sequence[float | None], y: Sequence[float | None]) -> list[Pair]:
    """Means over equal blocks of neighbouring points, missing values left out."""
    pairs = zip(x, y, strict=False)
    known = [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(b)]
    block = max(1, math.ceil(len(known) / MOST_POINTS))
    parts = [known[i : i + block] for i in range(0, len(known), block)]
    return [(fmean(a for a, _ in part), fmean(b for _, b in part)) for part in parts]


def _mean_runs(results: Results, architecture: str, *, given: bool) -> list[Row]:
    """Points of compute, each a mean over seeds; teachers only where their training counts."""
    kinds = ("cell", "baseline") if given else ("cell", "baseline", "teacher")
    names = ("kind", "init", "tokens", "student_size", "teacher_size")
    runs: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
    for record in results.done(*kinds):
        if record.architecture == architecture and flops_of(record, given=given) is not None:
            runs[tuple(getattr(record, name) for name in names)].append(record)
    rows = []
    for own in runs.values():
        run, loss = own[0], fmean(map(heldout_loss, own))
        flops = fmean(flops_of(one, given=given) or 0.0 for one in own)
        key, who = TEACHERS, f"teacher {numbers.size(run.teacher_size)}"
        if run.kind != "teacher":
            key, who = student_name(run.student_size), f"{_student_text(run)}, {run.init}"
        tip = f"{who}, {numbers.size(run.tokens)} tokens\nloss {numbers.loss(loss)}"
        about = {"student_size": run.student_size, "hollow": run.kind != "cell"}
        about["is_chain"] = (run.kind, run.init) == ("cell", "chain")
        rows.append(row(key, flops, loss, f"{tip}\n{numbers.power(flops)} FLOPs", **about))
    return rows


def _student_text(run: RunRecord) -> str:
    what = "cross-entropy alone" if run.kind == "baseline" else "distilled"
    above = f", teacher {numbers.size(run.teacher_size)}" if run.teacher_size else ""
    return f"{student_name(run.student_size)}, {what}{above}"


def _traced(run: RunRecord, measure: str) -> list[Row]:
    """A training curve, empty with fewer than two points."""
    points = block_means(run.curve.tokens, getattr(run.curve, measure))
    who, size = _student_text(run), run.student_size
    return [
        row(student_name(size), x, y, f"{who}\n{numbers.size(x)} tokens: {y:.3f}", student=size)
        for x, y in points
        if len(points) > 1
    ]


def _trace(student: int, choices: Sequence[tuple[float, Any]], shift: float) -> list[Row]:
    """The rounds of one student; a choice holds until the next round."""
    rows: list[Row] = []
    end, before = choices[-1][1]["loss"], None
    key = student_name(student)
    for spent, choice in choices:
        teacher, error, loss = choice["teacher_size"], choice.get("loss_stderr"), choice["loss"]
        changed = before is not None and before != teacher
        change = f" (before: {numbers.size(before)})" if changed else ""
        tip = f"{key}, {spent:.3g}% spent\nteacher {numbers.size(teacher)}{change}\n"
        tip += f"expected loss {numbers.loss(loss, error)}"
        rows.append(row(key, spent + shift, loss - end, tip, error, hollow=changed))
        before = teacher
    return rows
