"""TRL's trainers behind two functions: silent, offline, resumable, adapters merged at the end.

Checkpoints are those of transformers. Beside safetensors they hold optimizer, schedule and random
state as torch files, which are read with weights_only, so that they can hold tensors and plain
numbers but no code. They lie in the run's own folder; none is ever taken from anywhere else.
"""

import copy
import logging
import math
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from capgap.errors import Interrupted, UserError
from capgap.train.optimizer import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from capgap.stages.tuning import Tuning

# Written into a checkpoint when all else is there
COMPLETE = "complete"
# A pickle that transformers writes and never reads
_UNUSED_PICKLE = "training_args.bin"


@dataclass(frozen=True)
class Job:
    """What a trainer is given.

    Attributes:
        rows: what TRL reads: `input_ids` and `labels`, or `prompt`, `chosen` and `rejected`.
        settings: how to tune.
        folder: for checkpoints; the same job goes on from the last one.
        on_step: gets a line of metrics.jsonl after every step.
        should_stop: asked after every step; then a checkpoint is saved, and Interrupted raised.
    """

    model: PreTrainedModel
    tokenizer: "PreTrainedTokenizerFast"
    rows: list[dict[str, Any]]
    settings: "Tuning"
    folder: Path
    bf16: bool
    on_step: Callable[[dict[str, Any]], None]
    should_stop: Callable[[], bool]


@dataclass(frozen=True)
class Tuned:
    """The model, adapters merged, and of every step, those before a restart included, `loss` and
    `learning_rate`."""

    model: PreTrainedModel
    curve: dict[str, list[float]]


def instruct_model(job: Job, *, neftune: float | None) -> Tuned:
    """Cross-entropy on the labels; `neftune`: noise on the embeddings (arXiv 2310.05914)."""
    with _alone(job.settings.seed):
        arguments = _arguments(
            SFTConfig,
            job,
            neftune_noise_alpha=neftune,
            packing=False,
            # the rows are tokens and labels already
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        return _train(_SFT, job, arguments)


def prefer_model(job: Job, *, beta: float) -> Tuned:
    """DPO (arXiv 2305.18290). The reference is the model as it comes: a frozen copy, or with LoRA
    the model without adapters."""
    with _alone(job.settings.seed):
        arguments = _arguments(DPOConfig, job, beta=beta)
        reference = None
        if not job.settings.lora:
            reference = copy.deepcopy(job.model).requires_grad_(False)
        return _train(_DPO, job, arguments, ref_model=reference)


class _Ours:
    """What both trainers do our way."""

    args: Any
    lr_scheduler: Any
    optimizer: Any

    def _send_telemetry(self) -> None:
        """Nothing is told to anybody."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of all training here; that of transformers has a first step at rate 0."""
        schedule = Schedule(warmup_fraction=self.args.warmup_steps)
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: schedule.share(step, num_training_steps),
            )
        return self.lr_scheduler


class _SFT(_Ours, SFTTrainer):
    pass


class _DPO(_Ours, DPOTrainer):
    pass


class _Steps(TrainerCallback):
    """Reports the steps, saves now and then, stops when asked or when a loss is not finite."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.saved = self.stepped = 0.0
        self.broken: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = self.stepped = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stops = self.job.should_stop() and state.global_step < state.max_steps
        if stops or time.monotonic() - self.saved > self.job.settings.checkpoint_seconds:
            control.should_save = True
        if stops:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        numbers = {name: float(value) for name, value in logs.items()}
        loss, norm = numbers["loss"], numbers.get("grad_norm", math.nan)
        if not math.isfinite(loss + norm):
            self.broken = state.global_step
            control.should_training_stop = True
            control.should_save = False
            return
        now = time.monotonic()
        seconds, self.stepped = now - self.stepped, now
        others = self.job.settings.numbers.items()
        self.job.on_step(
            {
                "step": state.global_step - 1,
                "loss": loss,
                "learning_rate": numbers["learning_rate"],
                "gradient_norm": norm,
                "seconds": seconds,
                **{ours: numbers.get(theirs) for theirs, ours in others},
            }
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.monotonic()
        newest = self.job.folder / f"checkpoint-{state.global_step}"
        (newest / _UNUSED_PICKLE).unlink(missing_ok=True)
        (newest / COMPLETE).touch()
        for other in self.job.folder.glob("checkpoint-*"):
            if other != newest:
                shutil.rmtree(other)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; half written ones are deleted."""
    last = None
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        if (path / COMPLETE).exists():
            last = str(path)
        else:
            shutil.rmtree(path)
    return last


def _train(kind: Any, job: Job, arguments: Any, **others: Any) -> Tuned:
    steps = _Steps(job)
    trainer = kind(
        model=job.model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(job.rows),
        processing_class=copy.deepcopy(job.tokenizer),
        peft_config=_adapters(job.model, job.settings),
        callbacks=[steps],
        **others,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(job.folder))
    if steps.broken is not None:
        raise UserError(
            f"the loss is not finite at step {steps.broken}: take a lower --learning-rate than "
            f"{job.settings.learning_rate:g}, in a new --out"
        )
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted
    model = trainer.model.merge_and_unload() if job.settings.lora else trainer.model
    history = [line for line in trainer.state.log_history if "loss" in line]
    return Tuned(
        model, {name: [line[name] for line in history] for name in ("loss", "learning_rate")}
    )


def _arguments(kind: Any, job: Job, **others: Any) -> Any:
    settings, on_cpu = job.settings, job.model.device.type == "cpu"
    # transformers has renamed it, and warns of the old name
    old, new = "gradient_checkpointing", "activation_checkpointing"
    checkpointing = new if new in {field.name for field in fields(kind)} else old
    arguments = kind(
        output_dir=str(job.folder),
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // settings.micro_batch,
        learning_rate=settings.learning_rate,
        # a share of the steps
        warmup_steps=settings.warmup_fraction,
        num_train_epochs=settings.epochs,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        seed=settings.seed,
        bf16=job.bf16,
        fp16=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        report_to="none",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        disable_tqdm=True,
        **{checkpointing: settings.activation_checkpointing},
        **others,
    )
    # with several GPUs in sight transformers would spread over all of them, which TRL refuses
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1
    return arguments


def _adapters(model: PreTrainedModel, settings: "Tuning") -> Any:
    """PEFT's description of the adapters (arXiv 2106.09685), None without; UserError for a layer
    that is not there."""
    if not settings.lora:
        return None
    from peft import LoraConfig

    # GPT-2 has Conv1D, which stores a matrix the other way round
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if module is not head
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }
    wanted = sorted(linear) if settings.lora_modules is None else list(settings.lora_modules)
    for name in wanted:
        if name not in linear:
            raise UserError(
                f"--lora-modules {name!r}: this model has no such linear layer below its head; it "
                f"has {', '.join(sorted(linear))}"
            )
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=wanted,
        fan_in_fan_out=not all(isinstance(module, nn.Linear) for module in linear.values()),
        task_type="CAUSAL_LM",
    )


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """A trainer prints, logs, draws bars and sets the seeds of the whole process: not outside."""
    with ExitStack() as after:
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        for name in ("trl", "peft", "accelerate"):
            logger = logging.getLogger(name)
            after.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        after.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        if datasets.is_progress_bar_enabled():
            after.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        after.enter_context(torch.random.fork_rng())
        after.enter_context(warnings.catch_warnings())
        # PEFT asks transformers under the old name
        warnings.filterwarnings("ignore", ".*gradient_checkpointing. is deprecated")
        # adapters and dropout are drawn from it
        torch.manual_seed(seed)
        yield
