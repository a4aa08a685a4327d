"""The package as others install it: a wheel, without the repository beside it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import json, capgap
from capgap.config import find_recipe, load_any_recipe, shipped_recipes
from capgap.law.published import published_families, published_results
recipes = shipped_recipes()
for name in recipes:
    load_any_recipe(find_recipe(name))
counts = [len(published_families()), len(published_results())]
print(json.dumps([capgap.__file__, sorted(recipes), *counts]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", out, ROOT]
    # built from a copy, so that nothing is left in the repository
    made = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=out)
    if made.returncode:
        pytest.skip(f"no wheel can be built here: {made.stderr.strip().splitlines()[-1]}")
    return next(out.glob("capgap-*.whl"))


def test_it_has_all_that_the_package_reads(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "capgap"
    read = {
        f"capgap/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.suffix in (".py", ".toml", ".j2", ".js", ".css", ".jsonl") and path.is_file()
    }
    assert read <= names
    assert "capgap/recipes/quickstart.toml" in names
    assert "capgap/py.typed" in names


def test_what_an_index_shows(wheel):
    with zipfile.ZipFile(wheel) as whole:
        (name,) = [one for one in whole.namelist() if one.endswith("/METADATA")]
        text = whole.read(name).decode()
    head, _, readme = text.partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    assert "License-Expression: Apache-2.0" in head
    for extra in ("chat", "evaluate", "gguf"):
        assert f"Provides-Extra: {extra}" in head
    assert readme.startswith("# capgap")


def test_it_works_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "there")
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "there")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    place, recipes, families, results = json.loads(done.stdout)
    assert Path(place).is_relative_to(tmp_path / "there")
    assert {"quickstart", "laptop", "minima-3b"} <= set(recipes)
    assert families >= 19
    assert results >= 10
