"""What a user can get wrong: one clear line, exit code 2, before any work, and nothing lost.

Commands are typed in this process. `idle` workers fail a test in which training would begin;
`own` workers train here and now, which is quick.
"""

import errno
import gzip
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from capgap.artifact import read_json, write_json
from capgap.config import load_recipe, parse_recipe
from capgap.corpus import tokens as tokens_module
from capgap.corpus.tokenizer import train_tokenizer
from capgap.errors import WorkerDied
from capgap.models.build import build_model, save_model
from capgap.models.shape import ladder_shape
from capgap.records import read_records
from capgap.sweep import checks, progress, results, runner, tasks, workers
from capgap.sweep.cells import Context
from capgap.sweep.checks import claimed
from capgap.sweep.plan import make_plan
from capgap.sweep.schedule import Engine
from capgap.sweep.sharing import Sharing
from conftest import Answer, made_up_text


class WorkBegan(Exception):
    """Training would have begun: every check was passed."""


class IdleWorkers(Engine):
    def __init__(self, context: Context, *_: Any) -> None:
        self.context = context

    def has_place(self) -> bool:
        return True

    def submit(self, task: Any, micro_batch_tokens: int | None) -> str:
        raise WorkBegan

    def messages(self) -> tuple[Any, ...]:
        return ()


class OwnWorkers(IdleWorkers):
    """Runs every task in this process; what it ran is in `ran`."""

    ran: list[str]

    ended: tuple[Any, ...] = ()

    def has_place(self) -> bool:
        return not self.ended

    def submit(self, task: Any, micro_batch_tokens: int | None) -> str:
        own = self.context.with_micro_batch(micro_batch_tokens)
        ended = workers.run_task("here", own, task, lambda step: None, lambda: False)
        assert ended.outcome == "done", ended.message
        assert ended.peak_memory > 0
        OwnWorkers.ran.append(task.id)
        self.ended = (ended,)
        return ended.place

    def messages(self) -> tuple[Any, ...]:
        ended, self.ended = self.ended, ()
        return ended


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Workers", IdleWorkers)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the tasks that were run."""
    use_own_workers(monkeypatch)
    return OwnWorkers.ran


def use_own_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def page(out: Path) -> Path:
        (out / "report.html").write_text("a report")
        return out / "report.html"

    OwnWorkers.ran = []
    monkeypatch.setattr(runner, "Workers", OwnWorkers)
    # drawing takes longer than all the rest
    monkeypatch.setattr(runner, "write_report", page)
    monkeypatch.setattr(results, "write_report", page)


def as_toml(recipe: dict[str, Any]) -> str:
    """JSON's strings, numbers and lists are TOML's as well."""
    plain = {key: value for key, value in recipe.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for name, table in recipe.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(table[key])}" for key in table)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(as_toml(tiny_recipe))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(answer: Answer, *words: object) -> None:
    """One line, code 2, with these words; what was said before it is progress."""
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.endswith("\n")
    *_, last = answer.err.splitlines()
    assert last.startswith("capgap: ")
    assert answer.err.count("capgap: ") == 1
    for word in words:
        assert str(word) in last, last


def assert_refused_at_once(answer: Answer, *words: object) -> None:
    assert_refused(answer, *words)
    assert answer.err.count("\n") == 1


