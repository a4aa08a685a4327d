"""What the stages `instruct` and `prefer` share: fields, record, steps, model folder."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from capgap.errors import UserError
from capgap.records import write_json_atomically
from capgap.section import Count, Section
from capgap.stage import ARGUMENT, SEVERAL, Stage
from capgap.stages.run_folder import begin, find_run
from capgap.stages.step_lines import SAID_EVERY, MetricsFile
from capgap.tune.conversations import Findings, Reading, file_hash
from capgap.tune.settings import Lora, TuneSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from capgap.tune.training import StepLine, Tuned

# The window where the model reads more
WINDOW = 4096
# Held-out conversations are scored twice; more than these would tell no more
MOST_HELDOUT = 1000
# What may change between a run and its continuation without changing what comes out
_FREE = {"model", "data", "out", "device", "checkpoint_seconds", "track"}
_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_modules")

_Item = TypeVar("_Item")


def _words(given: Any) -> Any:
    """As typed, parted by commas, or as they are."""
    return [word.strip() for word in given.split(",")] if isinstance(given, str) else given


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TuningSection(Section):
    """How a model learns from conversations; see `capgap.tune.settings`."""

    data: Annotated[Path, "Conversations, one a line (.jsonl)."]
    batch: Annotated[Count, "Conversations a step."] = 256
    micro_batch: Annotated[Count, "Conversations at once."] = 4
    window: Annotated[
        Annotated[int, Field(ge=2)] | None,
        "Tokens of the longest conversation; 4096, or all that the model reads.",
    ] = None
    learning_rate: Annotated[Rate, "Peak rate; it falls as a cosine to 0."] = 2e-5
    epochs: Annotated[Count, "Times that every conversation is read."] = 3
    lora: Annotated[bool, "Train adapters, merged at the end."] = False

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

    model: Annotated[str, ARGUMENT, "A Hugging Face folder or name."]
    out: Annotated[Path, "Folder for model, metrics and record."]
    warmup_fraction: Annotated[Share, "Share of the steps until the peak rate."] = 0.1
    lora_rank: Annotated[Count, "Rank of the adapters."] = 8
    lora_alpha: Annotated[Rate, "Their scale times the rank."] = 16
    # the loss of preferences compares with a model that has no dropout
    lora_dropout: Share = 0.0
    lora_modules: Annotated[Words | None, "q_proj,v_proj: which linear layers; all if none."] = None
    heldout_fraction: Annotated[Share, "Share kept out of training and scored."] = 0.05
    template: Annotated[str, "minichat, or the tokenizer's own."] = "own"
    system: Annotated[
        str, "System prompt of conversations without one; goes into the template."
    ] = ""
    skip_bad: Annotated[bool, "Leave bad lines out, and count them."] = False
    activation_checkpointing: Annotated[bool, "Less memory, more time."] = False
    seed: Annotated[
        Annotated[int, Field(ge=0, lt=2**32)],
        "Decides order, adapters, noise and what is held out.",
    ] = 0
    device: Annotated[str, "auto, cpu or cuda."] = "auto"
    track: Annotated[
        tuple[str, ...], SEVERAL, "Also tell tensorboard, trackio or wandb; several times."
    ] = ()
    checkpoint_seconds: float = 600.0

    @model_validator(mode="after")
    def _lora_alone(self) -> Self:
        if self.lora_modules is not None and not self.lora:
            raise ValueError(f"lora_modules {','.join(self.lora_modules)} goes with lora")
        return self

    @property
    def adapters(self) -> Lora | None:
        rank, alpha, dropout = self.lora_rank, self.lora_alpha, self.lora_dropout
        return Lora(rank, alpha, dropout, self.lora_modules) if self.lora else None

    def asked(self) -> dict[str, Any]:
        """What a run in the same folder must agree on to be continued."""
        found = self.model_dump(mode="json", exclude=_FREE)
        lora = {name.removeprefix("lora_"): found.pop(name) for name in _LORA}
        return found | {"lora": lora if self.lora else None}


class TuningRun:
    """One call of a stage: opens its model's tokenizer, finds or begins its record."""

    def __init__(self, request: Tuning, stage: str, say: Callable[[str], None]) -> None:
        from transformers.utils import logging as transformers_logging

        from capgap.corpus.tokenizer import load_tokenizer, num_words
        from capgap.machine import resolve_device, started
        from capgap.models.identity import model_hash
        from capgap.models.stored import read_config
        from capgap.stages.inputs import check_words
        from capgap.train.trackers import check_trackers
        from capgap.tune.libraries import check_libraries
        from capgap.tune.template import set_template

        transformers_logging.disable_progress_bar()
        check_libraries()
        check_trackers(request.track)
        if started()[1] > 1:
            raise UserError(f"{stage} is the work of one process: start it without torchrun")
        self.request = request
        self.stage = stage
        self.say = say
        self.path = request.out / f"{stage}.json"
        self.device = resolve_device(request.device)
        if self.device not in ("cpu", "cuda:0"):
            raise UserError(
                f"--device {request.device}: TRL trains on the first GPU in sight; choose it with "
                "CUDA_VISIBLE_DEVICES"
            )
        data_hash = file_hash(request.data)
        self.tokenizer = load_tokenizer(request.model)
        self.config: Any = read_config(request.model)
        check_words(request.model, self.config, num_words(self.tokenizer))
        self.window = _window(request, self.config)
        set_template(self.tokenizer, request.template, request.system)
        self.asked = {
            "model": request.model,
            "model_hash": model_hash(request.model),
            "data": str(request.data),
            "data_hash": data_hash,
            **request.asked(),
        }
        self.record = find_run(self.path, self.asked) or {"finished": False}

    @property
    def finished(self) -> bool:
        return bool(self.record["finished"])

    @property
    def checkpoints(self) -> Path:
        return self.request.out / "checkpoints"

    @property
    def bf16(self) -> bool:
        """On a GPU that computes in it; a CPU keeps to fp32."""
        from capgap.train.precision import autocast_dtype

        return self.device != "cpu" and autocast_dtype("auto", self.device) is not None

    @property
    def settings(self) -> TuneSettings:
        request = self.request
        names = {one.name for one in fields(TuneSettings)} - {"device", "bf16"}
        shared = {name: getattr(request, name) for name in names - {"lora"}}
        return TuneSettings(**shared, lora=request.adapters, device=self.device, bf16=self.bf16)

    def split(self, items: Sequence[_Item]) -> tuple[list[_Item], list[_Item]]:
        """(for training, held out), drawn by the seed; UserError where there are too few."""
        share = self.request.heldout_fraction
        count = min(MOST_HELDOUT, max(1, round(share * len(items)))) if share else 0
        if len(items) <= count:
            raise UserError(
                f"{self.request.data} leaves {len(items)} usable lines, too few to hold some out: "
                "give more, or --heldout-fraction 0"
            )
        places = set(random.Random(self.request.seed).sample(range(len(items)), count))
        training = [item for i, item in enumerate(items) if i not in places]
        return training, [items[i] for i in sorted(places)]

    def begin(self, counts: dict[str, Any], findings: Findings) -> None:
        """Writes a new record where there is none, and says what was found in the data."""
        for sentence in findings.sentences():
            self.say(f"{self.stage}: {sentence}")
        self.record = begin(self.path, self.asked)
        self.keep(data=counts | {"problems": findings.as_dict()}, window=self.window)
        steps = self.request.epochs * -(-counts["training"] // self.request.batch)
        self.say(
            f"{self.stage}: {counts['training']:,} for training, {counts['heldout']:,} held out; "
            f"{steps} steps of {min(self.request.batch, counts['training'])}"
        )

    def keep(self, **values: Any) -> None:
        self.record |= values
        write_json_atomically(self.path, self.record)

    def load(self) -> "PreTrainedModel":
        """In fp32; as it is stored where adapters alone learn, on a GPU."""
        import torch

        from capgap.models.build import load_model

        frozen = self.request.lora and self.device != "cpu"
        model = load_model(self.request.model, dtype=None if frozen else torch.float32)
        return model.to(self.device)

    @contextmanager
    def steps(self, names: dict[str, str]) -> "Iterator[Callable[[StepLine], None]]":
        """What writes metrics.jsonl, tells the trackers, and speaks now and then; `names`: TRL's
        numbers and ours."""
        said = time.monotonic()

        def add(line: "StepLine") -> None:
            nonlocal said
            found: dict[str, float | None] = {
                "step": line.step,
                "loss": line.loss,
                "learning_rate": line.learning_rate,
                "gradient_norm": line.gradient_norm,
                "seconds": line.seconds,
            }
            found |= {ours: line.others.get(theirs) for theirs, ours in names.items()}
            metrics.add(found)
            if time.monotonic() - said > SAID_EVERY:
                said = time.monotonic()
                self.say(
                    f"{self.stage}: step {line.step + 1} of {line.steps}, loss {line.loss:.4f}"
                )

        with MetricsFile(self.request.out, self.request.track, self.asked, self.say) as metrics:
            yield add

    def finish(self, tuned: "Tuned", **values: Any) -> None:
        """The model as a folder, and the rest of the record."""
        import shutil

        from capgap.machine import machine, versions

        folder = self.request.out / "model"
        self._save(tuned.model, folder)
        self.keep(
            finished=True,
            folder=str(folder),
            steps=tuned.steps,
            curve={"loss": tuned.losses, "learning_rate": tuned.learning_rates},
            precision="bf16" if self.bf16 else "fp32",
            **values,
            versions=versions() | {name: version(name) for name in ("trl", "peft", "accelerate")},
            machine=machine(self.device, None),
        )
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _save(self, model: "PreTrainedModel", folder: Path) -> None:
        """In the dtype that the model came in, with its licence, tokenizer and template."""
        from capgap.models.stored import copy_companions, local_folder, written_beside

        tokenizer: PreTrainedTokenizerFast = self.tokenizer
        end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
        for config in (model.config, model.generation_config):
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = end
            config.pad_token_id = end if padding is None else padding
        model.config.use_cache = True
        with written_beside(folder) as partial:
            copy_companions(local_folder(self.request.model), partial)
            model.to(self.config.dtype or model.dtype).save_pretrained(partial)
            tokenizer.save_pretrained(partial)


def usable_texts(
    reading: Reading[Any], tokenizer: "PreTrainedTokenizerFast", texts: Callable[[Any], list[str]]
) -> list[Any]:
    """The lines without a special token in a text; the others are added to the findings."""
    from capgap.tune.template import special_in

    usable = []
    for one in reading.usable:
        if any(special_in(tokenizer, text) for text in texts(one)):
            reading.findings.add("special_token", one.line)
        else:
            usable.append(one)
    return usable


def _window(request: Tuning, config: Any) -> int:
    from capgap.models.stored import positions_of

    positions = positions_of(config)
    if request.window is None:
        return min(WINDOW, positions or WINDOW)
    if positions is not None and request.window > positions:
        raise UserError(
            f"{request.model} reads at most {positions} tokens, the window has {request.window}: "
            f"take --window {positions} or less"
        )
    return request.window
