"""How a model learns from conversations or pairs of answers: what both stages share."""

import random
import shutil
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from capgap.artifact import begun, file_hash, find_run, write_json
from capgap.errors import UserError
from capgap.machine import install_command
from capgap.section import Count, PositiveFinite, Recomputed, Section, Words
from capgap.stage import ARGUMENT, HOW, SEVERAL, FieldError, Mark, Say, ShouldStop, Stage, paced
from capgap.stages.distill import Track
from capgap.stages.evaluate import corpora_of, forgotten, heldout_loss
from capgap.stages.step_lines import MetricsFile
from capgap.tune import conversations
from capgap.tune.conversations import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerFast as Tokenizer

    from capgap.corpus.tokens import Corpus
    from capgap.evaluate.measured import HeldoutLoss
    from capgap.tune.template import Example
    from capgap.tune.training import Tuned

# The window where the model reads more
WINDOW = 4096
# Held-out conversations are scored twice; more than these would tell no more
MOST_HELDOUT = 1000
LIBRARIES = ("trl", "peft", "accelerate")
_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_modules")

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
SystemPrompt = Annotated[str, "System prompt of conversations without one; goes into the template."]


Scores = dict[str, Any]


class Sample(NamedTuple):
    """A line of the data in tokens: a conversation, or two that end with the chosen and with the
    rejected answer; none where the line is left out. `row` is what TRL reads; `finding` what was
    done to the line, a key of `capgap.tune.conversations.ADJUSTMENTS` or empty."""

    texts: tuple["Example", ...]
    row: dict[str, Any]
    finding: str = ""


class TuningSection(Section):
    """How a model learns from conversations."""

    data: Annotated[Path, HOW, Mark.FILE, "Conversations: .jsonl, .json, parquet, the Hub."]
    batch: Annotated[Count, "Conversations a step."] = 256
    micro_batch: Annotated[Count, "Of these at once; changes memory and speed, not the result."] = 4
    window: Annotated[
        Annotated[int, Field(ge=2)] | None,
        "Tokens of the longest conversation; if none 4096, or all that the model reads.",
    ] = None
    learning_rate: Annotated[
        PositiveFinite, "Peak rate, reached after the warm-up; it falls as a cosine to 0."
    ] = 2e-5
    epochs: Annotated[Count, "Times that every conversation is read."] = 3
    lora: Annotated[bool, "Train adapters and add them to the weights at the end."] = False

    @model_validator(mode="after")
    def _whole_steps(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError(
                f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}"
            )
        return self