def with_set(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


# --- known without any work: no folder is made ---------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["students.sise=3"], ["'students.sise'", "'sizes'"]),
        (["sede=3"], ["'sede'", "'seeds'"]),
        (["nonsense"], ["'nonsense'", "section.key=value"]),
        (["a.b.c.d=1"], ["'a'"]),
        (["students.sizes=8k"], ["students.sizes", "'8k'", "list"]),
        (["teachers.tokens=8q"], ["teachers.tokens", "'8q'", "300k"]),
        (['students.sizes=["50k"]'], ["student size 50k", "llama-t14k", "larger teachers"]),
        (["teachers.sizes=[10]"], ["10", "too few"]),
        (['students.sizes=["1k"]'], ["1000", "smallest"]),
        (["students.tokens=[2560, 2600]"], ["2p56k", "2p6k", "keep one"]),
        (["students.tokens=[100]"], ["100", "batch"]),
        (["seeds=[1, 1]"], ["seeds [1, 1]", "twice"]),
        (["corpus.vocabulary=100"], ["corpus.vocabulary", "100", "257"]),
        (["corpus.window=100"], ["256", "window 100"]),
        (["run.device=tpu"], ["'tpu'", "auto"]),
        (["corpus.source=nothing.txt"], ["no such file", "nothing.txt"]),
        (["corpus.source=two words"], ["'two words'", "dataset"]),
        (["corpus.source="], ["corpus has no name"]),
        (["corpus.heldout_source=nothing.txt"], ["no such file", "nothing.txt"]),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_mistakes_in_a_recipe(typed, recipe, out, overrides, words, dry_run, idle):
    more = ["--dry-run"] if dry_run else []
    answer = typed("sweep", recipe, "--out", out, *with_set(*overrides), *more)
    assert_refused_at_once(answer, *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quikstart", ["'quikstart'", "quickstart"]),
        ("recipes/none.toml", ["recipes/none.toml", "quickstart"]),
        (".", ["'.'", "directory"]),
    ],
)
def test_recipes_that_are_none(typed, out, name, words):
    assert_refused_at_once(typed("sweep", name, "--out", out), *words)


def test_places_that_cannot_be_an_output_folder(typed, recipe, tmp_path, idle):
    file = tmp_path / "file"
    file.write_text("precious")
    assert_refused_at_once(typed("sweep", recipe, "--out", file), file, "another folder")
    assert_refused_at_once(typed("sweep", recipe, "--out", file / "in" / "it"), file, "Not a dir")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    assert_refused_at_once(typed("sweep", recipe, "--out", mine), mine, "another folder")
    # nobody may make a folder there, not even root
    assert_refused_at_once(typed("sweep", recipe, "--out", "/proc/self/x"), "cannot write")
    assert contents(mine) == {str(mine / "thesis.tex"): b"precious"}
    assert file.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission(typed, recipe, out, idle):
    out.mkdir(mode=0o500)
    assert_refused_at_once(typed("sweep", recipe, "--out", out), "Permission denied")


