"""Commands about laws, costs and models, and those of the single stages."""

import shlex
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from capgap.artifact import write_text
from capgap.cli.app import (
    Answer,
    Command,
    add_stage,
    app,
)
from capgap.cli.conversation import chat
from capgap.cli.doctor import Doctor
from capgap.cli.init import Init, run_recipe
from capgap.errors import UserError
from capgap.section import Words
from capgap.sizes import parse_count
from capgap.stage import ARGUMENT, HOW, FieldError, Mark, Say
from capgap.stages.adapt import Adapt
from capgap.stages.cache import Cache
from capgap.stages.corpus import Prepare
from capgap.stages.distill import Distill, Train
from capgap.stages.evaluate import Evaluate
from capgap.stages.export import Export
from capgap.stages.instruct import Instruct, Prefer
from capgap.stages.prune import Prune
from capgap.stages.score import Score
from capgap.sweep.search_stage import Search
from capgap.sweep.stages import Column, OfRecipe, Quickstart, RecipeName, Sweep

if TYPE_CHECKING:
    from capgap.pipeline.recipe import RunRecipe

STATES = {"done": "done", "continue": "would go on", "run": "would run"}


class Report(Answer):
    """Fit the law and draw the report again from the records of a sweep, finished or not."""

    folder: Annotated[Path, ARGUMENT, "The output folder of a sweep or of distillations."]

    def run(self, **_: Any) -> dict[str, Any]:
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is no output folder of a sweep: no such folder")
        from capgap.sweep.results import refresh

        return refresh(self.folder)

    def told(self, found: dict[str, Any]) -> str:
        return "\n".join([*found["verdict"], f"report: {found['report']}"])


class Fit(Answer):
    """Fit the law of capacity gap to a table of cells, or to the records of runs."""

    source: Annotated[
        Path, ARGUMENT, "A CSV of cells, or the folder of a sweep or of distillations."
    ]
    out: Annotated[Path, "The law as JSON."] = Path("law.json")
    report: Annotated[Path | None, "A page with the pictures, such as law.html."] = None
    confidence: Annotated[float, "Of all intervals."] = 0.9
    independent_errors: Annotated[bool, "The table's loss_stderr is each cell's own noise."] = False

    def run(self, **_: Any) -> dict[str, Any]:
        if not self.source.exists():
            raise UserError(f"no table {self.source}")
        from capgap import fit
        from capgap.artifact import write_json
        from capgap.report.sentences import sentences

        errors = self.independent_errors
        law = fit(self.source, confidence=self.confidence, independent_errors=errors)
        write_json(self.out, law.as_dict())
        page = None
        if self.report is not None:
            from capgap.report.page import write_law_report

            page = str(write_law_report(law, self.report, title=self.source.stem))
        return {"law": str(self.out), "report": page, "verdict": sentences(law)}

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        asked = ("--student", "SIZE", "--tokens", "TOKENS", "--teachers", "TEACHER,TEACHER")
        return ("recommend", "--law", self.out, *asked)

    def told(self, found: dict[str, Any]) -> str:
        from capgap.law.law import read_law

        law = read_law(self.out)
        lines = [*found["verdict"]]
        lines += [f"warning, {one.where}: {one.message}" for one in law.warnings]
        lines += [f"not used: {one.id}, {one.reason}" for one in law.excluded]
        page = f", report: {found['report']}" if found["report"] else ""
        return "\n".join([*lines, f"law: {self.out}{page}"])


