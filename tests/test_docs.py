"""The documentation stays true: it is compared with the code, and its examples are run."""

import ast
import csv
import importlib.util
import inspect
import json
import pydoc
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import capgap
from capgap.artifact import read_json
from capgap.cli import app
from capgap.config import parse_recipe, shipped_recipes
from capgap.law.table import OPTIONAL
from capgap.pipeline.recipe import RunRecipe
from conftest import made_up_text

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("**/*.md")])
# pictures are drawn from finished sweeps and come apart from the text
PICTURES = DOCS / "images"
# Of which docs/recipes.md makes the names of types
PLAIN_WORDS = {"count", "counts", "number", "numbers", "path", "size", "sizes", "text", "texts"}
PLAIN_WORDS |= {"above", "at", "below", "between", "from", "least", "more", "most", "to"}
PLAIN_WORDS |= {"and", "false", "list", "of", "one", "or", "true", "two", "whole"}


def sections(text: str) -> dict[str, str]:
    """Heading, without its marks -> the text up to the next heading; code is no heading."""
    found: dict[str, str] = {}
    heading, in_code = "", False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        if line.startswith("#") and not in_code:
            heading = line.lstrip("#").strip()
            assert heading not in found, f"two sections are called {heading!r}"
            found[heading] = ""
        else:
            found[heading] = found.get(heading, "") + line + "\n"
    return found


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells, without its two heading rows."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            found[-1].append([cell.strip().replace("\\|", "|") for cell in cells])
        inside = line.startswith("|")
    return [rows[2:] for rows in found]


def keys(page: str, section: str) -> list[str]:
    """The names in the first column of a section's first table."""
    text = sections((DOCS / page).read_text())[section]
    found = [re.findall(r"`([^`]+)`", row[0]) for row in tables(text)[0]]
    return [name for names in found for name in names]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run_examples(folder: Path) -> dict[str, Any]:
    """The names that the examples of docs/api.md leave behind; `folder` is the current one."""
    (folder / "text.txt").write_text(made_up_text(300))
    names: dict[str, Any] = {"__name__": "__main__"}
    for heading, text in sections((DOCS / "api.md").read_text()).items():
        if not heading.startswith("`"):
            for block in code_blocks(text, "python"):
                exec(compile(block, f"docs/api.md, {heading}", "exec"), names)
    return names


def commands() -> dict[str, Any]:
    """Heading in docs/cli.md -> the command."""
    root = typer.main.get_command(app)
    subcommands: dict[str, Any] = root.commands  # type: ignore[attr-defined]
    return {"`capgap`": root} | {
        f"`capgap {name}`": command for name, command in subcommands.items()
    }


def test_every_command_has_its_section_and_no_other_is_named():
    headings = [h for h in sections((DOCS / "cli.md").read_text()) if h.startswith("`capgap")]
    assert headings == list(commands())