def test_an_output_folder_within_the_text(typed, recipe, tmp_path, idle):
    """Its own model cards would be read as text by the next call."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(made_up_text(300))
    source = f"corpus.source={texts}"
    answer = typed("sweep", recipe, "--out", texts / "runs", *with_set(source))
    assert_refused_at_once(answer, texts, "choose another folder")
    assert contents(texts).keys() == {str(texts / "a.txt")}


def test_a_folder_in_use(typed, recipe, out, tiny_recipe, idle):
    with claimed(out, parse_recipe(tiny_recipe)):
        before = contents(out)
        assert_refused_at_once(typed("sweep", recipe, "--out", out), "another process", out)
    assert contents(out) == before


def test_no_disk_space_is_known_before(typed, recipe, out, monkeypatch, idle):
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    answer = typed("sweep", recipe, "--out", out)
    assert_refused_at_once(answer, "no disk space", "0.001 GB free", "free some")


# --- teachers that exist ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(small_corpus, tmp_path_factory) -> Path:
    """Folder with the models a, b, twin (as large as b), other (its tokenizer differs), wide (its
    tokenizer has tokens that the model lacks) and padded (its table has more rows)."""
    folder = tmp_path_factory.mktemp("models")
    text = made_up_text(300, seed=5).upper().encode()
    other, wide = train_tokenizer([text], 300), train_tokenizer([made_up_text(300).encode()], 310)
    for name, size, tokenizer, rows in (
        ("a", 14_000, small_corpus.tokenizer, 300),
        ("b", 20_000, small_corpus.tokenizer, 300),
        ("twin", 20_000, small_corpus.tokenizer, 300),
        ("other", 28_000, other, 300),
        ("wide", 28_000, wide, 300),
        ("padded", 28_000, small_corpus.tokenizer, 320),
    ):
        shape = ladder_shape("llama", size, vocabulary=rows, positions=16)
        save_model(build_model(shape, seed=0), folder / name, tokenizer)
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("names", "more", "words"),
    [
        (["a", "other"], [], ["other", "tokenizer", "share their tokens"]),
        (["a", "b"], ["corpus.tokenizer=other"], ["tokenizer", "is not that of other"]),
        (["a", "wide"], [], ["tokenizer", "wide", "token 309", "300"]),
        (["a", "b", "twin"], [], ["same size of teacher", "twin"]),
        (["a", "b"], ["corpus.window=32"], ["16 tokens", "corpus.window is 32"]),
        (["a", "empty"], [], ["teachers.models", "empty"]),
        (["a", "./nothing"], [], ["teachers.models", "no such", "nothing"]),
        (["a", "tiny.toml"], [], ["teachers.models", "tiny.toml"]),
    ],
)
def test_teachers_that_do_not_do(
    typed, recipe, out, models, monkeypatch, tiny_recipe, names, more, words, idle
):
    del tiny_recipe["teachers"]
    tiny_recipe["teachers"] = {"models": names}
    recipe.write_text(as_toml(tiny_recipe))
    (models / "tiny.toml").write_text("no model")
    monkeypatch.chdir(models)
    assert_refused_at_once(typed("sweep", recipe, "--out", out, *with_set(*more)), *words)
    assert not out.exists()


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_cuts_that_transformers_does_not_take_are_told_at_once(
    typed, recipe, out, models, monkeypatch, tiny_recipe, idle, more
):
    tiny_recipe["teachers"] = {"models": ["a", "b"]}
    recipe.write_text(as_toml(tiny_recipe))
    monkeypatch.chdir(models)

    def refuse(config):
        raise ValueError(f"no {config.model_type} of {config.hidden_size}")

    monkeypatch.setattr("capgap.prune.surgery.empty_model", refuse)
    assert_refused_at_once(
        typed("sweep", recipe, "--out", out, *more), "transformers takes no llama", "no llama of "
    )
    assert not out.exists()


def test_teachers_that_do_are_taken_as_they_are(
    typed, recipe, out, models, monkeypatch, tiny_recipe, own
):
    tiny_recipe |= {
        "teachers": {"models": ["a", "b"]},
        "students": {"sizes": ["8k"], "tokens": [256]},
    }
    recipe.write_text(as_toml(tiny_recipe))
    monkeypatch.chdir(models)
    assert typed("sweep", recipe, "--out", out, "--quiet").code == 0
    assert own[:2] == ["a", "b"]
    own.clear()
    assert typed("sweep", recipe, "--out", out, "--quiet").code == 0
    assert own == []


def test_teachers_of_one_tokenizer_may_have_padded_tables(
    typed, recipe, out, models, monkeypatch, tiny_recipe
):
    del tiny_recipe["teachers"]
    tiny_recipe |= {
        "teachers": {"models": ["a", "padded"]},
        "students": {"sizes": ["8k"], "tokens": [256], "inits": ["pruned", "scratch"]},
    }
    recipe.write_text(as_toml(tiny_recipe))
    monkeypatch.chdir(models)
    assert typed("sweep", recipe, "--out", out, "--quiet").code == 0
    records = {record.id: record for record in read_records(out)}
    assert records["padded"].shape["vocabulary"] == 320
    students = [record for record in records.values() if record.kind != "teacher"]
    assert {record.shape["vocabulary"] for record in students} == {300}
    assert {record.status for record in students} == {"done"}


# --- known once the text is read ----------------------------------------------------------------


def write_nothing(path: Path) -> None:
    path.write_bytes(b" \n\n")


def write_broken(path: Path) -> None:
    path.write_bytes(gzip.compress(b"some text\n" * 1000)[:-20])


def write_rows(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", "b"]}), path)


def write_one_document(path: Path) -> None:
    path.write_text("only this document\n" * 100)


def write_little(path: Path) -> None:
    path.write_text("a\n<|endoftext|>\nb")


BAD_TEXTS = [
    ("a.txt", write_nothing, ["a.txt", "is empty"]),
    ("a.txt.gz", write_broken, ["cannot read", "a.txt.gz", "is it whole"]),
    ("a.parquet", write_rows, ["a.parquet", "no column 'text'", "'body'"]),
    ("a.txt", write_one_document, ["a.txt", "one document", "separator"]),
    ("a.txt", write_little, ["too small", "window of 16", "more text"]),
]


@pytest.mark.parametrize(("name", "write", "words"), BAD_TEXTS)
def test_texts_that_do_not_do(typed, recipe, out, text_file, tmp_path, name, write, words, idle):
    write(tmp_path / name)
    source = with_set(f"corpus.source={tmp_path / name}")
    assert_refused(typed("sweep", recipe, "--out", out, *source), *words)
    assert not list(out.glob("corpus/*"))
    # the mistake is mended: the folder of the failed try is no hindrance
    with pytest.raises(WorkBegan):
        typed("sweep", recipe, "--out", out, "--quiet")


@pytest.mark.parametrize(("name", "write", "words"), BAD_TEXTS[:3])
def test_texts_that_do_not_do_for_a_corpus(typed, tmp_path, name, write, words):
    write(tmp_path / name)
    assert_refused_at_once(typed("corpus", tmp_path / name, "--out", tmp_path / "c"), *words)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_corpus_options_that_do_not_do(typed, text_file, tmp_path):
    for value, words in (("100", ["257"]), ("many", ["'many'", "300k"])):
        answer = typed("corpus", text_file, "--out", tmp_path / "c", "--vocabulary", value)
        assert_refused_at_once(answer, value, *words)
    assert list(tmp_path.iterdir()) == []


def test_too_many_epochs_say_how_many(typed, recipe, out, idle):
    answer = typed("sweep", recipe, "--out", out, "-q", "--set", "teachers.tokens=1M")
    # the corpus has about 47 thousand tokens
    assert_refused_at_once(answer, "999936 training tokens", "21.4 epochs", "more than 4")
    overrides = with_set("teachers.tokens=1M", "corpus.max_epochs=22")
    with pytest.raises(WorkBegan):
        typed("sweep", recipe, "--out", out, *overrides)


def test_a_vocabulary_the_text_cannot_fill(typed, recipe, out, idle):
    answer = typed("sweep", recipe, "--out", out, "-q", "--set", "corpus.vocabulary=5000")
    assert_refused_at_once(answer, "corpus.vocabulary = 5000", "set corpus.vocabulary=")


def test_bytes_that_are_no_utf8_are_kept_and_counted(typed, recipe, out, tmp_path, idle):
    text = tmp_path / "latin1.txt"
    text.write_bytes(made_up_text(300).replace("ka", "k\xe9").encode("latin-1"))
    with pytest.raises(WorkBegan):
        typed("sweep", recipe, "--out", out, "--set", f"corpus.source={text}")
    manifest = json.loads((out / "corpus" / "manifest.json").read_text())
    counted = sum(manifest[part]["invalid_bytes"] for part in ("train", "heldout", "unused"))
    assert counted == text.read_bytes().count(b"\xe9") > 1000
    assert manifest["invalid_bytes_kept"]


def test_a_disk_that_fills_up_while_the_text_is_read(typed, recipe, out, monkeypatch, idle):
    def full(path: Path, mode: str) -> Any:
        return open("/dev/full" if path.name.startswith("train") else path, mode)

    with monkeypatch.context() as patched:
        patched.setattr(tokens_module, "open", full, raising=False)
        assert_refused(typed("sweep", recipe, "--out", out), "no disk space left", "free some")
    assert not (out / "corpus").exists()
    with pytest.raises(WorkBegan):
        typed("sweep", recipe, "--out", out)


def test_stopped_while_the_text_is_read(typed, recipe, out, monkeypatch, idle):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "corpus_progress", lambda say: stop)
        answer = typed("sweep", recipe, "--out", out, "--quiet")
    assert answer.code == 130
    assert answer.err.count("\n") == 1
    assert "the same command continues" in answer.err
    assert not (out / "corpus").exists()
    with pytest.raises(WorkBegan):
        typed("sweep", recipe, "--out", out)


# --- a folder with results ----------------------------------------------------------------------

CELL = "llama-s8k-t20k-pruned-512-seed0"


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory) -> tuple[Path, Path]:
    """(recipe, output folder) of a finished sweep: two teachers, one student, baselines."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(text_file, folder / "text.txt")
    recipe = {
        "name": "small",
        "scoring_tokens": 256,
        "corpus": {
            "source": str(folder / "text.txt"),
            "vocabulary": 300,
            "window": 16,
            "heldout_fraction": 0.1,
            "heldout_tokens": 500,
        },
        "teachers": {"sizes": ["14k", "20k"], "tokens": 768},
        "students": {"sizes": ["8k"], "tokens": [512]},
        "training": {"batch_tokens": 256},
        "run": {"workers": 1, "device": "cpu"},
    }
    (folder / "small.toml").write_text(as_toml(recipe))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_own_workers(monkeypatch)
        runner.run_sweep(parse_recipe(recipe), folder / "out", progress.Display(str))
    return folder / "small.toml", folder / "out"


