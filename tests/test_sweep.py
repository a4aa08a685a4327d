"""A whole sweep of seconds: what it writes, what a restart leaves alone, what fails."""

import functools
import json
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import processes
from capgap.records import read_records
from capgap.sweep import workers

TOML = """
name = "tiny"
scoring_tokens = 512
{top}
[corpus]
source = "{source}"
vocabulary = 300
window = 16
heldout_fraction = 0.1
heldout_tokens = 1000
[teachers]
sizes = ["14k", "20k", "28k", "40k"]
tokens = 5120
[students]
sizes = ["8k", "11k"]
tokens = [2560]
{students}
[training]
batch_tokens = 256
[run]
workers = 2
device = "cpu"
checkpoint_seconds = 0.05
checkpoint_share = 0.9
"""


def write_recipe(folder: Path, source: Path, *, top: str = "", students: str = "") -> Path:
    path = folder / "tiny.toml"
    path.write_text(TOML.format(source=source, top=top, students=students))
    return path


run = functools.partial(processes.run, main=processes.capgap_without_pictures)


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    """(output folder, the JSON the command printed) of a sweep with all inits and baselines."""
    folder = tmp_path_factory.mktemp("sweep")
    students = 'inits = ["pruned", "fixed", "scratch"]'
    top = 'track = ["tensorboard"]\n' if find_spec("tensorboard") else ""
    recipe = write_recipe(folder, text_file, students=students, top=top)
    done = processes.run("sweep", recipe, "--out", folder / "out", "--json")
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads(done.stdout), done.stderr


