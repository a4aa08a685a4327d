"""The loss in loops of others: against float64, against our loop, and in transformers' Trainer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from capgap import DistillationLoss, TeacherColumn, distillation_loss
from capgap.distill.head import HeadInput
from capgap.distill.losses import column_loss
from capgap.models.build import build_model
from capgap.models.parts import Parts
from capgap.models.shape import ladder_shape

IGNORED = -100


def model(size: int, seed: int, **changes):
    shape = ladder_shape("llama", size, vocabulary=300, positions=32)
    made = build_model(shape, seed=seed)
    return made.double() if changes.get("double") else made


def plain_loss(student, teacher, ids, labels, *, alpha, temperature):
    """From whole logits, as the formula says it."""
    own, other = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1]
    counted = labels[:, 1:] != IGNORED
    ce = torch.nn.functional.cross_entropy(own[counted], labels[:, 1:][counted], reduction="sum")
    p, q = ((one[counted] / temperature).log_softmax(-1) for one in (other, own))
    kl = (p.exp() * (p - q)).sum()
    return ((1 - alpha) * ce + alpha * temperature**2 * kl) / counted.sum()


@pytest.fixture
def batch():
    ids = torch.randint(300, (3, 17), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = IGNORED
    return ids, labels


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_module_is_the_formula(batch, temperature):
    ids, labels = batch
    student, teacher = model(9_000, 1, double=True), model(20_000, 2, double=True)
    expected = plain_loss(student, teacher, ids, labels, alpha=0.3, temperature=temperature)
    expected.backward()
    gradients = {name: one.grad.clone() for name, one in student.named_parameters()}
    student.zero_grad()
    teacher.zero_grad()
    loss = DistillationLoss(student, teacher, alpha=0.3, temperature=temperature)(ids, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, one in student.named_parameters():
        torch.testing.assert_close(one.grad, gradients[name])
    assert all(one.grad is None for one in teacher.parameters())


def test_the_function_is_the_module(batch):
    ids, labels = batch
    student, teacher = model(9_000, 1), model(20_000, 2)
    whole = DistillationLoss(student, teacher, alpha=0.7)(ids, labels)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    loss = distillation_loss(
        student.model(ids).last_hidden_state,
        student.lm_head,
        shifted,
        teacher_hidden=teacher.model(ids).last_hidden_state,
        teacher_head=teacher.lm_head.weight,
        alpha=0.7,
    )
    torch.testing.assert_close(loss, whole)
    alone = distillation_loss(
        student.model(ids).last_hidden_state, student.lm_head, shifted, alpha=0
    )
    torch.testing.assert_close(alone, student(ids, labels=labels).loss)


def test_it_is_what_our_loop_takes(batch):
    ids, _ = batch
    student, teacher = model(9_000, 1), model(20_000, 2)
    ours = column_loss(
        [HeadInput.of(Parts(student), ids[:, :-1])],
        ids[:, 1:].reshape(-1),
        alphas=[0.5],
        teacher=HeadInput.of(Parts(teacher), ids[:, :-1]),
    )
    loss = DistillationLoss(student, teacher)(ids)
    torch.testing.assert_close(loss, ours.students[0].loss / ours.tokens)


def test_padding_on_the_right_changes_nothing_and_on_the_left_is_refused(batch):
    ids, _ = batch
    loss = DistillationLoss(model(9_000, 1), model(20_000, 2))
    padded = torch.nn.functional.pad(ids, (0, 4), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    torch.testing.assert_close(loss(padded, attention_mask=mask), loss(ids))
    with pytest.raises(ValueError, match="padding_side"):
        loss(padded, attention_mask=mask.flip(1))


def test_a_column_of_all_words_is_the_teacher(batch):
    ids, labels = batch
    student, teacher = model(9_000, 1), model(20_000, 2)
    column = TeacherColumn(teacher, top_k=299, temperature=2.0)
    rows = Dataset.from_dict({"input_ids": ids.numpy()}).map(column, batched=True, batch_size=2)
    signal = torch.tensor(np.asarray(rows["teacher"]))
    assert signal.shape == (3, 17, column.format.token_bytes)
    cached = DistillationLoss(student, column, temperature=2.0)(ids, labels, teacher=signal)
    online = DistillationLoss(student, teacher, temperature=2.0)(ids, labels)
    # what is kept is rounded to half floats
    torch.testing.assert_close(cached, online, rtol=2e-3, atol=0)
    with pytest.raises(ValueError, match="remove_unused_columns"):
        DistillationLoss(student, column, temperature=2.0)(ids, labels)


def test_the_trainer_of_the_page_learns(tmp_path):
    """docs/loops.md, in transformers' own Trainer."""
    page = (Path(__file__).parents[1] / "docs/loops.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    names: dict = {}
    exec(code, names)
    student, teacher = model(9_000, 1), model(20_000, 2)
    ids = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(1)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    first = DistillationLoss(student, teacher, alpha=0.5)(torch.tensor(ids)).item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    trainer = names["DistillationTrainer"](
        student, arguments, train_dataset=rows, teacher=teacher, alpha=0.5
    )
    trainer.train()
    told = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    # the log rounds to four digits
    assert told[0] == pytest.approx(first, abs=1e-3)
    assert told[-1] < first - 0.3
    assert isinstance(trainer, Trainer)
