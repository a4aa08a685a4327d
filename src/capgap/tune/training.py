"""TRL's trainers behind one function: silent, offline, resumable, merged at the end.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

from capgap.errors import UserError
from capgap.train.loop import Interrupted
from capgap.train.optimizer import Schedule
from capgap.tune.settings import TuneSettings
from capgap.tune.template import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Written into a checkpoint when all else is there
COMPLETE = "complete"
# A pickle that transformers writes and never reads
_UNUSED_PICKLE = "training_args.bin"


@dataclass(frozen=True)
class StepLine:
    """What a step tells, counted from 0 as in all training here; its mean loss in nats per counted
    token (instruct) or pair (prefer)."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    others: dict[str, float]


@dataclass(frozen=True)
class Tuned:
    """The model, adapters merged, and what its steps told, those before a restart included."""

    model: PreTrainedModel
    steps: int
    losses: list[float]
    learning_rates: list[float]


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Last names of the linear layers below the head: q_proj, up_proj and so on."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if _is_linear(module) and module is not head
        }
    )


def instruct_model(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerFast",
    examples: Sequence[Example],
    settings: TuneSettings,
    folder: Path,
    *,
    neftune: float | None = None,
    on_step: Callable[[StepLine], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Tuned:
    """Cross-entropy on the counted tokens of the examples; checkpoints go into `folder`.

    `neftune`: noise on the embeddings (arXiv 2310.05914). Interrupted when `should_stop` said so,
    after a checkpoint; the same call goes on from the last one.
    """
    rows = [{"input_ids": one.ids, "labels": one.labels} for one in examples]
    with _alone(settings.seed):
        arguments = _arguments(
            SFTConfig,
            settings,
            folder,
            neftune_noise_alpha=neftune,
            max_length=None,
            packing=False,
            # the examples are tokens and labels already
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = _SFT(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),
            peft_config=_adapters(model, settings),
        )
        return _train(trainer, settings, folder, on_step, should_stop)


def prefer_model(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerFast",
    pairs: Sequence[dict[str, Any]],
    settings: TuneSettings,
    folder: Path,
    *,
    beta: float = 0.1,
    on_step: Callable[[StepLine], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Tuned:
    """DPO (arXiv 2305.18290) on pairs of `prompt`, `chosen` and `rejected` messages.

    The reference is the model as it comes: a frozen copy, or with LoRA the model without adapters.
    Otherwise as `instruct_model`.
    """
    with _alone(settings.seed):
        reference = None if settings.lora else copy.deepcopy(model).requires_grad_(False)
        trainer = _DPO(
            model=model,
            ref_model=reference,
            args=_arguments(DPOConfig, settings, folder, beta=beta, max_length=None),
            train_dataset=datasets.Dataset.from_list(list(pairs)),
            processing_class=copy.deepcopy(tokenizer),
            peft_config=_adapters(model, settings),
        )
        return _train(trainer, settings, folder, on_step, should_stop)


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
    """Tells the steps, saves now and then, stops when asked or when a loss is not finite."""

    def __init__(
        self,
        settings: TuneSettings,
        on_step: Callable[[StepLine], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.settings = settings
        self.on_step = on_step
        self.should_stop = should_stop
        self.saved = self.stepped = time.monotonic()
        self.broken: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = self.stepped = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stops = self.should_stop() and state.global_step < state.max_steps
        if stops or time.monotonic() - self.saved > self.settings.checkpoint_seconds:
            control.should_save = True
        if stops:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        numbers = {name: float(value) for name, value in logs.items()}
        loss, norm = numbers.pop("loss"), numbers.pop("grad_norm", math.nan)
        if not math.isfinite(loss + norm):
            self.broken = state.global_step
            control.should_training_stop = True
            control.should_save = False
            return
        now = time.monotonic()
        seconds, self.stepped = now - self.stepped, now
        rate = numbers.pop("learning_rate")
        self.on_step(
            StepLine(state.global_step - 1, state.max_steps, loss, rate, norm, seconds, numbers)
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.monotonic()
        folder = Path(args.output_dir)
        newest = folder / f"checkpoint-{state.global_step}"
        (newest / _UNUSED_PICKLE).unlink(missing_ok=True)
        (newest / COMPLETE).touch()
        for other in folder.glob("checkpoint-*"):
            if other != newest:
                shutil.rmtree(other)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half written ones are deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = [path for path in found if (path / COMPLETE).exists()]
    for path in set(found) - set(whole):
        shutil.rmtree(path)
    return whole[-1] if whole else None


def _train(
    trainer: Any,
    settings: TuneSettings,
    folder: Path,
    on_step: Callable[[StepLine], None],
    should_stop: Callable[[], bool],
) -> Tuned:
    steps = _Steps(settings, on_step, should_stop)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(steps)
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if steps.broken is not None:
        raise UserError(
            f"the loss is not finite at step {steps.broken}: take a lower --learning-rate than "
            f"{settings.learning_rate:g}, in a new --out"
        )
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted
    model = trainer.model
    if settings.lora is not None:
        model = model.merge_and_unload()
    history = [line for line in trainer.state.log_history if "loss" in line]
    return Tuned(
        model,
        trainer.state.global_step,
        [line["loss"] for line in history],
        [line["learning_rate"] for line in history],
    )


def _arguments(kind: Any, settings: TuneSettings, folder: Path, **others: Any) -> Any:
    # transformers has renamed it, and warns of the old name
    named = {field.name for field in fields(kind)}
    checkpointing = (
        "activation_checkpointing"
        if "activation_checkpointing" in named
        else "gradient_checkpointing"
    )
    on_cpu = settings.device == "cpu"
    arguments = kind(
        output_dir=str(folder),
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // settings.micro_batch,
        learning_rate=settings.learning_rate,
        # a share of the steps
        warmup_steps=settings.warmup_fraction,
        num_train_epochs=settings.epochs,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=settings.seed,
        bf16=settings.bf16,
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


def _adapters(model: PreTrainedModel, settings: TuneSettings) -> Any:
    """PEFT's description of the adapters, None without; UserError for a layer that is not there."""
    lora = settings.lora
    if lora is None:
        return None
    from peft import LoraConfig

    known = linear_layers(model)
    wanted = known if lora.modules is None else list(lora.modules)
    for name in wanted:
        if name not in known:
            raise UserError(
                f"--lora-modules {name!r}: this model has no such linear layer below its head; it "
                f"has {', '.join(known)}"
            )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=wanted,
        # GPT-2 stores its matrices the other way round
        fan_in_fan_out=any(not isinstance(one, nn.Linear) for one in _linear_modules(model)),
        task_type="CAUSAL_LM",
    )


def _linear_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """A trainer prints, logs, draws bars and sets the seeds of the whole process: not outside."""
    python, numbers = random.getstate(), np.random.get_state()
    levels = {name: logging.getLogger(name).level for name in ("trl", "peft", "accelerate")}
    told = transformers_logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        datasets.disable_progress_bars()
        with torch.random.fork_rng(), warnings.catch_warnings():
            # PEFT asks transformers under the old name
            warnings.filterwarnings("ignore", ".*gradient_checkpointing. is deprecated")
            # adapters and dropout are drawn from it
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(told)
        if bars:
            datasets.enable_progress_bars()
