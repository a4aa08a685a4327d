"""What comes from elsewhere can run nothing, leave no folder, and what we write tells no secret."""

import io
import json
import pickle
import shutil
import tarfile

import pytest
import torch

from capgap.artifact import write_json
from capgap.corpus.readers import safe_members
from capgap.corpus.tokenizer import load_tokenizer
from capgap.errors import UserError
from capgap.models.build import build_model, load_model, save_model
from capgap.models.identity import model_hash
from capgap.models.shape import ladder_shape
from capgap.scrub import is_secret_name, scrub, scrub_text

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def model(small_corpus, tmp_path):
    shape = ladder_shape("llama", 8_000, vocabulary=300, positions=16)
    save_model(build_model(shape, seed=1), tmp_path / "model", small_corpus.tokenizer)
    return tmp_path / "model"


class Trap:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "last.ckpt"])
def test_a_pickle_is_refused_with_the_reason_and_not_read(typed, model, tmp_path, name):
    trace = tmp_path / "trace"
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Trap(trace)))
    for command in (
        ("export", model, "--out", tmp_path / "out"),
        ("sample", model, "Kaba"),
    ):
        done = typed(*command)
        assert done.code == 2
        assert f"{name} is a pickle, which can run any code when it is read" in done.err
        assert done.err.count("\n") == 1
    assert not trace.exists()


def with_code(model, **changes):
    """A model folder that brings code of its own, which leaves a trace when it is run."""
    trace = model.parent / "trace"
    (model / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    (model / "capgap.json").unlink(missing_ok=True)
    for name, fields in changes.items():
        path = model / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return trace


def test_code_of_a_checkpoint_is_not_run(typed, model, tmp_path):
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    trace = with_code(model, config={"auto_map": own, "model_type": "new_kind"})
    for command in (("export", model, "--out", tmp_path / "out"), ("sample", model, "Kaba")):
        done = typed(*command)
        assert done.code == 2
        assert "brings its own code (auto_map in config.json)" in done.err
        assert "'new_kind'" in done.err
        assert done.err.count("\n") == 1
    assert not trace.exists()


def test_a_known_architecture_is_read_without_its_code(typed, model, tmp_path):
    """And handed on without it."""
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    trace = with_code(model, config={"auto_map": own})
    done = typed("export", model, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert not trace.exists()
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not (tmp_path / "out/own.py").exists()
    assert load_model(tmp_path / "out").dtype == torch.float32


def test_code_of_a_tokenizer_is_not_run_and_nobody_is_asked(model):
    own = {"AutoTokenizer": ["own.Tokenizer", None]}
    trace = with_code(model, tokenizer_config={"auto_map": own, "tokenizer_class": "OwnTokenizer"})
    with pytest.raises(UserError, match="needs its own code") as told:
        load_tokenizer(model)
    assert "--trust-remote-code" in str(told.value)
    assert not trace.exists()


OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM


class Config(LlamaConfig):
    model_type = "new_kind"


class Model(LlamaForCausalLM):
    config_class = Config

    def forward(self, *arguments, **options):
        found = super().forward(*arguments, **options)
        found.logits = SCALE * found.logits
        return found
"""


@pytest.mark.parametrize(("scale", "has_loss"), [(1.0, True), (2.0, False)])
def test_code_of_a_checkpoint_is_run_when_asked(
    typed, model, small_corpus, tmp_path, monkeypatch, scale, has_loss
):
    """By the commands that only read a model; held-out loss needs its logits by way of its head."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    with_code(model, config={"max_position_embeddings": 64})
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    trace = with_code(model, config={"auto_map": own, "model_type": "new_kind"})
    with (model / "own.py").open("a") as file:
        file.write(OWN_MODEL.replace("SCALE", str(scale)))
    words = ("--tasks", "heldout", "--corpus", small_corpus.directory, "--out", tmp_path / "out")
    refused = typed("evaluate", model, *words)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "with --trust-remote-code" in refused.err
    assert not trace.exists()
    found = typed("evaluate", model, *words, "--trust-remote-code", "--json")
    assert trace.exists()
    (loss,) = json.loads(found.out)["heldout"].values()
    if has_loss:
        assert found.code == 0, found.err
        known = json.loads(typed("evaluate", plain, *words, "--json").out)["heldout"]
        assert loss == next(iter(known.values()))
    else:
        assert found.code == 1
        assert "it changes its logits in a way that its config does not name" in loss["missing"]
    # other code is another model, and what was measured of it is not kept
    before = model_hash(model)
    with (model / "own.py").open("a") as file:
        file.write("# changed\n")
    assert model_hash(model) != before
    said = typed("chat", model, "--once", "Kaba", "--template", "minichat", "--tokens", 2)
    assert said.code == 2
    talk = ("--once", "Kaba", "--template", "minichat", "--tokens", 2, "--temperature", 0)
    said = typed("chat", model, *talk, "--trust-remote-code")
    assert said.code == 0, said.err
    assert said.out == typed("chat", plain, *talk).out


def tar_with(path, *members):
    with tarfile.open(path, "w:gz") as archive:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = target
            member.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"text"))
    return path


def contents(path, **limits):
    with tarfile.open(path) as archive:
        return {name: stream.read() for name, stream in safe_members(archive, **limits)}


