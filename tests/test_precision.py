"""What `auto` becomes: the students' precision, and what a teacher computes in."""

import pytest
import torch

from capgap.errors import UserError
from capgap.train.settings import VARIABLE, auto_precision, autocast_dtype, teacher_dtype


@pytest.mark.parametrize("forced", ["fp32", "bf16"])
def test_the_environment_decides_what_auto_is(monkeypatch, forced):
    monkeypatch.setenv(VARIABLE, forced)
    assert auto_precision("cpu") == forced
    assert autocast_dtype("auto", "cpu") == (torch.bfloat16 if forced == "bf16" else None)
    # what is asked for stays
    assert autocast_dtype("fp32", "cpu") is None
    assert autocast_dtype("bf16", "cpu") is torch.bfloat16


def test_a_precision_that_is_none_is_told(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fp8")
    with pytest.raises(UserError, match="CAPGAP_AUTO_PRECISION=fp8: set it to fp32 or bf16"):
        auto_precision("cpu")


@pytest.mark.parametrize("amx", [False, True])
def test_a_processor_takes_bf16_where_it_has_tiles(monkeypatch, amx):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    assert auto_precision("cpu") == ("bf16" if amx else "fp32")


def test_a_teacher_follows_its_students_on_a_gpu_alone(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert teacher_dtype("auto", "auto", "cuda:0") == "bf16"
    assert teacher_dtype("auto", "fp32", "cuda:0") == "stored"
    assert teacher_dtype("auto", "bf16", "cpu") == "stored"
    assert teacher_dtype("stored", "bf16", "cuda:0") == "stored"
    assert teacher_dtype("fp32", "bf16", "cuda:0") == "fp32"
