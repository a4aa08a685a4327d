"""What the stages `instruct` and `prefer` share: fields, record, held-out scores, model folder."""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from capgap.errors import UserError
from capgap.records import write_json_atomically
from capgap.section import Count, Section, Words
from capgap.stage import ARGUMENT, HOW, Mark, Say, ShouldStop, Stage, paced
from capgap.stages.run_folder import begin, find_run
from capgap.stages.step_lines import MetricsFile
from capgap.stages.training import Track
from capgap.tune.conversations import Reading, file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from capgap.evaluate.losses import HeldoutLoss
    from capgap.tune.template import Example
    from capgap.tune.training import Job, Tuned

# The window where the model reads more
WINDOW = 4096
# Held-out conversations are scored twice; more than these would tell no more
MOST_HELDOUT = 1000
LIBRARIES = ("trl", "peft", "accelerate")
_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_modules")


Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SystemPrompt = Annotated[str, "System prompt of conversations without one; goes into the template."]


@dataclass(frozen=True)
class Sample:
    """A line of the data in tokens: a conversation, or two that end with the chosen and with the
    rejected answer. `row` is what TRL reads."""

    texts: tuple["Example", ...]
    row: dict[str, Any]


class TuningSection(Section):
    """How a model learns from conversations."""

    data: Annotated[Path, HOW, Mark.FILE, "Conversations, one a line (.jsonl)."]
    batch: Annotated[Count, "Conversations a step."] = 256
    micro_batch: Annotated[Count, "Of these at once; changes memory and speed, not the result."] = 4
    window: Annotated[
        Annotated[int, Field(ge=2)] | None,
        "Tokens of the longest conversation; if none 4096, or all that the model reads.",
    ] = None
    learning_rate: Annotated[
        Rate, "Peak rate, reached after the warm-up; it falls as a cosine to 0."
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

    # TRL's names of what a step reports -> ours
    numbers: ClassVar[dict[str, str]]

    model: Annotated[str, ARGUMENT, HOW, Mark.MODEL, "A Hugging Face folder or name."]
    out: Annotated[Path, HOW, "Folder for model, metrics and record."]
    warmup_fraction: Annotated[Share, "Share of the steps until the peak rate."] = 0.1
    lora_rank: Annotated[Count, "Rank of the adapters."] = 8
    lora_alpha: Annotated[Rate, "Their scale times the rank."] = 16
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
    activation_checkpointing: Annotated[
        bool, "Layers are computed again in the backward pass: less memory, more time."
    ] = False
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
        """The data's lines."""
        raise NotImplementedError

    @property
    def record_file(self) -> Path:
        return self.out / f"{self.title()}.json"

    def result(self, found: dict[str, Any]) -> str:
        if not found["before"]:
            return ""
        return f"held-out loss {found['before']['loss']:.3f} -> {found['after']['loss']:.3f}"

    def sample(
        self, tokenizer: "PreTrainedTokenizerFast", item: Any, window: int
    ) -> tuple[Sample | None, str]:
        """A line in at most `window` tokens, None where it is left out; and what was done to it,
        a key of `capgap.tune.conversations.ADJUSTMENTS` or empty."""
        raise NotImplementedError

    def train(self, job: "Job") -> "Tuned":
        raise NotImplementedError

    def scores(
        self, losses: "Sequence[HeldoutLoss]", before: dict[str, Any] | None
    ) -> dict[str, Any]:
        """What the record says of the held-out answers, one loss for each text of a sample;
        `before`: what it said before training, None there."""
        raise NotImplementedError

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Tunes the model, writes OUT/model; returns the record, OUT/instruct.json or
        OUT/prefer.json."""
        from capgap.tune.training import Job

        run = _Run(self, say)
        if run.record["finished"]:
            return run.record
        training, heldout = run.prepare()
        model = run.load()
        if "before" not in run.record:
            run.keep(before=run.scores(model, heldout, None))
        tell = paced(say)
        steps = run.steps(len(training))

        def on_step(line: dict[str, Any]) -> None:
            metrics.add(line)
            done = f"{self.title()}: step {line['step'] + 1} of {steps}"
            tell(lambda: f"{done}, loss {line['loss']:.4f}")

        with MetricsFile(self.out, self.track, run.asked, say) as metrics:
            tuned = self.train(
                Job(
                    model=model,
                    tokenizer=run.tokenizer,
                    rows=[sample.row for sample in training],
                    settings=self,
                    folder=run.checkpoints,
                    bf16=run.bf16,
                    on_step=on_step,
                    should_stop=should_stop,
                )
            )
        after = run.scores(tuned.model, heldout, run.record["before"])
        run.finish(tuned, after)
        return run.record


class _Run:
    """A call of a stage: its model's tokenizer with the template, and its record, found or new.

    UserError for what cannot be done, before anything is written.
    """

    def __init__(self, stage: Tuning, say: Say) -> None:
        from transformers.utils import logging as transformers_logging

        from capgap.corpus.tokenizer import load_tokenizer, num_words
        from capgap.machine import resolve_device, started
        from capgap.models.identity import model_hash
        from capgap.models.stored import read_config
        from capgap.stages.inputs import check_words
        from capgap.train.precision import autocast_dtype
        from capgap.train.trackers import check_trackers
        from capgap.tune.template import set_template

        transformers_logging.disable_progress_bar()
        missing = [name for name in LIBRARIES if find_spec(name) is None]
        if missing:
            raise UserError(f"this needs {', '.join(missing)}: pip install 'capgap[chat]'")
        check_trackers(stage.track)
        self.stage, self.say, self.name = stage, say, stage.title()
        if started()[1] > 1:
            raise UserError(f"{self.name} is the work of one process: start it without torchrun")
        self.device = resolve_device(stage.device)
        if self.device not in ("cpu", "cuda:0"):
            raise UserError(
                f"--device {stage.device}: TRL trains on the first GPU in sight; choose it with "
                "CUDA_VISIBLE_DEVICES"
            )
        # a CPU keeps to fp32
        self.bf16 = self.device != "cpu" and autocast_dtype("auto", self.device) is not None
        data_hash = file_hash(stage.data)
        self.tokenizer = load_tokenizer(stage.model)
        self.config: Any = read_config(stage.model)
        check_words(stage.model, self.config, num_words(self.tokenizer))
        self.window = self._window()
        set_template(self.tokenizer, stage.template, stage.system)
        values = stage.identity()
        lora = {name.removeprefix("lora_"): values.pop(name) for name in _LORA}
        # what a run in the same folder must agree on to be continued
        self.asked = {
            "model": stage.model,
            "model_hash": model_hash(stage.model),
            "data": str(stage.data),
            "data_hash": data_hash,
            **values,
            "lora": lora if stage.lora else None,
        }
        self.path = stage.out / f"{self.name}.json"
        self.checkpoints = stage.out / "checkpoints"
        self.record = find_run(self.path, self.asked) or {"finished": False}

    def _window(self) -> int:
        from capgap.models.stored import positions_of

        asked, positions = self.stage.window, positions_of(self.config)
        if asked is None:
            return min(WINDOW, positions or WINDOW)
        if positions is not None and asked > positions:
            raise UserError(
                f"{self.stage.model} reads at most {positions} tokens, the window has {asked}: "
                f"take --window {positions} or less"
            )
        return asked

    def keep(self, **values: Any) -> None:
        self.record |= values
        write_json_atomically(self.path, self.record)

    def prepare(self) -> tuple[list[Sample], list[Sample]]:
        """(for training, held out). Begins the record and says what was found in the data."""
        stage = self.stage
        reading = stage.read()
        samples = self._samples(reading)
        if not stage.skip_bad:
            reading.refuse()
        training, heldout = self._split(samples)
        for sentence in reading.sentences():
            self.say(f"{self.name}: {sentence}")
        self.record = begin(self.path, self.asked)
        texts = [text for sample in training for text in sample.texts]
        data = {
            "lines": reading.num_lines,
            "training": len(training),
            "heldout": len(heldout),
            "tokens": sum(len(text.ids) for text in texts),
            "answer_tokens": sum(text.num_counted for text in texts),
            "problems": reading.problems(),
        }
        self.keep(data=data, window=self.window)
        self.say(
            f"{self.name}: {len(training):,} for training, {len(heldout):,} held out; "
            f"{self.steps(len(training))} steps of {min(stage.batch, len(training))}"
        )
        return training, heldout

    def _samples(self, reading: Reading[Any]) -> list[Sample]:
        from capgap.tune.template import special_in

        samples = []
        for item in reading.usable:
            if any(special_in(self.tokenizer, text) for text in item.texts):
                reading.findings["special_token"].append(item.line)
                continue
            sample, finding = self.stage.sample(self.tokenizer, item, self.window)
            if finding:
                reading.findings[finding].append(item.line)
            if sample is not None:
                samples.append(sample)
        return samples

    def _split(self, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        """(for training, held out), drawn by the seed; UserError where there are too few."""
        share = self.stage.heldout_fraction
        count = min(MOST_HELDOUT, max(1, round(share * len(samples)))) if share else 0
        if len(samples) <= count:
            raise UserError(
                f"{self.stage.data} leaves {len(samples)} usable lines, too few to hold some out: "
                "give more, or --heldout-fraction 0"
            )
        drawn = set(random.Random(self.stage.seed).sample(range(len(samples)), count))
        training = [sample for i, sample in enumerate(samples) if i not in drawn]
        return training, [samples[i] for i in sorted(drawn)]

    def steps(self, num_training: int) -> int:
        return self.stage.epochs * -(-num_training // self.stage.batch)

    def load(self) -> "PreTrainedModel":
        """In fp32; as it is stored where adapters alone learn, on a GPU."""
        import torch

        from capgap.models.build import load_model

        frozen = self.stage.lora and self.device != "cpu"
        model = load_model(self.stage.model, dtype=None if frozen else torch.float32)
        return model.to(self.device)

    def scores(
        self, model: "PreTrainedModel", heldout: list[Sample], before: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """None where nothing is held out."""
        from capgap.tune.scores import score_answers

        if not heldout:
            return None
        sides = zip(*(sample.texts for sample in heldout), strict=True)
        losses = [score_answers(model, self.tokenizer, side, bf16=self.bf16) for side in sides]
        return self.stage.scores(losses, before)

    def finish(self, tuned: "Tuned", after: dict[str, Any] | None) -> None:
        """The model as a folder, and the rest of the record."""
        from capgap.machine import machine, versions

        folder = self.stage.out / "model"
        self._save(tuned.model, folder)
        self.keep(
            finished=True,
            folder=str(folder),
            steps=len(tuned.curve["loss"]),
            curve=tuned.curve,
            precision="bf16" if self.bf16 else "fp32",
            after=after,
            tokens_read=self.stage.epochs * self.record["data"]["tokens"],
            tokens_trained=self.stage.epochs * self.record["data"]["answer_tokens"],
            versions=versions() | {name: version(name) for name in LIBRARIES},
            machine=machine(self.device, None),
        )
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _save(self, model: "PreTrainedModel", folder: Path) -> None:
        """In the dtype that the model came in, with its licence, tokenizer and template."""
        from capgap.models.stored import copy_companions, local_folder, written_beside

        end, padding = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        for config in (model.config, model.generation_config):
            config.bos_token_id = self.tokenizer.bos_token_id
            config.eos_token_id = end
            config.pad_token_id = end if padding is None else padding
        model.config.use_cache = True
        with written_beside(folder) as partial:
            copy_companions(local_folder(self.stage.model), partial)
            model.to(self.config.dtype or model.dtype).save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