def test_trackers_are_told_every_step_of_every_task(finished):
    """Each teacher and column is a run of its own, with all that its students report."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _, _ = finished
    folders = {one.parent.parent.name: one for one in out.glob("trackers/*/trackers/tensorboard")}
    records = read_records(out)
    assert {one.id for one in records if one.kind == "teacher"} < set(folders)
    told = {}
    for folder in folders.values():
        found = EventAccumulator(str(folder)).Reload()
        for tag in found.Tags()["scalars"]:
            told[tag] = [event.step for event in found.Scalars(tag)]
    for record in records:
        assert told[f"{record.id}/loss"] == list(range(record.steps)), record.id


def test_everything_promised_is_there(finished):
    out, printed, _ = finished
    for name in ("grid.csv", "law.json", "report.html", "sweep.json", "samples.json"):
        assert (out / name).stat().st_size > 100, name
    assert list((out / "figures").glob("*.png"))
    assert list((out / "figures").glob("*.svg"))
    records = read_records(out)
    kinds = [record.kind for record in records]
    assert kinds.count("teacher") == 4
    assert kinds.count("cell") == 4 * 2 * 3
    assert kinds.count("baseline") == 4 * 2 + 2 * 2
    assert all(record.status == "done" for record in records)
    assert sorted(path.name for path in (out / "teachers").iterdir()) == sorted(
        record.id for record in records if record.kind == "teacher"
    )
    assert printed["best"] in {record.id for record in records if record.kind == "cell"}
    assert printed["failed"] == []
    assert set(printed) == {
        "out", "report", "student", "best", "verdict", "stages", "wall_seconds",
        "peak_memory_bytes", "failed",
    }  # fmt: skip


def test_progress_goes_to_standard_error_in_plain_lines(finished):
    _, _, errors = finished
    assert "done teacher llama-t40k-seed0" in errors
    assert "\x1b[" not in errors


def test_records_hold_what_was_asked(finished):
    out, _, _ = finished
    for record in read_records(out):
        assert record.heldout.tokens == sum(record.heldout.document_tokens)
        assert record.tokens == record.steps * record.batch_tokens
        assert record.curve.tokens[-1] == record.tokens
        if record.kind == "cell":
            assert record.flops.teacher_forward > 0
            assert len(record.curve.kl) == len(record.curve.step)
        if record.init == "pruned":
            assert record.after_cut.loss > 0
        if record.init == "scratch":
            assert record.after_cut is None


def test_student_loads_in_plain_transformers_and_is_the_recorded_one(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from capgap.corpus.tokens import load_corpus
    from capgap.evaluate.losses import evaluate_heldout, heldout_set
    from capgap.models.parts import Parts

    out, printed, _ = finished
    model = AutoModelForCausalLM.from_pretrained(out / "student")
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    assert tokenizer.decode(tokenizer.encode("Kaba  lo\n")) == "Kaba  lo\n"
    corpus = load_corpus(out / "corpus", window=16)
    loss = evaluate_heldout(
        Parts(model), heldout_set(corpus.heldout_documents(), corpus.marks, 16)
    ).loss
    record = next(one for one in read_records(out) if one.id == printed["best"])
    assert loss == pytest.approx(record.heldout.loss, rel=1e-5)
    assert printed["best"] in (out / "student" / "README.md").read_text()


def test_the_same_command_again_computes_nothing(finished, text_file):
    out, printed, _ = finished
    recipe = out.parent / "tiny.toml"
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("records/*/record.json")}
    again = run("sweep", recipe, "--out", out, "--json", "--quiet")
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    assert json.loads(again.stdout)["best"] == printed["best"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_another_recipe_is_refused_in_the_same_folder(finished):
    out, _, _ = finished
    refused = run("sweep", out.parent / "tiny.toml", "--out", out, "--set", "seeds=[3]")
    assert refused.returncode == 2
    assert "another recipe (tiny): seeds is [0] there and [3] here" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_and_continued_equals_uninterrupted(finished, text_file, tmp_path, number):
    out, _, _ = finished
    recipe = out.parent / "tiny.toml"
    process = processes.Started(
        *("sweep", recipe, "--out", tmp_path / "o"), main=processes.capgap_without_pictures
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "o").glob("records/*/record.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if number == signal.SIGINT:
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 130
        assert "the same command continues" in errors
        assert "Traceback" not in errors
    else:
        processes.kill_alone(process)
    kept = {
        path.parent.name: path.stat().st_mtime_ns
        for path in (tmp_path / "o").glob("records/*/record.json")
    }
    done = run("sweep", recipe, "--out", tmp_path / "o", "--json")
    assert done.returncode == 0, done.stderr
    for name, stamp in kept.items():
        assert (tmp_path / "o" / "records" / name / "record.json").stat().st_mtime_ns == stamp
    whole = {record.id: record for record in read_records(out)}
    for record in read_records(tmp_path / "o"):
        assert record.heldout == whole[record.id].heldout
        assert record.curve == whole[record.id].curve


def test_a_teacher_that_diverges_is_recorded_and_the_sweep_goes_on(text_file, tmp_path):
    recipe = write_recipe(tmp_path, text_file, top='baselines = "best_and_largest"')
    recipe.write_text(
        recipe.read_text().replace("tokens = 5120", "tokens = 5120\nlearning_rate = 1e12")
    )
    done = run("sweep", recipe, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "no cell of the sweep was finished" in done.stderr
    assert "Traceback" not in done.stderr
    records = read_records(tmp_path / "out")
    assert {record.status for record in records} == {"failed"}
    teacher = next(record for record in records if record.kind == "teacher")
    assert "non-finite" in teacher.failure.message
    assert teacher.failure.step is not None
    assert len(teacher.failure.windows) == 16
    cell = next(record for record in records if record.kind == "cell")
    assert "its teacher" in cell.failure.message
    assert (tmp_path / "out" / "report.html").exists()


def test_given_teachers_and_report_again(finished, text_file, tmp_path):
    """A second sweep takes the first one's teachers as they are."""
    out, _, _ = finished
    models = [str(out / "teachers" / f"llama-t{size}-seed0") for size in ("20k", "28k")]
    recipe = write_recipe(tmp_path, text_file, students="learning_rate = 1e-3")
    text = recipe.read_text().replace('sizes = ["14k", "20k", "28k", "40k"]', f"models = {models}")
    recipe.write_text(text)
    done = run("sweep", recipe, "--out", tmp_path / "out", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "out")
    first = {record.id: record for record in read_records(out)}
    for record in records:
        if record.kind == "teacher":
            assert record.heldout.loss == pytest.approx(first[record.id].heldout.loss, rel=1e-6)
    assert not (tmp_path / "out" / "teachers").exists()
    again = run("report", tmp_path / "out", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["verdict"] == json.loads(done.stdout)["verdict"]


def test_a_signal_waits_until_all_workers_are_started():
    """One in the middle would leave a process that complains of what is gone."""
    reached = []
    before = signal.signal(signal.SIGTERM, lambda *_: reached.append("heeded"))
    try:
        with workers._uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            reached.append("started")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert reached == ["started", "heeded"]