@pytest.fixture
def copied(finished, tmp_path) -> tuple[Path, Path]:
    """(recipe, a copy of the output folder to do harm to)"""
    recipe, done = finished
    shutil.copytree(done, tmp_path / "out")
    return recipe, tmp_path / "out"


def heldout_losses(out: Path) -> dict[str, list[float]]:
    return {
        record.id: record.heldout.document_losses
        for record in read_records(out)
        if record.heldout is not None
    }


def test_a_moved_folder_is_as_good(typed, copied, own):
    recipe, out = copied
    assert typed("sweep", recipe, "--out", out, "--quiet").code == 0
    assert own == []


def test_a_deleted_record_is_made_again_alone(typed, copied, finished, own):
    recipe, out = copied
    shutil.rmtree(out / "records" / CELL)
    assert typed("sweep", recipe, "--out", out, "--quiet").code == 0
    assert own == ["column-llama-t20k-seed0"]
    assert heldout_losses(out) == heldout_losses(finished[1])


def test_deleted_teachers_are_trained_again_only_where_needed(typed, copied, finished, own):
    recipe, out = copied
    shutil.rmtree(out / "teachers")
    assert typed("sweep", recipe, "--out", out, "--quiet").code == 0
    assert own == []
    shutil.rmtree(out / "records" / CELL)
    assert typed("sweep", recipe, "--out", out, "--quiet").code == 0
    assert own == ["llama-t20k-seed0", "column-llama-t20k-seed0"]
    assert heldout_losses(out) == heldout_losses(finished[1])