class Tuning(TuningSection, Stage):
    """What `instruct` and `prefer` share. `heldout_fraction` of the conversations, at most 1000,
    are kept out of training and scored before and after it."""

    # What the lines of the data are called
    lines: ClassVar[str]
    # TRL's names for numbers of a step and for options -> ours
    numbers: ClassVar[dict[str, str]]
    options: ClassVar[dict[str, str]]

    model: Annotated[str, ARGUMENT, HOW, Mark.MODEL, "A Hugging Face folder or name."]
    out: Annotated[Path, HOW, "Folder for model, metrics and record."]
    corpus: Annotated[tuple[Path, ...], SEVERAL, "Prepared text, to tell what is forgotten."] = ()
    warmup_fraction: Annotated[Share, "Share of the steps until the peak rate."] = 0.1
    lora_rank: Annotated[Count, "Rank of the adapters."] = 8
    lora_alpha: Annotated[PositiveFinite, "Their scale times the rank."] = 16
    # the loss of preferences compares with a model that has no dropout
    lora_dropout: Share = 0.0
    lora_modules: Annotated[
        Words | None, "Names of linear layers, q_proj,v_proj; if none, all below the head."
    ] = None
    heldout_fraction: Annotated[
        Share, "Share kept out of training, at most 1,000, scored before and after; 0 keeps none."
    ] = 0.05
    template: Annotated[str, "minichat, or the tokenizer's own."] = "own"
    system: SystemPrompt = ""
    skip_bad: Annotated[
        bool, "Leave bad lines out and count them, instead of refusing the file."
    ] = False
    activation_checkpointing: Recomputed = False
    seed: Annotated[
        Annotated[int, Field(ge=0, lt=2**32)],
        "Decides order, adapters, noise and what is held out.",
    ] = 0
    device: Annotated[str, HOW, "auto, cpu or cuda."] = "auto"
    track: Track = ()
    checkpoint_seconds: Annotated[float, HOW] = 600.0

    @model_validator(mode="after")
    def _lora_alone(self) -> Self:
        if self.lora_modules is not None and not self.lora:
            raise ValueError(f"lora_modules {','.join(self.lora_modules)} goes with lora")
        return self

    def read(self) -> Reading[Any]:
        raise NotImplementedError

    def sample(self, tokenizer: "Tokenizer", item: Any, window: int) -> Sample:
        """A line in at most `window` tokens."""
        raise NotImplementedError

    def plain_rows(
        self, corpora: "Sequence[Corpus]", answer_tokens: int, window: int
    ) -> list[dict[str, Any]]:
        """Prepared text that is learnt beside, of all epochs."""
        return []

    def scores(self, losses: "Sequence[HeldoutLoss]", before: Scores | None) -> Scores:
        """What the record says of the held-out answers, one loss for each text of a sample;
        `before`: what it said before training, None there."""
        raise NotImplementedError

    def change(self, before: Scores, after: Scores) -> str:
        """What a person reads of these scores."""
        raise NotImplementedError

    @property
    def record_file(self) -> Path:
        return self.out / f"{self.title()}.json"

    def result(self, found: dict[str, Any]) -> str:
        if not found["before"]:
            return ""
        return f"held-out loss {found['before']['loss']:.3f} -> {found['after']['loss']:.3f}"

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        return ("chat", found["folder"])

    def told(self, found: dict[str, Any]) -> str:
        count = f"{found['data']['training']:,} {self.lines}, {found['steps']:,} steps"
        change = [self.change(found["before"], found["after"])] if found["before"] else []
        lost = forgotten(found.get("text_before") or {}, found.get("text_after") or {})
        return "\n".join([*change, *lost, f"{count}, {found['folder']}"])

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Tunes the model, writes OUT/model and beside it the record, which it returns."""
        run = _Run(self, say)
        if not run.record["finished"]:
            run.tune(should_stop)
        return run.record


class _Run:
    """A call of a stage: its model's tokenizer with the template, and its record, found or new.

    UserError for what cannot be done, before anything is written.
    """

    def __init__(self, stage: Tuning, say: Say) -> None:
        from transformers.utils import logging as transformers_logging

        from capgap.machine import resolve_device, started
        from capgap.models.identity import model_hash
        from capgap.stages.measure import Reader
        from capgap.train.settings import autocast_dtype
        from capgap.train.trackers import check_trackers
        from capgap.tune.template import set_template

        transformers_logging.disable_progress_bar()
        missing = [name for name in LIBRARIES if find_spec(name) is None]
        if missing:
            raise UserError(f"this needs {', '.join(missing)}: {install_command('chat')}")
        check_trackers(stage.track)
        self.stage, self.say, self.name = stage, say, stage.title()
        if started()[1] > 1:
            raise UserError(f"{self.name} is the work of one process: start it without torchrun")
        self.device = resolve_device(stage.device)
        if self.device not in ("cpu", "cuda:0"):
            raise FieldError(
                "device",
                f"{stage.device}: TRL trains on the first GPU in sight; choose it with "
                "CUDA_VISIBLE_DEVICES",
            )
        # a CPU keeps to fp32
        self.bf16 = self.device != "cpu" and autocast_dtype("auto", self.device) is not None
        conversations.check_file(stage.data)
        self.reader = reader = Reader.of(stage.model)
        self.tokenizer, self.config = reader.tokenizer, reader.config
        self.corpora = corpora_of(stage.model, stage.corpus)
        self.window = stage.window or min(WINDOW, reader.positions or WINDOW)
        if reader.positions is not None and self.window > reader.positions:
            raise UserError(
                f"{stage.model} reads at most {reader.positions} tokens, the window has "
                f"{self.window}: take a `window` of {reader.positions} or less"
            )
        set_template(self.tokenizer, stage.template, stage.system)
        values = stage.identity()
        lora = {name.removeprefix("lora_"): values.pop(name) for name in _LORA}
        # what a run in the same folder must agree on to be continued
        self.asked = {
            "model": stage.model,
            "model_hash": model_hash(stage.model),
            "data": str(stage.data),
            "data_hash": file_hash(stage.data) if stage.data.is_file() else None,
            **values,
            "lora": lora if stage.lora else None,
        }
        self.record = find_run(stage.record_file, self.asked) or {"finished": False}

    def tune(self, should_stop: ShouldStop) -> None:
        """The work, with the folder locked."""
        from capgap.models.build import DTYPES, load_model
        from capgap.tune.training import Job, score_answers, tune

        stage = self.stage
        training, heldout, data = self._samples()
        if self.record.get("data", data).get("revision") != data["revision"]:
            raise UserError(f"{stage.data} is another on the Hub than when this run began")
        plain = stage.plain_rows(self.corpora, data["answer_tokens"], self.window)
        # text is another in every epoch, so that the epochs are one
        trained = stage.but(epochs=1) if plain else stage
        rows = [sample.row for sample in training] * (stage.epochs // trained.epochs) + plain
        data["text_tokens"] = sum(len(row["labels"]) for row in plain)
        steps = trained.epochs * -(-len(rows) // stage.batch)
        tell = paced(self.say)

        def scores(model: "PreTrainedModel", before: Scores | None) -> Scores | None:
            """None where nothing is held out."""
            sides = zip(*(sample.texts for sample in heldout), strict=True)
            losses = [score_answers(model, self.tokenizer, side, bf16=self.bf16) for side in sides]
            return stage.scores(losses, before) if losses else None

        def on_step(line: dict[str, Any]) -> None:
            metrics.add(line)
            done = f"{self.name}: step {line['step'] + 1} of {steps}"
            tell(lambda: f"{done}, loss {line['loss']:.4f}")

        def text(model: "PreTrainedModel") -> dict[str, Any] | None:
            loss = partial(heldout_loss, model, self.reader, window=self.window, say=self.say)
            return {str(one.directory): loss(one) for one in self.corpora} or None

        with begun(stage.record_file, self.asked) as self.record:
            self._keep(data=data, window=self.window)
            self.say(
                f"{self.name}: {len(training):,} for training, {len(heldout):,} held out; "
                + (f"{data['text_tokens']:,} tokens of text beside; " if plain else "")
                + f"{steps} steps of {min(stage.batch, len(rows))}"
            )
            # fp32; as it is stored where adapters alone learn, on a GPU
            dtype = "stored" if stage.lora and self.device != "cpu" else "fp32"
            model = load_model(stage.model, dtype=DTYPES[dtype]).to(self.device)
            if "before" not in self.record:
                self._keep(before=scores(model, None), text_before=text(model))
            with MetricsFile(stage.out, stage.track, self.asked, self.say) as metrics:
                folder = stage.out / "checkpoints"
                job = Job(
                    model, self.tokenizer, rows, trained, folder, self.bf16, on_step, should_stop
                )
                tuned = tune(job)
            after = scores(tuned.model, self.record["before"])
            self._finish(tuned, after=after, text_after=text(tuned.model))
            shutil.rmtree(folder, ignore_errors=True)

    def _keep(self, **values: Any) -> None:
        self.record |= values
        write_json(self.stage.record_file, self.record)

    def _samples(self) -> tuple[list[Sample], list[Sample], dict[str, Any]]:
        """(for training, held out, what the record says of the data), drawn by the seed. Says what
        was found in the data; UserError where there is too little."""
        from capgap.tune.template import writes

        stage, reading = self.stage, self.stage.read()
        samples = []
        for item in reading.usable:
            sample = Sample((), {})
            if writes(self.tokenizer, item, reading):
                sample = stage.sample(self.tokenizer, item, self.window)
            if sample.finding:
                reading.found(item.line, sample.finding)
            samples += [sample] if sample.texts else []
        if not stage.skip_bad:
            reading.refuse()
        share = stage.heldout_fraction
        count = min(MOST_HELDOUT, max(1, round(share * len(samples)))) if share else 0
        if len(samples) <= count:
            raise UserError(
                f"{stage.data} leaves {len(samples)} usable lines, too few to hold some out: "
                "give more, or `heldout_fraction` 0"
            )
        drawn = set(random.Random(stage.seed).sample(range(len(samples)), count))
        training = [sample for i, sample in enumerate(samples) if i not in drawn]
        for sentence in reading.sentences():
            self.say(f"{self.name}: {sentence}")
        texts = [text for sample in training for text in sample.texts]
        data = {
            "revision": reading.revision,
            "lines": reading.num_lines,
            "training": len(training),
            "heldout": count,
            "tokens": sum(len(text.ids) for text in texts),
            "answer_tokens": sum(text.num_counted for text in texts),
            "problems": reading.problems(),
        }
        return training, [samples[i] for i in sorted(drawn)], data

    def _finish(self, tuned: "Tuned", **scores: Scores | None) -> None:
        """The model as a folder, in the dtype that it came in, with its licence, tokenizer and
        template; and the rest of the record."""
        from capgap.machine import machine, versions
        from capgap.models import stored

        stage, data, model = self.stage, self.record["data"], tuned.model
        folder, end = stage.out / "model", self.tokenizer.eos_token_id
        padding = self.tokenizer.pad_token_id
        for config in (model.config, model.generation_config):
            config.bos_token_id = self.tokenizer.bos_token_id
            config.eos_token_id = end
            config.pad_token_id = end if padding is None else padding
        model.config.use_cache = True
        source = stored.local_folder(stage.model)
        with stored.written_beside(folder) as partial:
            stored.copy_companions(source, partial, (*stored.COMPANIONS, *stored.RECORDS))
            model.to(self.config.dtype or model.dtype).save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
        self._keep(
            finished=True,
            folder=str(folder),
            steps=len(tuned.curve["loss"]),
            curve=tuned.curve,
            precision="bf16" if self.bf16 else "fp32",
            **scores,
            tokens_read=stage.epochs * data["tokens"] + data["text_tokens"],
            tokens_trained=stage.epochs * data["answer_tokens"] + data["text_tokens"],
            versions=versions() | {name: version(name) for name in LIBRARIES},
            machine=machine(self.device, None),
        )
        shutil.copyfile(stage.record_file, folder / stage.record_file.name)
