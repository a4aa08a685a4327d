"""Layers are compiled where that is faster, and what they compute stays what it was."""

import shutil
import time
import warnings

import pytest
import torch

from capgap.errors import UserError
from capgap.models.build import Parts, build_model
from capgap.models.parallel import ALONE
from capgap.models.shape import ladder_shape
from capgap.train import compiling


@pytest.fixture
def parts():
    return Parts(build_model(ladder_shape("llama", 8_000, vocabulary=300, positions=16), seed=0))


def settle(asked, parts, trial, **more):
    options = {"trials_left": 10, "folder": None, "device": torch.device("cpu"), "ranks": ALONE}
    compiling.settle(asked, [parts], trial, **(options | more))


def is_compiled(parts):
    return all("forward" in vars(layer) for layer in parts.layers)


@pytest.fixture
def compiler(monkeypatch):
    """Stands for a real one, and takes no time."""
    monkeypatch.setattr(compiling, "_missing", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_the_faster_way_is_kept_and_remembered(compiler, parts, tmp_path, monkeypatch, gain):
    monkeypatch.setattr(compiling, "WORTHWHILE_SECONDS", 0.0)

    def trial():
        time.sleep(0.02 * (gain if is_compiled(parts) else 1.0))

    settle("auto", parts, trial, folder=tmp_path / "checkpoints")
    assert is_compiled(parts) == (gain < 1)
    # a run that continues does not try again
    again = Parts(parts.model)
    compiling.undo([again]) if gain < 1 else None
    settle("auto", again, lambda: pytest.fail("tried again"), folder=tmp_path / "checkpoints")
    assert is_compiled(again) == (gain < 1)


def test_a_short_run_is_not_worth_a_trial(compiler, parts):
    calls = []
    settle("auto", parts, lambda: calls.append(1))
    assert len(calls) == 1
    assert not is_compiled(parts)


def test_without_a_compiler_nothing_is_tried(parts, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr(compiling, "_missing", lambda device: "a compiler")
        settle("auto", parts, lambda: pytest.fail("tried"), folder=tmp_path)
    # and a run that continues where there is one computes as it began
    settle("auto", parts, lambda: pytest.fail("tried"), folder=tmp_path)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    settle("auto", parts, lambda: pytest.fail("tried"))
    with pytest.raises(UserError, match=r"\(run\.compile\) need the compiler g\+\+"):
        settle("on", parts, lambda: None)
    settle("off", parts, lambda: pytest.fail("tried"))


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
        settle("on", parts, lambda: None)
        compiled = gradients()
    for mine, its in zip(compiled, plain, strict=True):
        assert (mine - its).norm() < 1e-5 * its.norm()