def generator() -> Any:
    """docs/generate.py, which writes what the source says into three pages."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    return generate


@pytest.mark.parametrize("page", ["cli.md", "recipes.md", "api.md"])
def test_pages_are_as_they_are_generated(page):
    text = (DOCS / page).read_text()
    assert generator().PAGES[page](text) == text, "run python docs/generate.py"


@pytest.mark.parametrize("heading", list(commands()))
def test_options_are_those_of_the_command(heading):
    options = [one for one in commands()[heading].params if one.param_type_name == "option"]
    expected = [name for option in options for name in option.opts]
    if heading == "`capgap`":
        expected.append("--help")
    assert sorted(keys("cli.md", heading)) == sorted(expected)


@pytest.mark.parametrize("heading", [name for name in commands() if " " in name])
def test_defaults_of_options_are_those_of_the_command(heading):
    rows = tables(sections((DOCS / "cli.md").read_text())[heading])[0]
    told = {row[0].split(",")[0].strip("`"): row[1].strip("`") for row in rows}
    for option in commands()[heading].params:
        if option.param_type_name != "option" or option.is_flag:
            continue
        written = told[option.opts[0]]
        if option.required:
            assert written == "required"
        elif option.default not in (None, ()):
            assert written == str(option.default)
        else:
            assert written in ("", "runs/NAME`, with the `name` of the recipe")


def test_every_section_of_a_recipe_is_told():
    sections_of_recipes = generator().recipe_sections()
    text = sections((DOCS / "recipes.md").read_text())
    with_keys = {heading for heading, told in text.items() if "| key | type |" in told}
    assert with_keys == set(sections_of_recipes)


def test_types_of_keys_are_in_plain_words():
    for heading, text in sections((DOCS / "recipes.md").read_text()).items():
        for row in tables(text)[0] if "| key | type |" in text else []:
            words = set(re.findall(r"[^\W\d]+", re.sub(r"`[^`]+`", "", row[1])))
            assert words <= PLAIN_WORDS, (heading, row)


def test_shipped_recipes_are_listed():
    text = sections((DOCS / "recipes.md").read_text())["Recipes"]
    assert sorted(row[0].strip("`") for row in tables(text)[0]) == sorted(shipped_recipes())


@pytest.mark.parametrize("number", range(6))
def test_example_recipes_load(number):
    blocks = code_blocks((DOCS / "recipes.md").read_text(), "toml")
    assert len(blocks) == 6
    data = tomllib.loads(blocks[number])
    (RunRecipe.model_validate if "teacher" in data else parse_recipe)(data)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dotted_names_are_there(page):
    for dotted in set(re.findall(r"\bcapgap(?:\.\w+)+", page.read_text())) - {"capgap.json"}:
        assert pydoc.locate(dotted) is not None, dotted


def test_scripts_and_files_for_clusters_are_well_formed():
    """As far as a shell and a YAML reader can tell."""
    text = (DOCS / "cluster.md").read_text()
    scripts = code_blocks(text, "bash")
    assert len(scripts) == 2
    job, task = (yaml.safe_load(block) for block in code_blocks(text, "yaml"))
    scripts += [task["setup"], task["run"]]
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    groups = job["spec"]["rayClusterSpec"]
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        named = {volume["name"] for volume in pod["volumes"]}
        mounted = {one["name"] for each in pod["containers"] for one in each["volumeMounts"]}
        assert mounted == named


def test_the_public_api_is_told():
    functions = dict(inspect.getmembers(capgap, inspect.isfunction))
    own = {name for name, one in functions.items() if one.__module__ == "capgap"}
    public = {name for name in own if not name.startswith("_")} | set(capgap.STAGES)
    headings = {h.strip("`") for h in sections((DOCS / "api.md").read_text())}
    assert {f"capgap.{name}" for name in public | {"open_text"}} <= headings


def flat(value: Any, prefix: str = "") -> set[str]:
    """Paths of all keys: `a.b` in an object, `a[].b` in a list of objects."""
    if isinstance(value, dict) and value:
        found = [flat(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items()]
        return set.union(*found)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set.union(*(flat(item, prefix + "[]") for item in value))
    return {prefix}


def below(path: str, other: str) -> bool:
    return path.startswith((f"{other}.", f"{other}[]"))


def assert_told(value: Any, told: list[str]) -> None:
    """Every key is told, or what it lies in is told as a whole; nothing else is told.

    What would lie in a null or an empty list cannot be compared.
    """
    real = flat(value)
    assert len(told) == len(set(told))
    untold = {path for path in real if path not in told and not any(below(path, t) for t in told)}
    # a null where the keys of an object are told
    untold -= {path for path in untold if any(below(t, path) for t in told)}
    false = {t for t in told if t not in real and not any(below(p, t) for p in real)}
    false -= {t for t in false if any(below(t, path) for path in real)}
    assert (untold, false) == (set(), set())


def json_of(*arguments: str) -> Any:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_examples_run_and_everything_they_leave_is_told(tmp_path, monkeypatch):
    """One test, because the examples hold a whole sweep."""
    monkeypatch.chdir(tmp_path)
    names = run_examples(tmp_path)
    out = tmp_path / "runs/tiny"

    answers = {
        "quickstart and sweep": names["result"],
        "a dry run": names["expected"],
        "report": json_of("report", "runs/tiny"),
        "corpus": json_of("corpus", "text.txt", "--out", "own-tokens", "--vocabulary", "300"),
        "sample": json_of("sample", "runs/tiny/student", "Lo", "--tokens", "8"),
    }
    teacher = str(next(iter(sorted(out.glob("teachers/*")))))
    window = ("--window", "16")
    answers["cache"] = json_of("cache", teacher, "runs/tiny/corpus", "--out", "cached", *window)
    asked = ("--corpus", "runs/tiny/corpus", "--tokens", "4096", "--out", "runs/one", *window)
    answers["distill"] = json_of("distill", teacher, "runs/tiny/student", *asked)
    for when in ("before", "after"):
        answers["distill"][when] = {"NAME": answers["distill"][when]["student"]}
    with open("runs/one/metrics.jsonl") as lines:
        assert {name for line in lines for name in json.loads(line)} <= set(
            re.findall(
                r"`(\w+)`", sections((DOCS / "output.md").read_text())["A distillation's folder"]
            )
        )
    asked = ("--student", "8k", "--tokens", "1M", "--teachers", teacher)
    answers["recommend"] = json_of("recommend", *asked, "--measure", "runs/tiny/corpus")
    for name, answer in answers.items():
        assert_told(answer, keys("cli.md", f"`--json` of {name}"))

    for name in ("sweep.json", "law.json", "samples.json", "corpus/manifest.json"):
        assert_told(read_json(out / name), keys("output.md", f"`{name}`"))
    records = [read_json(path) for path in out.glob("records/*/record.json")]
    assert {record["kind"] for record in records} == {"teacher", "cell", "baseline"}
    for record in records:
        assert_told(record, keys("output.md", "`record.json`"))
    with (out / "grid.csv").open() as file:
        assert next(csv.reader(file)) == keys("output.md", "`grid.csv`")

    (block,) = code_blocks(sections((DOCS / "output.md").read_text())["The output folder"], "")
    told = {line.removeprefix("OUT/").split()[0].split("/")[0] for line in block.splitlines()}
    assert {path.name for path in out.iterdir()} == told


@pytest.mark.parametrize(("kind", "recipe"), [("a run", "minima-3b"), ("a sweep", "chain")])
def test_what_a_plan_tells_is_told(kind, recipe):
    # with something in every list
    answer = json_of("plan", recipe, "--gpus", "L40S")
    assert_told(answer, keys("cli.md", f"`--json` of a plan of {kind}"))


def test_warnings_of_the_law_are_told():
    source = ast.parse((ROOT / "src/capgap/law/warnings.py").read_text())
    texts = [n.value for n in ast.walk(source) if isinstance(n, ast.Constant)]
    names = {text for text in texts if re.fullmatch(r"[a-z]+(_[a-z]+)+", str(text))}
    names -= {*OPTIONAL, "teacher_size", "teacher_parameters"}
    rows = tables(sections((DOCS / "output.md").read_text())["`law.json`"])[2]
    assert {row[0].strip("`") for row in rows} == names


def test_the_tree_is_that_of_the_repository():
    (block,) = code_blocks((DOCS / "source.md").read_text(), "")
    for name in re.findall(r"`(\w+/\w+\.py|\w+\.py)`", (DOCS / "source.md").read_text()):
        assert (ROOT / "src/capgap" / name).exists(), name
    told: set[str] = set()
    for line in block.splitlines():
        name = line.split()[0]
        told.add(f"src/capgap/{name}" if line.startswith(" ") else name)
    package = {
        f"src/capgap/{path.name}{'/' if path.is_dir() else ''}"
        for path in (ROOT / "src/capgap").iterdir()
        if not path.is_symlink() and path.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    # what lies in the repository, not what a run or a tool leaves in it
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    folders = {
        f"{path.name}/"
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name not in ignored
    }
    folders.discard("src/")
    assert told == package | folders | {"src/capgap/"}


def test_the_readme_s_python_runs(capsys):
    (block,) = code_blocks((ROOT / "README.md").read_text(), "python")
    exec(block, {})
    teacher, hours, command = capsys.readouterr().out.splitlines()
    assert teacher.startswith("Pythia-")
    assert float(hours) > 100
    assert "EleutherAI/pythia-410m" in command


def test_what_is_said_to_need_no_torch_imports_none():
    text = (DOCS / "source.md").read_text().rpartition("```")[2]
    paths = [name for name in re.findall(r"`([^`]+)`", text) if name.endswith((".py", "/"))]
    assert len(paths) == 16
    names = [f"capgap.{path.removesuffix('.py').strip('/').replace('/', '.')}" for path in paths]
    names += [
        f"capgap.{folder}.{path.stem}"
        for folder in ("law", "report", "cost")
        for path in (ROOT / "src/capgap" / folder).glob("*.py")
        if path.stem != "__init__"
    ]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = [heading.lower() for heading in sections(page.read_text()) if heading]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if PICTURES in place.parents:
            continue
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_place_on_one_machine(page):
    place = r"(?<![\w.:/])/(?:home|root|work|tmp|mnt|Users|var)/\S*"
    assert not re.findall(place, page.read_text())


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=]", name)[0] for name in project["dependencies"]}
    text = sections((DOCS / "decisions.md").read_text())["Dependencies"]
    assert {row[0] for row in tables(text)[0]} == wanted
    for needed in project["optional-dependencies"].values():
        for name in needed:
            # `dev` takes the other extras in
            assert name.startswith("capgap[") or re.split(r"[<>=]", name)[0] in text


def test_the_version_has_its_entry_in_the_changelog():
    from capgap import __version__

    headings = list(sections((ROOT / "CHANGELOG.md").read_text()))
    assert __version__ in headings
    assert "Unreleased" in headings