def test_a_deleted_student_says_how_to_get_it_back(typed, copied, own):
    recipe, out = copied
    shutil.rmtree(out / "student")
    answer = typed("sweep", recipe, "--out", out, "--quiet")
    assert_refused_at_once(answer, out / "student", "delete", out / "records")
    best = json.loads((out / "sweep.json").read_text())["best"]["cell"]
    shutil.rmtree(out / "records" / best)
    assert typed("sweep", recipe, "--out", out, "--quiet").code == 0
    assert (out / "student" / "model.safetensors").exists()


def test_another_text_does_not_take_the_place_of_the_old(typed, copied, monkeypatch, own):
    recipe, out = copied
    before = contents(out)
    source = recipe.parent / "text.txt"
    text, times = source.read_bytes(), source.stat()
    source.write_text(made_up_text(300, seed=9))
    try:
        answer = typed("sweep", recipe, "--out", out, "--quiet")
        assert_refused_at_once(answer, "the source changed", source, "bring the text back")
        assert contents(out) == before
    finally:
        source.write_bytes(text)
    # only its time differs now: read again, found to be the same, and gone on
    assert typed("sweep", recipe, "--out", out, "--quiet").code == 0
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert own == []


def break_record(out: Path) -> None:
    (out / "records" / CELL / "record.json").write_text('{"schema": 1')


