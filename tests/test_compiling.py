"""Layers are compiled where that is faster, and what they compute stays what it was."""

import shutil
import time
import warnings
from functools import partial
from typing import get_args

import pytest
import torch

from capgap.distill import DivergenceName, losses
from capgap.distill.divergences import Divergence, SparseSignal
from capgap.distill.head import HeadInput
from capgap.distill.teacher import OnlineTeacher
from capgap.errors import UserError
from capgap.models.build import build_model
from capgap.models.families import FAMILIES
from capgap.models.parallel import ALONE
from capgap.models.parts import Parts
from capgap.models.shape import ladder_shape
from capgap.train import compiling
from capgap.train.learner import Learner
from capgap.train.loop import LoopSettings, train


def shape_of(size, architecture="llama"):
    return ladder_shape(architecture, size, vocabulary=300, positions=16)


@pytest.fixture
def parts():
    return Parts(build_model(shape_of(8_000), seed=0))


def settle(asked, parts, trial, **more):
    options = {
        "shapes": {(2, 16)},
        "trials_left": 10,
        "folder": None,
        "device": torch.device("cpu"),
        "ranks": ALONE,
    }
    compiling.settle(asked, [parts], trial, **(options | more))


def is_compiled(parts):
    return all("forward" in vars(layer) for layer in parts.layers)


@pytest.fixture
def compiler(monkeypatch):
    """Stands for a real one, and takes no time."""
    monkeypatch.setattr(compiling, "missing", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_the_faster_way_is_kept_and_remembered(compiler, parts, tmp_path, monkeypatch, gain):
    monkeypatch.setattr(compiling, "WORTHWHILE_SECONDS", 0.0)

    def trial(compiled):
        time.sleep(0.02 * (gain if is_compiled(parts) else 1.0))

    settle("auto", parts, trial, folder=tmp_path / "checkpoints")
    assert is_compiled(parts) == (gain < 1)
    # a run that continues does not try again
    again = Parts(parts.model)
    compiling.undo([again]) if gain < 1 else None
    settle(
        "auto", again, lambda compiled: pytest.fail("tried again"), folder=tmp_path / "checkpoints"
    )
    assert is_compiled(again) == (gain < 1)


def test_a_short_run_is_not_worth_a_trial(compiler, parts):
    calls = []
    settle("auto", parts, calls.append)
    assert len(calls) == 1
    assert not is_compiled(parts)


def test_without_a_compiler_nothing_is_tried(parts, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr(compiling, "missing", lambda device: "a compiler")
        settle("auto", parts, lambda compiled: pytest.fail("tried"), folder=tmp_path)
    # and a run that continues where there is one computes as it began
    settle("auto", parts, lambda compiled: pytest.fail("tried"), folder=tmp_path)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    settle("auto", parts, lambda compiled: pytest.fail("tried"))
    with pytest.raises(UserError, match=r"\(run\.compile\) need the compiler g\+\+"):
        settle("on", parts, lambda compiled: None)
    settle("off", parts, lambda compiled: pytest.fail("tried"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_layers_compute_the_same(parts):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (2, 16), generator=generator)
    probe = torch.randn(parts(ids).shape, generator=generator)

    def gradients():
        parts.zero_grad()
        hidden = parts(ids)
        (hidden * probe).sum().backward()
        return [hidden.detach(), *(one.grad.clone() for one in parts.parameters())]

    plain = gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        settle("on", parts, lambda compiled: None)
        compiled = gradients()
    for mine, its in zip(compiled, plain, strict=True):
        assert (mine - its).norm() < 1e-5 * its.norm()


@pytest.mark.parametrize("name", get_args(DivergenceName))
def test_a_compiled_loss_is_the_plain_one(monkeypatch, name):
    """Every way through it; the kernels themselves are tried with `pytest -m cuda`."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    losses._fused.cache_clear()
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight, bias, near = draw(70, 8), draw(101, 8), draw(101), draw(70, 8)
    targets = torch.randint(101, (70,), generator=generator)
    targets[::9] = -100
    shares, words = draw(70, 101).softmax(-1).topk(5)
    label_loss, entropy, soft_entropy = draw(3, 70, 1)
    kept = (words, shares, 1 - shares.sum(-1, keepdim=True), label_loss, entropy, soft_entropy)
    teachers = []
    for temperature in (1.0, 2.0):
        teachers.append((HeadInput(near, weight, softcap=20.0), temperature))
        teachers.append((SparseSignal(*kept, temperature, 101, knows_best=True), temperature))
    for teacher, temperature in teachers:
        found = []
        for compiled in (False, True):
            leaves = [one.clone().requires_grad_() for one in (hidden, weight, bias)]
            result = losses.column_loss(
                [HeadInput(*leaves, softcap=30.0, logit_scale=0.5), HeadInput(*leaves[:2])],
                targets,
                alphas=[0.7, 0.0],
                teacher=teacher,
                temperature=temperature,
                divergence=Divergence(name),
                chunk_tokens=64,
                compiled=compiled,
            )
            sum(one.loss for one in result.students).backward()
            told = [value for one in result.students for value in vars(one).values()]
            gradients = [one.grad for one in leaves]
            found.append([*told, result.teacher.ce, result.teacher.entropy, *gradients])
        torch.testing.assert_close(*found)
    losses._fused.cache_clear()


def test_every_model_has_its_own_kernels_for_every_micro_batch(small_corpus, monkeypatch):
    """Six models and two shapes are more than torch's limit of 8; the rest would run as before,
    and nobody would be told."""
    frames = []
    compile_ = torch.compile

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(compile_, backend=backend))
    monkeypatch.setattr(compiling, "missing", lambda device: None)
    torch._dynamo.reset()
    sizes = (8_000, 10_000, 12_000, 14_000, 16_000)
    learners = [
        Learner(str(size), build_model(shape_of(size), seed=0), 2, 1e-3, alpha=0.5)
        for size in sizes
    ]
    settings = LoopSettings(6, 4, 0, compile="on")
    teacher = OnlineTeacher(build_model(shape_of(30_000), seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        train(learners, small_corpus, settings, teacher=teacher)
    assert len(frames) == 2 * (len(sizes) + 1) > 8
    # text of another shape, as in an evaluation, makes no new ones
    learners[0].parts(torch.zeros(3, 9, dtype=torch.int64))
    assert len(frames) == 2 * (len(sizes) + 1)


@pytest.mark.parametrize("architecture", list(FAMILIES))
def test_layers_of_all_families_take_their_hidden_states_first(compiler, architecture):
    parts = Parts(build_model(shape_of(20_000, architecture), seed=0))
    ids = torch.zeros(2, 16, dtype=torch.int64)
    plain = parts(ids)
    settle("on", parts, lambda compiled: None)
    assert torch.equal(parts(ids), plain)
