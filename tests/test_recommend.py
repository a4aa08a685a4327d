"""Advice from published laws: the families, the order, what it rests on, mistakes."""

import json

import pytest

from capgap.law.families import find_family, published_families
from capgap.law.published import PUBLISHED_SURFACE
from capgap.law.recommend import Candidate, candidates_of, recommend
from capgap.law.rules import own_rule, published_rule, read_law

# all parameters as the makers or transformers count them
PUBLISHED_TOTALS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-3-1B": 999_885_952,
    "Gemma-3-4B": 3_880_263_168,
    "OLMo-2-7B": 7_298_617_344,
    "Pythia-14M": 14_067_712,
    "Pythia-1.4B": 1_414_647_808,
    "Pythia-6.9B": 6_857_302_016,
    "GPT-2": 124_439_808,
    "GPT-2-XL": 1_557_611_200,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-1.7B": 1_711_376_384,
    "Mistral-7B": 7_241_732_096,
    "Phi-3-mini": 3_821_079_552,
}


def test_families_have_their_published_sizes():
    models = {one.name: one for family in published_families().values() for one in family.models}
    for name, total in PUBLISHED_TOTALS.items():
        assert models[name].parameters().total == total
    assert len(models) >= 50
    for family in published_families().values():
        sizes = [one.parameters().non_embedding for one in family.models]
        assert sizes == sorted(sizes)


def test_llama_2_and_3b_gives_7b_by_the_linear_law(typed):
    found = typed(
        *("recommend", "--student", "3B", "--tokens", "126B", "--family", "llama2"),
        *("--gpus", "16xA100", "--json"),
    )
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert told["linear_law"]["nearest"] == "Llama-2-7B"
    assert told["linear_law"]["teacher"] == pytest.approx(2.498 * 3e9 - 11.498e6)
    first = told["recommendations"][0]
    assert first["teacher"] == "Llama-2-7B"
    assert first["flops_total"] == 6 * 3_000_000_000 * 126_000_000_000 + 2 * 6_738_415_616 * (
        126_000_000_000
    )
    assert first["hours"] == pytest.approx(first["flops_total"] / (16 * 312e12 * 0.4) / 3600)
    low, high = first["interval"]
    assert low < first["expected_loss"] < high
    assert any("2311.07052" in source for source in first["rests_on"])
    # where the two disagree, both are said and why it does not matter
    assert told["surface"]["nearest"] == "Llama-2-13B"
    assert "0.17% of the loss, less than the 1%" in told["verdict"]


def test_expected_losses_are_those_of_the_surface():
    found = recommend(10**9, 80 * 10**9, candidates_of("pythia", ["3B"]))
    surface = PUBLISHED_SURFACE
    for row in found["recommendations"]:
        optimal = surface.supervised.compute_optimal_tokens().of(row["non_embedding"])
        above = surface.supervised.loss(row["non_embedding"], row["teacher_tokens"] or optimal)
        assert row["expected_loss"] == pytest.approx(float(surface.loss(1e9, 80e9, above)))
    by_size = next(row for row in found["recommendations"] if row["teacher"] == "3B")
    assert "not known" in by_size["cautions"][0]
    losses = [row["expected_loss"] for row in found["recommendations"] if row["margin"] > 0.01]
    assert losses == sorted(losses)


def test_a_line_that_the_surface_contradicts_gives_way():
    """A teacher of the size that the line wants, which was hardly trained."""
    poor = Candidate("poor", 2_500_000_000, 2_500_000_000, 10**9)
    sound = Candidate("sound", 8_000_000_000, 8_000_000_000, 10**12)
    found = recommend(10**9, 50 * 10**9, [poor, sound])
    assert [row["teacher"] for row in found["recommendations"]] == ["sound", "poor"]
    assert found["linear_law"]["nearest"] == "poor"
    assert "the surface says so; the linear law says poor" in found["verdict"]