class Recommend(Answer):
    """Which teacher to take for a student of this size and these tokens."""

    has_progress: ClassVar[bool] = True

    student: Annotated[str, "Its size: 3B without embeddings, 3.2B total, or a name."]
    tokens: Annotated[str, "What it will be distilled on, such as 126B."]
    family: Annotated[str | None, "Choose among its members: llama2, qwen2.5, pythia, ..."] = None
    teachers: Annotated[
        Words, "Choose among these: names, folders, NAME=FOLDER or sizes, parted by commas."
    ] = ()
    law: Annotated[Path | None, "The law.json of a sweep of your own."] = None
    gpus: Annotated[str | None, "For the time: 16xA100."] = None
    write: Annotated[Path | None, "Write the recipe of the run that follows into this file."] = None
    figure: Annotated[Path | None, "Draw the advice into this file, .png or .svg."] = None
    measure: Annotated[str | None, "A corpus of yours: let the teachers read this text."] = None
    student_model: Annotated[
        str | None, "A folder with the student's weights, to read what teachers write."
    ] = None
    measure_bytes: Annotated[str, "Bytes of it that they read."] = "256k"
    dtype: Annotated[str, "They read in: stored, fp32 or bf16."] = "stored"
    device: Annotated[str, "auto, cpu, cuda or cuda:1."] = "auto"

    @model_validator(mode="after")
    def _together(self) -> Self:
        names = ("measure_bytes", "dtype", "device", "student_model")
        defaults = type(self).model_fields
        if self.measure is None and any(getattr(self, n) != defaults[n].default for n in names):
            raise ValueError(
                "--measure-bytes, --dtype, --device and --student-model are of use with --measure "
                "alone"
            )
        return self

    def run(self, *, say: Say = lambda text: None, **_: Any) -> dict[str, Any]:
        from capgap.law.advise import Advice, recommend
        from capgap.law.law import read_law
        from capgap.law.published import candidates_of, sources_of
        from capgap.report.advice import advice_sentences

        if self.figure is not None:
            from capgap.report.draw import check_picture

            check_picture(self.figure)
        if self.write is not None and self.write.exists():
            raise FieldError("write", f"{self.write} exists: choose another file, or delete it")
        own = None if self.law is None else read_law(self.law)
        candidates = candidates_of(self.family, self.teachers)

        def advice(**more: Any) -> Advice:
            return recommend(self.student, self.tokens, candidates, law=own, gpus=self.gpus, **more)

        # mistakes are told before models are read
        found = advice()
        if self.measure is not None:
            from capgap.stages.measure import run_measure

            measurement = run_measure(
                self.measure,
                sources_of(candidates),
                num_bytes=parse_count(self.measure_bytes),
                dtype=self.dtype,
                device=self.device,
                student=self.student_model,
                say=say,
            )
            found = advice(measurement=measurement)
        if self.figure is not None:
            from capgap.report.draw import write_picture
            from capgap.report.published_charts import advice_chart

            write_picture(advice_chart(found), self.figure)
        told = found.model_dump(mode="json") | {"verdict": advice_sentences(found)}
        if self.write is not None and found.take is not None:
            asked = (self._size(told), self.tokens, self.measure or "texts/", self.gpus)
            write_text(self.write, run_recipe(self.write.stem, self._teacher(told), *asked))
        return told

    def _teacher(self, found: dict[str, Any]) -> str:
        """The one to take, by the name that its weights have."""
        from capgap.law.published import candidates_of

        candidates = {one.name: one for one in candidates_of(self.family, self.teachers)}
        return str(candidates[found["take"]].source or found["take"])

    def _size(self, found: dict[str, Any]) -> str:
        """The student's, as it was given; of a model's name its own."""
        from capgap.law.published import find_model

        named = find_model(self.student) is not None
        return str(found["student"]["non_embedding"]) if named else self.student

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        if found["take"] is None:
            return ()
        if self.write is not None:
            return ("plan", self.write)
        text = ("--text", self.measure or "TEXT", "--teachers", self._teacher(found))
        size = ("--students", self._size(found), "--tokens", self.tokens)
        return ("init", "mine.toml", *text, *size, *(("--gpus", self.gpus) if self.gpus else ()))

    def told(self, found: dict[str, Any]) -> str:
        from capgap.law.advise import Advice
        from capgap.report.advice import advice_text

        values = {name: found[name] for name in Advice.model_fields}
        drawn = "" if self.figure is None else f"\npicture: {self.figure}"
        if self.write is not None and found["take"] is None:
            drawn += f"\n{self.write} is not written: no teacher is to be taken"
        return advice_text(Advice.model_validate(values)) + drawn


class Plan(Answer, OfRecipe):
    """What a run or a sweep would take: parameters, steps, FLOPs, memory, time and disk.

    With --question: which small grid tells the best teacher for a student of such a size.
    """

    recipe: RecipeName = ""
    gpus: Annotated[str | None, "For time and what fits: 16xA100; else the recipe's own."] = None
    utilisation: Annotated[
        float | None, "Share of the GPUs' peak that is reached, such as 0.4."
    ] = None
    question: Annotated[bool, "Which small grid answers for --student on --tokens?"] = False
    student: Annotated[str | None, "Of the question: 300M without embeddings, 360M total."] = None
    tokens: Annotated[str | None, "Of the question: what the student will learn from."] = None
    family: Annotated[str | None, "Of the question: its members are the teachers."] = None
    teachers: Annotated[
        Words, "Of the question: teachers as for `capgap recommend`, parted by commas."
    ] = ()

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if bool(self.recipe) == self.question:
            raise ValueError("give either a recipe or --question")
        if self.question and (self.student is None or self.tokens is None):
            raise ValueError("--question needs --student and --tokens")
        return self

    def run(self, **_: Any) -> dict[str, Any]:
        if self.question:
            return self._asked()
        from capgap import plan

        return plan(self.recipe, self.set, gpus=self.gpus, utilisation=self.utilisation)

    def _asked(self) -> dict[str, Any]:
        from capgap.law.advise import student_of
        from capgap.law.published import candidates_of
        from capgap.law.question import ask

        teachers = candidates_of(self.family, self.teachers)
        size = student_of(str(self.student), teachers).non_embedding
        found = ask(size, parse_count(str(self.tokens)), [one.non_embedding for one in teachers])
        return found.model_dump(mode="json")

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        if self.question:
            if found["answer"] is None:
                return ()
            grid = found["grids"][found["answer"]]
            teachers, students = (
                ",".join(map(str, grid[name])) for name in ("teachers", "students")
            )
            asked = ("--teachers", teachers, "--students", students)
            ratio = f"{found['tokens'] / found['student']:.3g}x"
            return ("init", "grid.toml", "--text", "TEXT", *asked, "--tokens", ratio)
        changes = [word for one in self.set for word in ("--set", one)]
        return ("run" if found["kind"] == "run" else "sweep", self.recipe, *changes)

    def told(self, found: dict[str, Any]) -> str:
        if self.question:
            from capgap.law.question import Question
            from capgap.report.advice import question_text

            return question_text(Question.model_validate(found))
        from capgap.cost.plan import plan_text

        return plan_text(found)


