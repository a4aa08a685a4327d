"""TRL's trainers behind one function: silent, offline, resumable, adapters merged at the end; and
how likely a model finds the answers that were held out.

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
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from capgap.corpus.tokenizer import num_words
from capgap.distill.head import IGNORED_LABEL
from capgap.errors import Interrupted, UserError
from capgap.evaluate.losses import HeldoutSet, evaluate_heldout
from capgap.evaluate.measured import HeldoutLoss
from capgap.models.parts import Parts
from capgap.stage import FieldError, ShouldStop
from capgap.train.learning_rate import Schedule
from capgap.tune.template import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from capgap.stages.tuning import Tuning

# Written into a checkpoint when all else is there
COMPLETE = "complete"
# A pickle that transformers writes and never reads
_UNUSED_PICKLE = "training_args.bin"


class Job(NamedTuple):
    """The work of a trainer.

    Attributes:
        rows: what TRL reads: `input_ids` and `labels`, or ids of `prompt`, `chosen`, `rejected`.
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
    should_stop: ShouldStop


class Tuned(NamedTuple):
    """The model, adapters merged, and of every step, those before a restart included, `loss` and
    `learning_rate`."""

    model: PreTrainedModel
    curve: dict[str, list[float]]


class _Ours:
    """What both trainers do our way."""

    args: Any
    lr_scheduler: Any
    optimizer: Any

    def _send_telemetry(self) -> None:
        """Nothing is sent to anybody."""

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
    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows are tokens already."""
        return dataset


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
        others = {"epoch": "epoch"} | self.job.settings.numbers
        self.job.on_step(
            {
                "step": state.global_step - 1,
                "loss": loss,
                "learning_rate": numbers["learning_rate"],
                "gradient_norm": norm,
                "seconds": seconds,
                **{ours: numbers.get(theirs) for theirs, ours in others.items()},
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


def tune(job: Job) -> Tuned:
    """Trains by TRL, with the options of the stage: by cross-entropy on the labels, or for pairs by
    DPO (arXiv 2305.18290). DPO's reference is the model as it comes: a frozen copy, or with LoRA
    the model without adapters."""
    model, settings, steps = job.model, job.settings, _Steps(job)
    on_cpu = model.device.type == "cpu"
    is_dpo = "chosen_ids" in job.rows[0]
    kind, config = (_DPO, DPOConfig) if is_dpo else (_SFT, SFTConfig)
    # transformers has renamed it, and warns of the old name
    old, new = "gradient_checkpointing", "activation_checkpointing"
    checkpointing = new if new in {field.name for field in fields(config)} else old
    # the rows of SFT are tokens and labels already
    ready = {} if is_dpo else {"packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    with _alone(settings.seed):
        arguments = config(
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
            **ready,
            **{theirs: getattr(settings, ours) for theirs, ours in settings.options.items()},
        )
        # with several GPUs in sight transformers would spread over all of them, which TRL refuses
        if arguments.device.type == "cuda":
            arguments._n_gpu = 1
        needs_copy = is_dpo and not settings.lora
        reference = copy.deepcopy(model).requires_grad_(False) if needs_copy else None
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(job.rows),
            processing_class=copy.deepcopy(job.tokenizer),
            peft_config=_adapters(model, settings),
            callbacks=[steps],
            **({"ref_model": reference} if is_dpo else {}),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_checkpoint(job.folder))
        if steps.broken is not None:
            raise UserError(
                f"the loss is not finite at step {steps.broken}: take a lower learning_rate than "
                f"{settings.learning_rate:g}, and a new out"
            )
        if trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted
        tuned = trainer.model.merge_and_unload() if settings.lora else trainer.model
    history = [line for line in trainer.state.log_history if "loss" in line]
    names = ("loss", "learning_rate")
    return Tuned(tuned, {name: [line[name] for line in history] for name in names})


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
            raise FieldError(
                "lora_modules",
                f"{name!r}: this model has no such linear layer below its head; it has "
                f"{', '.join(sorted(linear))}",
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


def score_answers(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerFast",
    examples: Sequence[Example],
    *,
    bf16: bool,
) -> HeldoutLoss:
    """Nats of the assistant's tokens: an example is a document, its bytes are those of the answers'
    text. Under bf16 autocast where training has it too."""
    answers = [tokenizer.decode(one.spoken, skip_special_tokens=True) for one in examples]
    inputs = [torch.tensor(one.ids[:-1]) for one in examples]
    targets = [torch.tensor(one.labels[1:]) for one in examples]
    heldout = HeldoutSet(
        pad_sequence(inputs, batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=IGNORED_LABEL),
        torch.arange(len(examples)),
        [one.num_counted for one in examples],
        [len(answer.encode()) for answer in answers],
        num_words(tokenizer),
    )
    with torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext():
        return evaluate_heldout(Parts(model), heldout)


def preference_scores(
    chosen: HeldoutLoss, rejected: HeldoutLoss, before: dict[str, Any] | None, beta: float
) -> dict[str, Any]:
    """Numbers of DPO (arXiv 2305.18290), from the losses of answers as documents.

    loss: the mean of -log sigmoid(beta x margin), the margin being by how much more the chosen
    answer has gained over the model before than the rejected one; accuracy: the share of pairs
    with a margin above 0, None where `before`, the numbers of the model before, is None;
    chosen_likelier: the share whose chosen answer is the likelier text.
    """
    likelier = np.subtract(rejected.document_losses, chosen.document_losses)
    margins = np.zeros_like(likelier)
    if before is not None:
        margins = likelier - np.subtract(before["rejected_nats"], before["chosen_nats"])
    return {
        "loss": float(np.logaddexp(0, -beta * margins).mean()),
        "accuracy": float((margins > 0).mean()) if margins.any() else None,
        "margin": float(margins.mean()),
        "chosen_likelier": float((likelier > 0).mean()),
        "chosen_nats": chosen.document_losses,
        "rejected_nats": rejected.document_losses,
    }