def break_marker(out: Path) -> None:
    (out / "sweep.json").write_text('{"name": "mine"}')


def change_rate(out: Path) -> None:
    """As if another version of capgap, with another rule for the rate, had made the record."""
    path = out / "records" / CELL / "record.json"
    record = read_json(path)
    write_json(path, record | {"learning_rate": record["learning_rate"] / 2})


def add_record(out: Path) -> None:
    shutil.copytree(out / "records" / CELL, out / "records" / "mine")
    path = out / "records" / "mine" / "record.json"
    write_json(path, read_json(path) | {"id": "mine"})


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (break_record, [CELL, "is damaged", "delete it"]),
        (break_marker, ["sweep.json", "is damaged", "bring it back"]),
        (change_rate, [CELL, "learning rate", "another folder"]),
        (add_record, ["mine", "another recipe", "another folder"]),
    ],
)
def test_folders_that_were_meddled_with(typed, copied, own, harm, words):
    recipe, out = copied
    harm(out)
    before = contents(out)
    assert_refused_at_once(typed("sweep", recipe, "--out", out), *words)
    assert contents(out) == before


def test_another_recipe_leaves_the_folder_as_it_is(typed, copied, own):
    recipe, out = copied
    before = contents(out)
    answer = typed("sweep", recipe, "--out", out, "--set", "training.alpha=0.25")
    assert_refused_at_once(
        answer, "another recipe", "training.alpha is 0.5 there and 0.25 here", "another folder"
    )
    assert contents(out) == before


def test_a_finished_sweep_needs_no_disk_space(typed, copied, monkeypatch, own):
    recipe, out = copied
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert typed("sweep", recipe, "--out", out, "--quiet").code == 0


def test_a_disk_that_fills_up_at_the_report(typed, copied, monkeypatch, own):
    recipe, out = copied
    before = (out / "law.json").read_text()

    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(results, "write_json", full)
    assert_refused_at_once(typed("sweep", recipe, "--out", out, "-q"), "no disk space left")
    assert (out / "law.json").read_text() == before


def test_a_disk_that_fills_up_in_a_worker(copied, monkeypatch):
    recipe, out = copied
    shutil.rmtree(out / "records" / CELL)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tasks, "write_record", full)
    plan = make_plan(load_recipe(recipe))
    column = next(one for one in plan.columns if any(cell.id == CELL for cell in one.cells))
    training = plan.recipe.training.model_copy(update={"teacher_dtype": "stored"})
    context = Context(plan.recipe, out, "cpu", 1, training)
    ended = workers.run_task("here", context, column, lambda step: None, lambda: False)
    assert ended.outcome == "user_error"
    assert "no disk space left" in ended.message
    assert not (out / "records" / CELL).exists()


