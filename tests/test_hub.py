"""One name for a model everywhere: a family's short name, a name on the Hub, a folder."""

import pytest
from huggingface_hub import DryRunFileInfo

import capgap
from capgap.config import parse_recipe
from capgap.errors import UserError
from capgap.hub import families, hub_name
from capgap.law.published import candidates_of, find_model, published_families
from capgap.models import stored


def test_every_published_model_has_a_name_on_the_hub():
    names = [model.hub for family in published_families().values() for model in family.models]
    assert len(set(names)) == len(names)
    for name in names:
        owner, model = name.split("/")
        assert owner
        assert model
        assert "{" not in name
    assert sum(len(family["models"]) for family in families().values()) == len(names)


@pytest.mark.parametrize(
    ("given", "hub"),
    [
        ("Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B"),
        ("Pythia-410M@step143000", "EleutherAI/pythia-410m@step143000"),
        ("Llama-2-7B", "meta-llama/Llama-2-7b-hf"),
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("models/mine", "models/mine"),
    ],
)
def test_a_short_name_is_the_one_on_the_hub(given, hub):
    assert hub_name(given) == hub
    assert capgap.Score(teacher=given, method="norm", out="s").teacher == hub


def test_a_folder_comes_before_a_published_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Phi-4").mkdir()
    assert hub_name("Phi-4") == "Phi-4"
    assert hub_name("Phi-4-mini") == "microsoft/Phi-4-mini-instruct"


def test_a_name_on_the_hub_has_its_published_size_without_a_network():
    by_hub, by_name = (candidates_of(None, [name])[0] for name in ("Qwen/Qwen2.5-7B", "Qwen2.5-7B"))
    assert by_hub.non_embedding == by_name.non_embedding
    assert find_model("Qwen/Qwen2.5-7B@main") is find_model("Qwen2.5-7B")


def test_teachers_of_a_sweep_have_either_name():
    recipe = parse_recipe(
        {
            "name": "mine",
            "teachers": {"models": ["Pythia-70M", "EleutherAI/pythia-160m"]},
            "students": {"sizes": ["10M"], "tokens": ["1M"]},
        }
    )
    assert recipe.teachers.models == ("EleutherAI/pythia-70m", "EleutherAI/pythia-160m")


def of_size(size: int) -> DryRunFileInfo:
    file = {"commit_hash": "abc", "filename": "model.safetensors", "local_path": "/nowhere"}
    return DryRunFileInfo(**file, file_size=size, is_cached=False, will_download=True)


def test_a_download_is_told_before_it_begins(monkeypatch, caplog, tmp_path):
    asked = []

    def download(*, dry_run: bool = False, **rest):
        asked.append(rest | {"dry_run": dry_run})
        return [of_size(3 * 10**9), of_size(10**8)] if dry_run else str(tmp_path)

    monkeypatch.setattr(stored, "snapshot_download", download)
    assert stored.local_folder("team/large@v2") == tmp_path
    assert [(one["revision"], one["dry_run"]) for one in asked] == [("v2", True), ("v2", False)]
    assert "fetches 3.1 GB of team/large@v2 from the Hub into " in caplog.text


def test_a_download_without_room_is_refused(monkeypatch):
    monkeypatch.setattr(stored, "snapshot_download", lambda **asked: [of_size(10**18)])
    with pytest.raises(
        UserError, match=r"no space for 1e\+06 TB of team/huge from the Hub into .*HF_HOME"
    ):
        stored.local_folder("team/huge")
