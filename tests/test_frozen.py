"""What must not change by accident while the code moves: options, keys of recipes, numbers.

`python tests/test_frozen.py` writes tests/frozen/ anew, where a change is meant.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel
from typer.main import get_command

import processes
from capgap.cli import app
from capgap.law.data import cells_of
from capgap.law.fit import fit
from capgap.law.table import read_table
from capgap.pipeline.recipe import RunRecipe
from capgap.records import read_records
from capgap.sweep.recipe import Recipe
from law_surface import ladder, sweep

FOLDER = Path(__file__).parent / "frozen"
RESULTS = Path(__file__).parents[1] / "docs/results"


def options() -> dict[str, dict[str, Any]]:
    """command -> option or argument -> default."""
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return {
        name: {
            ", ".join(option.opts): None if option.default is None else str(option.default)
            for option in command.params
        }
        for name, command in sorted(group.commands.items())
    }


def keys(section: type[BaseModel], above: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a recipe with its default."""
    for name, field in section.model_fields.items():
        parts = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        yield f"{above}{name}", "" if inner else repr(field.default)
        for part in inner:
            yield from keys(part, f"{above}{name}.")


def laws() -> dict[str, Any]:
    """law.json of two made-up sweeps and of a measured table."""
    students, noise = [40_000, 63_000, 100_000], {"seed_noise": 0.003, "document_noise": 0.002}
    made = {
        init: sweep(
            students, lambda s: ladder(1.3 * s, 1.4, 7), lambda s: 2.5 * s, init=init, **noise
        )
        for init in ("pruned", "scratch")
    }
    cells = {init: cells_of(records) for init, records in made.items()}
    cells["measured"] = read_table(RESULTS / "search/grid.csv")
    found = {name: fit(own, draws=200).as_dict() for name, own in cells.items()}
    for law in found.values():
        law["excluded"] = len(law["excluded"])
        for curve in law["curves"]:
            del curve["fit"]  # hundreds of numbers that say what the points' costs say
    return found


FROZEN = {
    "options": options,
    "sweep-keys": lambda: dict(keys(Recipe)),
    "run-keys": lambda: dict(keys(RunRecipe)),
    "laws": laws,
}


def read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def same(found: Any, kept: Any, place: str = "") -> None:
    """Numbers to a thousandth: processors add up in other orders."""
    if isinstance(kept, dict):
        assert sorted(found) == sorted(kept), place
        for key in kept:
            same(found[key], kept[key], f"{place}.{key}")
    elif isinstance(kept, list):
        assert len(found) == len(kept), place
        for number, (one, other) in enumerate(zip(found, kept, strict=True)):
            same(one, other, f"{place}[{number}]")
    elif isinstance(kept, float):
        assert found == pytest.approx(kept, rel=1e-3, abs=1e-5), place
    else:
        assert found == kept, place


@pytest.mark.parametrize("name", FROZEN)
def test_as_it_was(name):
    found = json.loads(json.dumps(FROZEN[name]()))
    same(found, read(name))


def losses(out: Path) -> dict[str, Any]:
    """Of every run of a sweep's folder what it measured."""
    return {
        record.id: {
            "heldout": record.heldout and record.heldout.loss,
            "after_cut": record.after_cut and record.after_cut.loss,
            "kl": record.curve.kl,
            "ce": record.curve.ce,
        }
        for record in read_records(out)
    }


def write_toml(folder: Path, source: Path) -> Path:
    path = folder / "frozen.toml"
    path.write_text(
        f"""
        name = "frozen"
        scoring_tokens = 512
        [corpus]
        source = "{source}"
        vocabulary = 300
        window = 16
        heldout_fraction = 0.1
        heldout_tokens = 1000
        [teachers]
        sizes = ["14k", "28k"]
        tokens = 5120
        [students]
        sizes = ["8k", "11k"]
        tokens = [2560]
        inits = ["pruned", "fixed", "scratch"]
        [training]
        batch_tokens = 256
        precision = "fp32"
        [run]
        workers = 2
        device = "cpu"
        """
    )
    return path


def test_a_sweep_as_it_was(text_file, tmp_path):
    done = processes.run(
        *("sweep", write_toml(tmp_path, text_file), "--out", tmp_path / "out", "--quiet"),
        main=processes.capgap_without_pictures,
    )
    assert done.returncode == 0, done.stderr
    same(losses(tmp_path / "out"), read("losses"))


if __name__ == "__main__":
    import subprocess
    import tempfile

    from conftest import made_up_text

    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "made_up.txt"
        text.write_text(made_up_text(300))
        command = [sys.executable, "-m", "capgap", "sweep", write_toml(Path(work), text)]
        subprocess.run([*command, "--out", f"{work}/out", "--quiet"], check=True)
        measured = losses(Path(work) / "out")
    for name, values in {**{n: make() for n, make in FROZEN.items()}, "losses": measured}.items():
        short = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.6g}"))
        text = json.dumps(short, indent=1, sort_keys=True)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
