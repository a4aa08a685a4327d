"""Recipes: strict keys, ranges, overrides, and a hash of what changes the results."""

import pytest

from capgap.config import find_recipe, load_any_recipe, load_recipe, parse_recipe, shipped_recipes
from capgap.errors import UserError
from capgap.models.shape import ladder_shape
from capgap.sweep.recipe import identity


def test_sizes_are_read_in_words_and_numbers(tiny_recipe):
    tiny_recipe["students"] = {"sizes": ["8k", 11000], "tokens": ["0.5M", 1e6]}
    recipe = parse_recipe(tiny_recipe)
    assert recipe.students.sizes == (8000, 11000)
    assert recipe.students.tokens == (500_000, 1_000_000)


def test_sizes_with_embeddings_become_those_without(tiny_recipe):
    tiny_recipe["students"] = {"sizes": ["30k total", "9k"], "tokens": ["0.5M"]}
    recipe = parse_recipe(tiny_recipe)
    with_embeddings, plain = recipe.students.sizes
    vocabulary, window = recipe.corpus.vocabulary, recipe.corpus.window
    shape = ladder_shape("llama", with_embeddings, vocabulary=vocabulary, positions=window)
    assert shape.parameters().total == pytest.approx(30_000, rel=0.02)
    assert plain == 9_000
    # what the results depend on is the size that it became
    tiny_recipe["students"]["sizes"] = [with_embeddings, "9k"]
    assert parse_recipe(tiny_recipe).hash() == recipe.hash()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"students": {"sizes": ["80 total"], "tokens": [2560]}}, ["80 total", "the smallest"]),
        (
            {"students": {"sizes": ["80k total"], "tokens": [2560]}, "corpus": {"tokenizer": "x"}},
            ["students.sizes in total", "without embeddings"],
        ),
        ({"students": {"sizes": ["8k"], "token": [2560]}}, ["'students.token'", "'tokens'"]),
        ({"trainings": {}}, ["'trainings'", "'training'"]),
        ({"name": None}, ["name", "None"]),
        ({"architectures": ["lama"]}, ["architectures.0", "'lama'", "'llama'"]),
        ({"training": {"batch_tokens": 100}}, ["batch_tokens 100", "corpus.window 16"]),
        (
            {"training": {"batch_tokens": 256, "micro_batch_tokens": 48}},
            ["micro_batch_tokens 48", "divide"],
        ),
        ({"training": {"alpha": 1.5}}, ["training.alpha", "1.5"]),
        ({"students": {"sizes": ["8q"], "tokens": [2560]}}, ["8q"]),
        ({"students": {"sizes": [-5], "tokens": [2560]}}, ["-5"]),
        ({"students": {"sizes": [], "tokens": [2560]}}, ["students.sizes"]),
        ({"students": {"sizes": ["8k"], "tokens": [100]}}, ["100", "batch"]),
        ({"teachers": {}}, ["teachers", "sizes", "models"]),
        ({"teachers": {"sizes": ["9k"], "models": ["x"], "tokens": 1000}}, ["either"]),
        ({"teachers": {"sizes": ["9k"]}}, ["tokens"]),
        ({"teachers": {"sizes": ["9k"], "tokens": 512, "learning_rate": "atuo"}}, ["atuo"]),
        ({"corpus": {"window": 4}}, ["corpus.window", "4"]),
        ({"seeds": [-1]}, ["seeds.0", "-1"]),
        ({"run": {"workers": 0}}, ["run.workers = 0", "'auto'", "greater than 0"]),
        ({"teachers": {"sizes": ["9k"], "tokens": 100}}, ["teachers.tokens 100", "batch of 256"]),
    ],
)
def test_mistakes_name_the_key_the_value_and_the_fix(tiny_recipe, change, words):
    with pytest.raises(UserError) as caught:
        parse_recipe(tiny_recipe | change)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_key_is_named(tiny_recipe):
    del tiny_recipe["students"]
    with pytest.raises(UserError, match="'students' is missing"):
        parse_recipe(tiny_recipe)


def test_overrides_reach_into_tables(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(
        'name="r"\n[teachers]\nsizes=["9k"]\ntokens="1M"\n[students]\nsizes=["8k"]\ntokens=["1M"]\n'
    )
    recipe = load_recipe(
        path, ["training.alpha=0.25", "corpus.source=stdlib", 'students.sizes=["7k", 8000]']
    )
    assert recipe.training.alpha == 0.25
    assert recipe.corpus.source == "stdlib"
    assert recipe.students.sizes == (7000, 8000)
    with pytest.raises(UserError, match=r"section\.key=value"):
        load_recipe(path, ["training.alpha"])
    with pytest.raises(UserError, match="'name' is not a table"):
        load_recipe(path, ["name.x=1"])
    with pytest.raises(UserError, match="did you mean 'alpha'"):
        load_recipe(path, ["training.alpa=1"])


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(UserError, match=r"no recipe .*quickstart"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read"):
        load_recipe(broken)
    with pytest.raises(UserError, match="cannot read"):
        load_recipe(tmp_path)


def test_hash_covers_what_changes_results_alone(tiny_recipe):
    base = parse_recipe(tiny_recipe).hash()
    limited = tiny_recipe | {"corpus": tiny_recipe["corpus"] | {"max_documents": 9}}
    assert parse_recipe(limited).hash() != base
    before = parse_recipe(tiny_recipe).model_dump(mode="json")
    del before["corpus"]["max_documents"]
    assert identity(before) == identity(parse_recipe(tiny_recipe).model_dump(mode="json"))
    assert parse_recipe(tiny_recipe | {"name": "other", "run": {"workers": 7}}).hash() == base
    assert parse_recipe(tiny_recipe | {"seeds": [1]}).hash() != base


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load(name):
    assert load_any_recipe(find_recipe(name)).name == name


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seeds=2", "`set`: seeds = 2: a list was expected, such as [2]"),
        (
            "students.sizes=30k",
            """`set`: students.sizes = '30k': a list was expected, such as ["30k"]""",
        ),
        ("student.sizes=30k", "`set`: unknown key 'student'; did you mean 'students'?"),
        ("training.alpha=2", "`set`: training.alpha = 2: "),
    ],
)
def test_an_override_is_to_blame_and_not_the_file(override, line):
    with pytest.raises(UserError) as refused:
        load_recipe(find_recipe("quickstart"), [override])
    assert str(refused.value).startswith(line)
