"""Records of single distillations as cells."""

import json

import numpy as np
import pytest

from capgap.errors import UserError
from capgap.law.fit import fit
from capgap.law.table import load_cells
from law_surface import ladder

TEACHERS = ladder(60_000, 1.5, 5)
TOKENS = [100, 200, 300, 400] * 10


def heldout(loss):
    nats = [loss * number for number in TOKENS]
    return {"document_losses": nats, "document_tokens": TOKENS, "tokens": sum(TOKENS)}


def student(name, size, loss, cut_from):
    return {
        name: {
            "architecture": "llama",
            "non_embedding": size,
            "cut_from": cut_from,
            "failure": None,
            "heldout": heldout(loss),
        }
    }


def write(folder, command, after, teacher=None, *, seed=0, finished=True, **asked):
    folder.mkdir(parents=True)
    about = {"corpus_hash": "c", "window": 16, "tokens": 400_000, "seed": seed}
    training = {"batch_tokens": 256} | ({"alpha": 0.5} if teacher else {})
    record = {"finished": finished, "asked": about | {"training": training} | asked, "after": after}
    (folder / f"{command}.json").write_text(json.dumps(record | {"teacher": teacher}))


def write_grid(folder):
    """Two students of five teachers: the best teacher has 2.5 times the student."""
    for seed in (0, 1):
        for teacher in TEACHERS:
            after, alone = {}, {}
            for name, size in (("small", 40_000), ("other", 60_000)):
                # a shape that misses its size by 1%
                reached = round(size * (1 + 0.01 * (teacher % 2)))
                loss = 3 + 0.3 * np.log(teacher / (2.5 * size)) ** 2 + 0.001 * seed
                after |= student(name, reached, loss, f"hash-{teacher}")
                alone |= student(name, reached, 3.5, f"hash-{teacher}")
            about = {
                "hash": f"hash-{teacher}",
                "non_embedding": teacher,
                "heldout": heldout(4 - 0.1 * np.log(teacher)),
            }
            write(folder / f"t{teacher}-{seed}", "distill", after, about, seed=seed)
            write(folder / f"t{teacher}-{seed}-alone", "train", alone, seed=seed)
    return folder


def test_distillations_make_the_curves_of_a_sweep(tmp_path, typed):
    folder = write_grid(tmp_path / "runs")
    broken = student("broken", 40_000, 3.0, None)["broken"]
    broken |= {"heldout": None, "failure": {"message": "not finite", "step": 3}}
    about = {"hash": "x", "non_embedding": 90_000, "heldout": None}
    write(folder / "failed", "distill", {"broken": broken}, about)
    write(folder / "begun", "distill", {}, finished=False)
    cells = load_cells(folder)
    assert len(cells.frame) == 2 * 2 * len(TEACHERS)
    assert set(cells.frame["init"]) == {"pruned"}
    assert {(one.id, one.reason) for one in cells.excluded} == {
        ("runs/failed/broken", "failed: not finite"),
        ("runs/begun", "not finished"),
    }
    law = fit(cells, draws=200)
    assert [len(curve.points) for curve in law.curves] == [5, 5]
    for curve in law.curves:
        assert curve.optimum.status == "interior"
        assert curve.optimum.ratio == pytest.approx(2.5, rel=0.1)
        assert curve.points[0].gain == pytest.approx(3.5 - curve.points[0].loss)
        assert curve.points[0].teacher_loss == pytest.approx(4 - 0.1 * np.log(TEACHERS[0]))
    done = typed("fit", folder, "--out", tmp_path / "law.json", "--json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "law.json").read_text())["curves"]
    drawn = typed("report", folder, "--json")
    assert drawn.code == 0, drawn.err
    assert (folder / "report.html").exists()
    assert json.loads((folder / "law.json").read_text())["curves"]


def test_a_mixture_counts_its_sources_by_their_shares(tmp_path):
    folder = write_grid(tmp_path / "runs")
    for path in folder.glob("*/distill.json"):
        record = json.loads(path.read_text())
        record["asked"]["shares"] = {"a": 0.75, "b": 0.25}
        for one in (*record["after"].values(), record["teacher"]):
            one["heldout"]["sources"] = {
                "a": {"share": 0.75, "tokens": 100} | documents([200.0], [100]),
                "b": {"share": 0.25, "tokens": 300} | documents([1200.0], [300]),
            }
        path.write_text(json.dumps(record))
    assert load_cells(folder).losses == pytest.approx(0.75 * 2 + 0.25 * 4)


def documents(losses, tokens):
    return {"document_losses": losses, "document_tokens": tokens}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["asked"].update(corpus_hash="other"), "have another corpus_hash"),
        (lambda record: record["asked"]["training"].update(alpha=1), "have another alpha"),
        (lambda record: record["after"]["small"].pop("architecture"), "has no 'architecture'"),
        (lambda record: record.pop("teacher"), "an older version has to be made again"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, change, message):
    folder = write_grid(tmp_path / "runs")
    path = sorted(folder.glob("*/distill.json"))[3]
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        load_cells(folder)


def test_one_teacher_makes_no_curve(tmp_path):
    folder = write_grid(tmp_path / "runs")
    with pytest.raises(UserError, match="no student has more than one teacher"):
        load_cells(folder / f"t{TEACHERS[0]}-0")