def test_no_teacher_helps_a_student_of_many_tokens():
    weak = Candidate("weak", 10**9, 10**9, 20 * 10**9)
    found = recommend(10**9, 10**13, [weak])
    assert "By the surface no teacher helps" in found["verdict"]


def test_a_law_of_ones_own_takes_the_place_of_the_published(tmp_path):
    law = {
        "architecture": "llama",
        "init": "pruned",
        "tokens": 10**6,
        "status": "identified",
        "slope": 6.0,
        "slope_interval": [5.0, 7.0],
        "intercept": 0.0,
        "band": {"student": [10**9, 4 * 10**9]},
    }
    path = tmp_path / "law.json"
    path.write_text(json.dumps({"laws": [law, law | {"status": "not_identified"}]}))
    rule = own_rule(read_law(path), 2 * 10**9)
    assert (rule.low, rule.teacher, rule.high) == (10**10, 12 * 10**9, 14 * 10**9)
    assert rule.caution is None
    found = recommend(2 * 10**9, 10**11, candidates_of("llama2", []), own=rule)
    assert found["linear_law"]["nearest"] == "Llama-2-13B"
    assert found["recommendations"][0]["teacher"] == "Llama-2-13B"
    assert "your sweep" in found["recommendations"][0]["rests_on"][-1]
    assert "extrapolation" in own_rule(read_law(path), 10**7).caution


def test_the_published_line_says_how_far_it_reaches():
    rule = published_rule(500_000_000)
    assert (rule.low, rule.high) == (10**9, pytest.approx(5e8 / 0.3))
    assert rule.caution is None
    # below zero for a tiny student: no teacher is smaller than it
    tiny = published_rule(40_000)
    assert (tiny.low, tiny.teacher) == (40_000, 40_000)
    assert "extrapolation" in tiny.caution


def test_a_folder_is_counted_by_its_config(tmp_path):
    from capgap.models.build import to_config
    from capgap.models.shape import Shape

    shape = Shape("llama", 64, 2, 4, 4, 16, 96, 500, 32, False)
    to_config(shape).save_pretrained(tmp_path / "own")
    (found,) = candidates_of(None, [str(tmp_path / "own")])
    counts = shape.parameters()
    source = str(tmp_path / "own")
    assert found == Candidate("own", counts.non_embedding, counts.total, None, source)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--family", "lama2"], "no family 'lama2': known are llama2"),
        ([], "no teachers to choose from"),
        (["--teachers", "best"], "'best' is no published model"),
        (["--family", "llama2", "--teachers", "Llama-2-7B"], "is given twice"),
        (["--family", "llama2", "--gpus", "8xT4"], "give a number and one of V100, A100"),
        (["--family", "llama2", "--gpus", "0xA100"], "give a number"),
        (["--family", "llama2", "--law", "none.json"], "no law none.json"),
        (["--family", "llama2", "--student", "0"], "is no count"),
    ],
)
def test_mistakes(typed, asked, told):
    given = [] if "--student" in asked else ["--student", "1B"]
    found = typed("recommend", *given, "--tokens", "20B", *asked)
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert told in found.err


def test_a_law_that_is_none(typed, tmp_path):
    asked = ("recommend", "--student", "1B", "--tokens", "20B", "--family", "llama2", "--law")
    (tmp_path / "law.json").write_text("{}")
    assert "is no law.json of a sweep" in typed(*asked, tmp_path / "law.json").err
    unknown = {"init": "pruned", "status": "not_identified", "reason": "here are 2 students"}
    (tmp_path / "law.json").write_text(json.dumps({"laws": [unknown]}))
    found = typed(*asked, tmp_path / "law.json")
    assert found.code == 2
    assert "identifies no law (pruned: here are 2 students)" in found.err


def test_a_family_is_found_however_it_is_written():
    assert find_family("Llama-2") is find_family("llama2")
    assert find_family("Qwen2.5").title == "Qwen2.5"
