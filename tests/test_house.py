"""How large the house is, and which way its rooms import: ceilings that a change may lower, and
may raise only with a reason in docs/decisions.md."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "capgap"
COUNTED = (".py", ".j2", ".js", ".css")
CEILINGS = {
    "lines": 33_988,
    "files": 162,
    "longest file": 450,
    "closure of a sweep's worker": 11_173,
    "closure of capgap quickstart": 22_687,
}
# What a room may import besides itself; rooms below stand in BELOW
BELOW = {"artifact", "errors", "hub", "in_order", "leases", "machine", "mirror", "ray_cluster"}
BELOW |= {"records", "scrub", "section", "sizes", "stage", "storage"}
ARROWS = {
    "corpus": set(),
    "models": {"corpus"},
    "distill": {"corpus", "models"},
    "prune": {"corpus", "distill", "models"},
    "train": {"corpus", "distill", "models"},
    "evaluate": {"corpus", "distill", "law", "models"},
    "export": {"corpus", "models"},
    "tune": {"corpus", "distill", "evaluate", "models", "train"},
    "law": {"corpus", "evaluate", "models"},
    "report": {"law"},
    "stages": {"corpus", "distill", "evaluate", "export", "models", "prune", "report"}
    | {"train", "tune"},
    "config": {"pipeline", "sweep"},
    # `column` reads its own recipe; config knows the models of recipes, which lie in the rooms
    "sweep": {"config", "corpus", "distill", "evaluate", "export", "law", "models", "prune"}
    | {"report", "stages", "train"},
    "cost": {"distill", "law", "models", "pipeline", "sweep", "train"},
    "pipeline": {"corpus", "stages", "stopping", "train"},
    "stopping": set(),
    "cli": {"config", "corpus", "cost", "evaluate", "law", "models", "pipeline", "report"}
    | {"stages", "stopping", "sweep", "train", "tune"},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCE.rglob("*.py")}


def imported(node: ast.AST) -> set[str]:
    """The modules of ours that an import names."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("capgap"):
        return set()
    names = {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name in MODULES else str(node.module) for name in names}


def imports(path: Path, *, lazy: bool) -> set[str]:
    """Of a file as it is loaded; `lazy`: also those within functions. Not those for types alone."""
    tree = ast.parse(path.read_text())
    types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n)]
    left_out = {id(inner) for one in types for inner in ast.walk(one)}
    nodes = ast.walk(tree) if lazy else tree.body
    return {name for n in nodes if id(n) not in left_out for name in imported(n)}


def room(module: str) -> str:
    return [*module.split("."), "capgap"][1]


def closure(root: str, rooms: set[str]) -> int:
    """Lines of all files that a reader of `root` meets: what files import when they are loaded, and
    in these rooms also what their functions import."""
    met: set[str] = set()
    left = [root]
    while left:
        module = left.pop()
        if module not in met and module in MODULES:
            met.add(module)
            left += imports(MODULES[module], lazy=room(module) in rooms)
    return sum(len(MODULES[module].read_text().splitlines()) for module in met)


@pytest.fixture(scope="module")
def sizes():
    files = [path for path in SOURCE.rglob("*") if path.suffix in COUNTED]
    lengths = [len(path.read_text().splitlines()) for path in files]
    return {
        "lines": sum(lengths),
        "files": len(files),
        "longest file": max(lengths),
        "closure of a sweep's worker": closure("capgap.sweep.workers", {"sweep"}),
        "closure of capgap quickstart": closure("capgap.sweep.stages", {"sweep"}),
    }


@pytest.mark.parametrize("name", CEILINGS)
def test_the_house_does_not_grow(sizes, name):
    assert sizes[name] <= CEILINGS[name]


def test_ceilings_are_near(sizes):
    """A ceiling that a change has left behind comes down."""
    for name, ceiling in CEILINGS.items():
        assert sizes[name] > 0.98 * ceiling - 10, (name, sizes[name])


def test_lines_are_no_wider_than_a_hundred():
    wide = [
        (path.name, number)
        for path in SOURCE.rglob("*")
        if path.suffix in COUNTED and path.suffix != ".j2"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100 and "# noqa" not in line
    ]
    assert not wide


@pytest.mark.parametrize("name", sorted({room(module) for module in MODULES} - {"capgap"}))
def test_rooms_import_one_way(name):
    own = (path for module, path in MODULES.items() if room(module) == name)
    met = {room(one) for path in own for one in imports(path, lazy=True)} - {name, "capgap"}
    if name == "__main__":
        assert met == {"cli"}
    elif name in BELOW:
        assert met <= BELOW
    else:
        assert met - BELOW == ARROWS[name]


def test_a_new_option_touches_one_file(tmp_path):
    """A field of a section is an option of the command, a key of the recipe, and a row of both
    pages and an argument on the third."""
    shutil.copytree(SOURCE, tmp_path / "capgap", ignore=shutil.ignore_patterns("__pycache__"))
    stage = tmp_path / "capgap" / "stages" / "score.py"
    text = stage.read_text()
    field = '    window: Annotated[int, Field(ge=8), "Tokens of a window."] = 512\n'
    assert field in text
    stage.write_text(
        text.replace(field, field + '    luck: Annotated[float, "Of units."] = 0.25\n')
    )
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    code = """
import importlib.util, json, sys
from typer.testing import CliRunner
from capgap.cli import app
from capgap.config import find_recipe, load_any_recipe
from capgap.errors import UserError
spec = importlib.util.spec_from_file_location("generate", sys.argv[1])
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)
pages = {name: made((generate.DOCS / name).read_text()) for name, made in generate.PAGES.items()}
read = load_any_recipe(find_recipe("minima-tiny"), ["score.luck=0.5"]).score.luck
try:
    load_any_recipe(find_recipe("minima-tiny"), ["score.luck=much"])
except UserError as error:
    wrong = str(error)
told = CliRunner().invoke(app, ["score", "--help"], env={"COLUMNS": "200"}).output
asked = ["score", "x", "--out", "y", "--luck", "much"]
print(json.dumps([pages, read, wrong, told, str(CliRunner().invoke(app, asked).exception)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "docs" / "generate.py"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    pages, read, wrong, told, mistake = json.loads(done.stdout)
    assert "| `--luck` | `0.25` | Of units |" in pages["cli.md"]
    assert "| `luck` | number | `0.25` | Of units |" in pages["recipes.md"]
    assert "window=512, luck=0.25, teacher" in pages["api.md"]
    assert read == 0.5
    assert "score.luck = 'much'" in wrong
    assert "--luck" in told
    assert "<float>" in told
    assert mistake.startswith("--luck 'much'")
