"""The commands of docs/your-question.md, in their order, at a small size with made models."""

import re
import shlex
from pathlib import Path

import pytest

import processes
from capgap.corpus.tokenizer import train_tokenizer
from capgap.models.build import build_model, save_model
from capgap.models.shape import ladder_shape
from conftest import made_up_text

PAGE = Path(__file__).parents[1] / "docs" / "your-question.md"
# What stands for what is large on the page: options' values by the command
SMALL = {
    "--student": "30k",
    "--tokens": "20k",
    "--teachers": "a,b",
    "--measure": "texts.txt",
    "--text": "texts.txt",
}
GRID = {
    "--teachers": "20k,30k,45k",
    "--students": "16k,12k",
    "--tokens": "1x",
    "--text": "texts.txt",
}


def commands() -> list[list[str]]:
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def with_values(words: list[str], values: dict[str, str]) -> list[str]:
    found = list(words)
    for place, word in enumerate(words[:-1]):
        if word in values:
            found[place + 1] = values[word]
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A text and two small models of the page's family."""
    monkeypatch.chdir(tmp_path)
    text = made_up_text(120)
    Path("texts.txt").write_text(text)
    tokenizer = train_tokenizer([text.encode()], 400)
    for name, size in (("a", 60_000), ("b", 90_000)):
        shape = ladder_shape("gpt_neox", size, vocabulary=400, positions=128)
        save_model(build_model(shape, seed=0), Path(name), tokenizer)
    return tmp_path


def test_every_command_runs(here):
    said = []
    for words in commands():
        name = words[1]
        if name == "init":
            words = with_values(words, GRID)
        elif "--measure" in words:
            words = with_values(words, SMALL)
        elif "--write" in words:
            small = {"--student": "30k", "--tokens": "20k", "--family": "gpt2", "--law": "none"}
            words = [one for one in with_values(words, small) if one not in ("--law", "none")]
            place = words.index("--family")
            words[place : place + 2] = ["--teachers", "b"]
        elif name == "evaluate":
            words = [*words[:3], "--tasks", "heldout", "--corpus", "runs/mine/corpus/text"]
            words += ["--window", "32"]
        done = processes.run(*words[1:], timeout=240)
        if "--law" in words and done.returncode:
            # so small a grid has no line, and the advice says so
            assert "this law says nothing of a student of 300M" in done.stderr
            continue
        assert done.returncode == 0, (words, done.stderr)
        said.append(done.stdout)
        if name == "init":
            shrink("grid.toml", window=32, batch=256)
        if "--write" in words:
            shrink("mine.toml", window=32, batch=256)
    assert (here / "runs/grid/law.json").exists()
    assert (here / "runs/mine/model/config.json").exists()
    assert "not uploaded: me/mine" in said[-1]
    assert sum("\nnext: capgap " in text for text in said) >= 10


def shrink(recipe: str, *, window: int, batch: int) -> None:
    """Windows and batches of seconds."""
    path = Path(recipe)
    text = path.read_text()
    for key, value in (("window", window), ("batch_tokens", batch), ("micro_batch_tokens", batch)):
        text = re.sub(rf"^{key} = \d+$", f"{key} = {value}", text, flags=re.MULTILINE)
    text = re.sub(r"^tokens = \d+$", "tokens = 8000", text, flags=re.MULTILINE)
    text = text.replace("[corpus]\n", "[corpus]\nvocabulary = 300\nheldout_tokens = 2000\n")
    text = text.replace("[distill]\n", "[score]\ntokens = 512\nwindow = 32\n\n[distill]\n")
    text = text.replace('source = "texts/"', 'source = "texts.txt"')
    path.write_text(text.replace("seeds = [0, 1]", "seeds = [0]\nscoring_tokens = 512"))