def test_plain_files_of_an_archive_are_read(tmp_path):
    members = ("set", tarfile.DIRTYPE, ""), ("./set/a.txt", tarfile.REGTYPE, "")
    assert contents(tar_with(tmp_path / "a.tar.gz", *members)) == {"set/a.txt": b"text"}


@pytest.mark.parametrize(
    "name", ["../out", "set/../../out", "/etc/out", "set\\..\\out", "C:/out", "set/.."]
)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    good = ("good.txt", tarfile.REGTYPE, "")
    path = tar_with(tmp_path / "a.tar", good, (name, tarfile.REGTYPE, ""))
    seen = []
    with pytest.raises(UserError, match="is outside of the archive"), tarfile.open(path) as archive:
        seen += [name for name, _ in safe_members(archive)]
    assert seen == []  # all names are looked at before the first is given


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.FIFOTYPE, "a device or a pipe"),
        (tarfile.CHRTYPE, "a device or a pipe"),
    ],
)
def test_links_and_devices_are_refused(tmp_path, kind, fault):
    with pytest.raises(UserError, match=f"'a' is {fault}"):
        contents(tar_with(tmp_path / "a.tar", ("a", kind, "/etc/passwd")))


def test_too_much_and_twice_are_refused(tmp_path):
    file = (tarfile.REGTYPE, "")
    with pytest.raises(UserError, match="is there twice"):
        contents(tar_with(tmp_path / "twice.tar", ("a", *file), ("./a", *file)))
    many = tar_with(tmp_path / "many.tar", *((str(number), *file) for number in range(9)))
    for limit in ({"most_members": 8}, {"most_bytes": 35}):
        with pytest.raises(UserError, match="unpacks to more than"):
            contents(many, **limit)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:pass@host/a", "https://***@host/a"),
        ("https://token@host/a", "https://***@host/a"),
        ("https://bob:p@ssw0rd@host", "https://***@host"),
        ("https://bob:p@ss@host/a/b@main", "https://***@host/a/b@main"),
        ("https://host/a?x=1&token=abc&y=2", "https://host/a?x=1&token=***&y=2"),
        ("https://s3/a?X-Amz-Signature=ab12&b", "https://s3/a?X-Amz-Signature=***&b"),
        (f"teacher {TOKEN}", "teacher ***"),
        ("Bearer abcdefghijklmnop.qrs", "Bearer ***"),
        ("sk-abcdefghijklmnopqrstuvwx", "***"),
        ("EleutherAI/pythia-410m", "EleutherAI/pythia-410m"),
        ("me@example.org, tokens = 3, key=5", "me@example.org, tokens = 3, key=5"),
        ("hf_model, task-based, ask-me", "hf_model, task-based, ask-me"),
        ("https://host/a/b@main", "https://host/a/b@main"),
    ],
)
def test_secrets_are_taken_out_and_nothing_else(text, clean):
    assert scrub_text(text, {}) == clean


def test_values_of_secret_variables_are_taken_out():
    environment = {
        "WANDB_API_KEY": "0123456789abcdef",
        "HOME": "/some/long/folder",
        "A_TOKEN": "no",
    }
    assert scrub_text("key 0123456789abcdef in /some/long/folder no", environment) == (
        "key *** in /some/long/folder no"
    )
    assert is_secret_name("HF_TOKEN")
    assert is_secret_name("api_key")
    assert not is_secret_name("tokens")
    assert not is_secret_name("TOKENIZERS_PARALLELISM")


def test_records_keep_their_form(tmp_path):
    record = {"tokens": 3, "token": TOKEN, "list": [TOKEN, 1.5, None], "pair": ("a", TOKEN)}
    assert scrub(record, {}) == {
        "tokens": 3,
        "token": "***",
        "list": ["***", 1.5, None],
        "pair": ("a", "***"),
    }
    write_json(tmp_path / "record.json", record)
    assert TOKEN not in (tmp_path / "record.json").read_text()


def test_a_run_with_a_secret_in_a_name_can_be_continued(typed, small_corpus, tmp_path, monkeypatch):
    """What is compared is what was written."""
    monkeypatch.setenv("MY_API_KEY", "a-very-secret-word")
    place = tmp_path / "a-very-secret-word"
    for name, size in (("teacher", 12_000), ("small", 8_000)):
        shape = ladder_shape("llama", size, vocabulary=300, positions=16)
        save_model(build_model(shape, seed=1), place / name, small_corpus.tokenizer)
    scores, out = tmp_path / "scores.safetensors", tmp_path / "run"
    corpus = ("--corpus", small_corpus.directory, "--window", 16)
    cached = ("--window", 16, "--out", tmp_path / "c")
    distil = ("distill", place / "teacher", place / "small", *corpus, "--cache", tmp_path / "c")
    commands = [
        ("score", place / "teacher", *corpus, "--tokens", 512, "--out", scores),
        ("cache", place / "teacher", small_corpus.directory, *cached),
        (*distil, "--tokens", "512", "--out", out, "-s", "training.batch_tokens=256"),
    ]
    for command in commands * 2:
        done = typed(*command)
        assert done.code == 0, done.err
    for path in (scores, tmp_path / "c/manifest.json", out / "distill.json", out / "metrics.jsonl"):
        assert b"a-very-secret-word" not in path.read_bytes(), path
