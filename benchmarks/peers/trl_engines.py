"""TRL's trainers on the same batches, with everything off that is not training."""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from peers.cases import BETA2, CLIP, LEARNING_RATE, LOSS_ENGINES, WEIGHT_DECAY, Case
from peers.engines import Setup

Row = dict[str, list[int]]


def takes_liger(case: Case) -> bool:
    """Its fastest way on a GPU; Liger's kernels are none for a CPU."""
    return case.device != "cpu" and LOSS_ENGINES["liger"].installed


def train_gkd(setup: Setup) -> list[float]:
    """lmbda 0: no text of the student's own; beta 0: the forward KL."""
    losses: list[Tensor] = []

    class Trainer(GKDTrainer):
        def training_step(self, *arguments: Any, **options: Any) -> Tensor:
            losses.append(super().training_step(*arguments, **options))
            return losses[-1]

    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            folder,
            lmbda=0.0,
            beta=0.0,
            max_length=None,
            train_sampling_strategy="sequential",
            use_liger_kernel=takes_liger(setup.case),
            **_shared_options(setup),
        )
        Trainer(data_collator=_as_tensors, **_shared_arguments(setup, config)).train()
    return [loss.item() for loss in losses]


def train_distillation(setup: Setup) -> list[float]:
    """The trainer always generates; here the text of the data set stands for what it generates.

    The first token of a row is the prompt, the others are the completion.
    """
    losses: list[Tensor] = []

    class Trainer(DistillationTrainer):
        def _prepare_inputs(self, generation_batch: Sequence[Row]) -> dict[str, Tensor]:
            batch = _as_tensors(generation_batch)
            ids = batch["input_ids"].to(self.accelerator.device)
            mask = batch["attention_mask"].to(self.accelerator.device)
            return {
                "prompt_ids": ids[:, :1],
                "prompt_mask": mask[:, :1],
                "completion_ids": ids[:, 1:],
                "completion_mask": mask[:, 1:],
                "num_items_in_batch": mask[:, 1:].sum(),
            }

        def training_step(self, *arguments: Any, **options: Any) -> Tensor:
            losses.append(super().training_step(*arguments, **options))
            return losses[-1]

    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            folder, beta=0.0, shuffle_dataset=False, **_shared_options(setup)
        )
        Trainer(**_shared_arguments(setup, config)).train()
    return [loss.item() for loss in losses]


def _shared_options(setup: Setup) -> dict[str, Any]:
    case = setup.case
    return {
        "temperature": 1.0,
        "per_device_train_batch_size": case.batch_windows,
        "max_steps": setup.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused",
        "adam_beta2": BETA2,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": CLIP,
        "bf16": case.precision == "bf16",
        "use_cpu": case.device == "cpu",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": case.device != "cpu",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _shared_arguments(setup: Setup, config: Any) -> dict[str, Any]:
    rows = torch.cat([windows.cpu() for windows in setup.batches()])
    return {
        "model": setup.students[0],
        "teacher_model": setup.teacher,
        "args": config,
        "train_dataset": Dataset.from_dict({"input_ids": rows.tolist()}),
        "processing_class": _tokenizer(setup.case.student.vocabulary),
        "callbacks": [_Laps(setup)],
    }


class _Laps(TrainerCallback):
    def __init__(self, setup: Setup) -> None:
        self.watch = setup.watch

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.lap()


def _as_tensors(rows: Sequence[Row]) -> dict[str, Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """The trainers want one; nothing is tokenised."""
    words = {f"<{number}>": number for number in range(vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<0>", pad_token="<0>", bos_token="<0>"
    )