def test_a_teacher_that_breaks_in_its_last_step_is_recorded_as_failed(typed, finished, out, own):
    """One step: no later loss can notice, only the held-out text."""
    recipe, _ = finished
    overrides = with_set("teachers.tokens=256", "teachers.learning_rate=1e30", "seeds=[5]")
    answer = typed("sweep", recipe, "--out", out, *overrides, "-q")
    assert answer.code == 1
    records = read_records(out)
    assert {record.status for record in records} == {"failed"}
    teacher = next(record for record in records if record.kind == "teacher")
    assert "nan" in teacher.failure.message or "non-finite" in teacher.failure.message


# --- report and sample --------------------------------------------------------------------------


def test_report_on_what_is_no_sweep(typed, recipe, out, tmp_path, copied, idle):
    for place in (tmp_path / "nothing", recipe, tmp_path):
        assert_refused_at_once(typed("report", place), place, "no output folder of a sweep")
    begun = tmp_path / "begun"
    with pytest.raises(WorkBegan):
        typed("sweep", recipe, "--out", begun)
    assert_refused_at_once(typed("report", begun), begun, "no run", "finished yet")
    break_record(copied[1])
    assert_refused_at_once(typed("report", copied[1]), CELL, "is damaged")


def test_sample_from_what_is_no_model(typed, models, finished, monkeypatch):
    monkeypatch.chdir(models)
    out = finished[1]
    assert_refused_at_once(typed("sample", "empty"), "empty")
    assert_refused_at_once(typed("sample", "./nothing"), "nothing", "is no model folder")
    assert_refused_at_once(typed("sample", "a/config.json"), "a/config.json")
    assert_refused_at_once(typed("sample", out), f"its best student is in {out}/student")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "-1"], ["temperature -1.0", "0 or more"]),
        (["--temperature", "nan"], ["temperature nan", "0 or more"]),
        (["--top-p", "0"], ["top_p 0.0", "above 0 to 1"]),
        (["--seed", "-1"], ["seed -1"]),
        (["--tokens", "0"], ["0 tokens", "1 to 15"]),
        (["--tokens", "500"], ["500 tokens", "at most 16", "1 to 15"]),
    ],
)
def test_sample_options_that_do_not_do(typed, models, options, words):
    assert_refused_at_once(typed("sample", models / "a", "Kaba", *options), *words)


def test_a_hub_name_without_a_network_is_told_at_once(typed, monkeypatch, recipe, out, idle):
    import socket

    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    answer = typed("sample", "no-team/no-model")
    assert_refused_at_once(answer, "'no-team/no-model'", "network")
    asked = ("--student", "8k", "--tokens", "1M", "--teachers", "no-team/no-model")
    assert_refused_at_once(typed("recommend", *asked), "'no-team/no-model'", "network")
    text = recipe.read_text().replace('sizes = ["14k", "20k", "28k", "40k"]', 'models = ["no/one"]')
    recipe.write_text(text)
    assert_refused_at_once(typed("sweep", recipe, "--out", out), "'no/one'", "network")


# --- worker processes ---------------------------------------------------------------------------


def test_a_worker_without_a_parent_waits_no_longer():
    ours, theirs = multiprocessing.Pipe()
    ours.send("task")
    assert workers._received(theirs) == "task"
    assert not theirs.poll()
    ours.close()
    assert theirs.poll()
    assert workers._received(theirs) is None


def test_a_dead_worker_is_noticed_while_others_talk(tiny_recipe):
    class Dead:
        exitcode = -9

        def is_alive(self) -> bool:
            return False

    plan = make_plan(parse_recipe(tiny_recipe))
    context = Context(plan.recipe, Path("out"), "cpu", 1, plan.recipe.training)
    pool = workers.Workers(context, 1)
    process: Any = Dead()
    name = plan.teachers[0].id
    ours, theirs = multiprocessing.Pipe()
    pool.workers = [workers._Worker(0, Sharing(), ranks=[(process, ours)], task=name)]
    theirs.send(workers.StepMessage(name, 1, 1.0, None))
    with pytest.raises(WorkerDied, match=r"llama-t14k-seed0 ended with code -9"):
        pool.messages()
