"""`capgap doctor`: what is installed, what is missing, what would be used, and no secret."""

import importlib.metadata
import json
import shutil

import pytest

from capgap import machine
from capgap.cli import doctor
from capgap.machine import GPUS, parse_gpus, resolve_device, usable_cores
from capgap.train.settings import auto_precision


def test_it_tells_what_is_here(typed, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    found = json.loads(typed("doctor", "--json").out)
    for name in ("torch", "transformers", "pydantic", "vl-convert-python"):
        assert found["versions"][name] == importlib.metadata.version(name)
    assert found["used"]["device"] == resolve_device("auto")
    assert found["used"]["precision"] == auto_precision(found["used"]["device"])
    assert found["machine"]["cores"] == usable_cores()
    assert found["disk"]["output"]["folder"] == str(tmp_path)
    free = shutil.disk_usage(tmp_path).free
    assert found["disk"]["output"]["free"] == pytest.approx(free, rel=0.5)
    told = typed("doctor").out
    assert "HF_HUB_OFFLINE: 1" in told
    assert "HF_TOKEN: set" in told
    assert "verysecret" not in told + json.dumps(found)


def test_what_is_missing_is_named(typed, monkeypatch):
    there = doctor.version

    def version(name: str) -> str:
        if name in ("trl", "pyyaml"):
            raise importlib.metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(doctor, "version", version)
    told = typed("doctor").out
    assert "extra chat: lacks trl" in told
    assert "extra gguf: there" in told
    assert "pyyaml MISSING" in told


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'capgap[chat]'"),
        ({"url": "file:///my%20code/capgap"}, "pip install '/my code/capgap[chat]'"),
        (
            {"url": "https://host/capgap", "vcs_info": {"vcs": "git"}},
            "pip install 'capgap[chat] @ git+https://host/capgap'",
        ),
    ],
)
def test_an_extra_comes_from_where_capgap_came(monkeypatch, origin, command):
    class Distribution:
        def read_text(self, name: str) -> str | None:
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(machine, "distribution", lambda name: Distribution())
    assert machine.install_command("chat") == command


def test_no_compiler_is_told(typed, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "compile: no, the compiler no-such-compiler is missing" in typed("doctor").out


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("16xA100", (16, "A100")),
        ("h200", (1, "H200")),
        ("RTX 4090", (1, "RTX4090")),
        ("2x3090", (2, "RTX3090")),
        ("4XL40S", (4, "L40S")),
        ("rtx-5090", (1, "RTX5090")),
    ],
)
def test_gpus_as_people_call_them(text, found):
    assert parse_gpus(text) == found
    assert found[1] in GPUS
