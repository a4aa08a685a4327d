"""`export --push`: told first, private, and nothing is uploaded that may not be."""

import json
from pathlib import Path

import huggingface_hub
import pytest

from capgap.export.push import TERMS, push
from capgap.models.build import build_model, save_model
from capgap.models.shape import ladder_shape


@pytest.fixture
def model(small_corpus, tmp_path) -> Path:
    words = small_corpus.vocabulary
    made = build_model(ladder_shape("llama", 9_000, vocabulary=words, positions=32), seed=0)
    save_model(made, tmp_path / "model", small_corpus.tokenizer)
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch) -> list[tuple]:
    """What the Hub was asked for."""
    asked: list[tuple] = []

    class Api:
        def create_repo(self, name, *, private, exist_ok):
            asked.append(("create", name, private))
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id, folder_path):
            asked.append(("folder", repo_id, sorted(path.name for path in folder_path.iterdir())))

        def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo):
            asked.append(("file", repo_id, path_in_repo))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return asked


def test_a_model_is_uploaded_private(typed, model, hub, tmp_path):
    (model / "LICENSE").write_text("MIT License")
    out = tmp_path / "final"
    answer = typed("export", model, "--out", out, "--push", "me/mine", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)["push"]
    assert found["uploaded"]
    assert found["url"] == "https://hub/me/mine"
    assert found["terms"] == list(TERMS["mit"])
    assert "licence mit: keep the copyright line" in answer.err
    assert [one[0] for one in hub] == ["create", "folder"]
    assert hub[0] == ("create", "me/mine", True)
    assert "README.md" in hub[1][2]
    assert found["bytes"] == sum(path.stat().st_size for path in out.iterdir())


def test_a_dry_run_uploads_nothing(typed, model, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    answer = typed("export", model, "--out", tmp_path / "final", "--push", "me/mine", "--dry-run")
    assert answer.code == 0, answer.err
    assert "not uploaded: me/mine" in answer.out
    assert hub == []
    assert (tmp_path / "final/config.json").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--push", "mine"], "--push 'mine' is no name on the Hub"),
        (["--public"], "public and dry_run are of use with push alone"),
        (["--push", "me/mine"], "log in with `hf auth login`"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(typed, model, monkeypatch, options, line):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    answer = typed("export", model, "--out", model.with_name("final"), *options)
    assert answer.code == 2
    assert line in answer.err
    assert not model.with_name("final").exists()


@pytest.mark.parametrize(
    ("name", "licence", "line"),
    [
        ("me/mine", None, "no public model of unknown licence"),
        ("me/mine", "llama3.2", "the name begin with Llama"),
        ("me/Llama-3.2-mine", "llama3.2", None),
        ("me/mine", "apache-2.0", None),
    ],
)
def test_what_may_be_public(model, hub, name, licence, line):
    how = {"public": True, "upload": True, "say": lambda text: None}
    if line is None:
        assert push(name, [model], licence, **how)["public"]
        assert hub[0] == ("create", name, False)
        return
    with pytest.raises(Exception, match=line):
        push(name, [model], licence, **how)
    assert hub == []


def test_what_the_hub_refuses_is_one_line(typed, model, hub, monkeypatch, tmp_path):
    class Api:
        def create_repo(self, *_, **__):
            raise OSError("403 Forbidden: you may not write to this name")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    answer = typed("export", model, "--out", tmp_path / "final", "--push", "me/mine", "-q")
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert "cannot upload to me/mine; it is written, and `hf upload` goes on" in answer.err
    assert "403 Forbidden" in answer.err
    assert (tmp_path / "final/config.json").exists()