class Sample(Answer):
    """Let a model continue a text."""

    model: Annotated[str, ARGUMENT, Mark.MODEL, "A Hugging Face folder or name."]
    text: Annotated[str, ARGUMENT, "The beginning to continue."] = ""
    tokens: Annotated[int, "Tokens to write."] = 80
    temperature: Annotated[float, "0 takes the likeliest token."] = 0.8
    top_p: Annotated[float, "Share of probability to draw from."] = 0.95
    seed: Annotated[int, "The same seed gives the same text."] = 0

    def run(self, **_: Any) -> dict[str, Any]:
        if Path(self.model, "sweep.json").exists():
            best = f"{self.model}/student"
            raise UserError(f"{self.model} is the folder of a sweep: its best student is in {best}")
        from capgap.corpus.tokenizer import check_text, load_tokenizer
        from capgap.evaluate.sample import Sampling, sample_text
        from capgap.models.build import load_model

        how = {"temperature": self.temperature, "top_p": self.top_p}
        Sampling(self.temperature, self.top_p, seed=self.seed)
        check_text(self.text, "the text")
        # first, because it tells a missing network or a wrong name at once
        tokenizer = load_tokenizer(self.model)
        model = load_model(self.model).eval()
        written = sample_text(
            model, tokenizer, self.text, max_new_tokens=self.tokens, seed=self.seed, **how
        )
        return {"model": self.model, "prompt": self.text, "text": written}

    def told(self, found: dict[str, Any]) -> str:
        return str(found["prompt"] + found["text"])


class Run(OfRecipe):
    """Run all stages of a recipe, from the teacher to a student that answers."""

    out: Annotated[Path | None, HOW, "Output folder; runs/NAME if none."] = None
    from_: Annotated[str | None, HOW, Field(alias="from"), "This step and all later anew."] = None
    until: Annotated[str | None, HOW, "Stop when this step is done."] = None
    dry_run: Annotated[bool, HOW, "Tell each step, why it would run, and its command."] = False
    quiet: bool = False

    @cached_property
    def asked(self) -> "RunRecipe":
        from capgap.config import find_recipe, load_any_recipe
        from capgap.pipeline.recipe import RunRecipe

        found = load_any_recipe(find_recipe(self.recipe), self.set)
        if not isinstance(found, RunRecipe):
            raise UserError(
                f"{self.recipe} is the recipe of a sweep, not of a run: see `capgap sweep`"
            )
        return found

    @property
    def writes(self) -> tuple[Path, ...]:
        return (self.out or Path("runs") / self.asked.name,)

    def run(self, *, say: Say = lambda text: None, **_: Any) -> dict[str, Any]:
        from capgap.pipeline.runner import plan_pipeline, run_pipeline

        which: dict[str, Any] = {"again_from": self.from_, "until": self.until}
        if not self.dry_run:
            return run_pipeline(self.asked, *self.writes, **which, quiet=self.quiet, say=say)
        steps = [
            {
                "step": decision.step.name,
                "state": decision.state,
                "why": decision.why or None,
                "command": ["capgap", *decision.step.stage.command()],
            }
            for decision in plan_pipeline(self.asked, *self.writes, **which)
        ]
        return {"name": self.asked.name, "steps": steps}

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        if self.dry_run:
            return tuple(self.but(dry_run=False).command())
        done = {name for name, step in found["steps"].items() if step["status"] == "done"}
        verb = "chat" if {"instruct", "prefer"} & done else "sample"
        return (verb, self.writes[0] / "model") if "export" in done else ()

    def told(self, found: dict[str, Any]) -> str:
        lines = []
        if self.dry_run:
            for number, step in enumerate(found["steps"], 1):
                why = f" ({step['why']})" if step["why"] else ""
                lines.append(f"{number}. {step['step']}: {STATES[step['state']]}{why}")
                lines.append(f"   {shlex.join(step['command'])}")
            return "\n".join(lines)
        width = max(map(len, found["steps"]))
        for name, step in found["steps"].items():
            lines.append(f"{name:{width}}  {step.get('result') or step['status']}")
        return "\n".join([*lines, f"run: {self.writes[0]}"])


# in the order of --help
QUESTIONS = (Quickstart, Sweep, Search, Report, Fit, Recommend, Init, Plan, Run)
WORK = (Column, Prepare, Cache, Score, Prune, Distill, Train, Adapt, Sample, Evaluate)
for stage in (*QUESTIONS, *WORK, Instruct, Prefer):
    add_stage(stage)


app.command(cls=Command)(chat)
add_stage(Export)
add_stage(Doctor)
