"""Advice from published laws: the families, the order, what it rests on, mistakes."""

import dataclasses
import json
import math

import pytest

import capgap
import capgap.errors
from capgap.artifact import write_json
from capgap.law.advise import recommend
from capgap.law.data import cells_of
from capgap.law.fit import fit
from capgap.law.published import (
    PUBLISHED_SURFACE,
    Candidate,
    candidates_of,
    find_family,
    published_families,
)
from capgap.law.rules import PUBLISHED_RULE, LineRule, own_rule, published_rule
from capgap.report.advice import advice_sentences
from law_surface import ladder, sweep

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
        assert models[name].total == total
    assert len(models) >= 50
    for family in published_families().values():
        sizes = [one.non_embedding for one in family.models]
        assert sizes == sorted(sizes)


def test_llama_2_and_3b_gives_7b_by_the_linear_law(typed):
    found = typed(
        *("recommend", "--student", "3B", "--tokens", "126B", "--family", "llama2"),
        *("--gpus", "16xA100", "--json"),
    )
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert told["linear_law"]["teacher"] == pytest.approx(2.498 * 3e9 - 11.498e6)
    first = told["recommendations"][0]
    assert (told["take"], first["teacher"], told["agreed"]) == ("Llama-2-7B", "Llama-2-7B", True)
    # the student's embeddings count too: Llama 2's are 32,000 words wide twice
    student = told["student"]["total"]
    assert 3_150_000_000 < student < 3_250_000_000
    tokens = 126_000_000_000
    assert first["flops_total"] == 6 * student * tokens + 2 * 6_738_415_616 * tokens
    assert first["hours"] == pytest.approx(first["flops_total"] / (16 * 312e12 * 0.3) / 3600)
    # where line and surface part, both are said, with the error of the difference
    assert told["surface"]["nearest"] == "Llama-2-13B"
    assert 0.001 < first["difference"] < 0.003
    assert 0.0005 < first["difference_stderr"] < 0.005
    assert told["verdict"][0] == "Take Llama-2-7B, 2.2 times the student."
    assert [row["name"] for row in told["without_teacher"]] == [
        "no teacher",
        "no teacher, equal FLOPs",
    ]
    assert told["without_teacher"][1]["flops_total"] == pytest.approx(first["flops_total"])


def advised(student, tokens, candidates, **options):
    return recommend(student, tokens, candidates, **options)


def test_expected_losses_are_those_of_the_surface():
    found = advised(10**9, 80 * 10**9, candidates_of("pythia", ["3B"]))
    surface = PUBLISHED_SURFACE
    for row in found.recommendations:
        optimal = surface.supervised.compute_optimal_tokens().of(row.non_embedding)
        above = surface.supervised.loss(row.non_embedding, row.teacher_tokens or optimal)
        assert row.expected_loss == pytest.approx(float(surface.loss(1e9, 80e9, above)))
    by_size = next(row for row in found.recommendations if row.teacher == "3B")
    assert "not known" in by_size.cautions[0]
    alone = float(surface.supervised.loss(1e9, 80e9))
    assert found.without_teacher[0].expected_loss == pytest.approx(alone)


def test_a_difference_is_known_better_than_a_loss():
    """1% is what the surface is good to for a loss; most of it two teachers have in common."""
    losses = tuple(PUBLISHED_RULE.teacher_loss(size, 2e12) for size in (6.5e9, 12.7e9))
    error = PUBLISHED_RULE.difference_error(3e9, 126e9, losses)
    assert 0.0003 < error < 0.005
    assert PUBLISHED_RULE.difference_error(3e9, 126e9, (losses[0], losses[0])) == 0
    far = tuple(PUBLISHED_RULE.teacher_loss(size, 2e12) for size in (6.5e9, 200e9))
    assert PUBLISHED_RULE.difference_error(3e9, 126e9, far) > error


def test_a_line_that_the_surface_contradicts_gives_way():
    """A teacher of the size that the line wants, which was hardly trained."""
    poor = Candidate("poor", 2_500_000_000, 2_500_000_000, 10**9)
    sound = Candidate("sound", 8_000_000_000, 8_000_000_000, 10**12)
    found = advised(10**9, 50 * 10**9, [poor, sound])
    assert [row.teacher for row in found.recommendations] == ["sound", "poor"]
    assert found.recommendations[1].told_worse
    assert not found.agreed
    told = " ".join(advice_sentences(found))
    assert "poor, but the surface puts it" in told


def test_an_old_teacher_of_few_tokens_does_not_win_by_the_lines_third_decimal():
    found = advised("1B", "80B", candidates_of("pythia", ["Qwen2.5-3B"]))
    assert found.take == "Qwen2.5-3B"
    assert found.tokenizers == ("pythia", "qwen2.5")
    assert advice_sentences(found)[0].startswith("These have different tokenizers")


@pytest.mark.parametrize(
    ("student", "tokens", "family", "take", "told"),
    [
        (
            "100M",
            "2B",
            "mistral",
            "Mistral-7B",
            "None of these has a good size: look for one of 200M",
        ),
        ("9B", "100B", "llama3.2", None, "Take none of these: no candidate is larger"),
        ("Qwen2.5-0.5B", "50B", "qwen2.5", "Qwen2.5-1.5B", "by the surface alone: the line asks"),
    ],
)
def test_the_nearest_of_bad_candidates_is_not_agreed_on(student, tokens, family, take, told):
    found = advised(student, tokens, candidates_of(family, []))
    assert found.take == take
    assert not found.agreed
    assert told in advice_sentences(found)[0]


def test_outside_the_line_the_nearest_is_named():
    names = ["Pythia-70M", "Pythia-410M", "Qwen2.5-7B", "Pythia-12B"]
    found = advised("60M", "2B", candidates_of(None, names))
    assert found.take == "Pythia-410M"
    told = " ".join(advice_sentences(found))
    assert "Pythia-410M is nearest, 5.0 times the student" in told
    assert "within what it can tell apart" not in told or not found.recommendations[0].told_worse


def test_families_of_one_tokenizer_are_not_told_apart():
    shared = candidates_of(None, ["Llama-3.1-8B", "Llama-3.2-3B"])
    assert advised("Llama-3.2-1B", "20B", shared).tokenizers == ()


def test_sizes_with_and_without_embeddings():
    bare = advised("300M", "20B", candidates_of("qwen2.5", [])).student
    assert bare.non_embedding == 300_000_000 < bare.total
    whole = advised("300M total", "20B", candidates_of("qwen2.5", [])).student
    assert whole.total == 300_000_000
    assert whole.non_embedding < 250_000_000


def test_no_teacher_helps_a_student_of_many_tokens():
    weak = Candidate("weak", 1_100_000_000, 1_100_000_000, 20 * 10**9)
    found = advised(10**9, 5 * 10**11, [weak])
    assert any("no teacher helps" in one for one in advice_sentences(found))


def test_a_law_of_ones_own_takes_the_place_of_the_published(tmp_path):
    students = [40_000, 63_000, 100_000, 160_000]
    records = sweep(students, lambda s: ladder(1.5 * s, 1.4, 9), lambda s: 6 * s, init="pruned")
    law = fit(cells_of(records), draws=200)
    rule = own_rule(law, 80_000, 400_000)
    assert rule.teacher == pytest.approx(480_000, rel=0.03)
    assert rule.interval[0] < 480_000 < rule.interval[1]
    assert rule.caution is None
    assert own_rule(law, 80_000, 10**6).caution == "it was read on 400k tokens, not on 1M"
    beyond = own_rule(law, 10**7, 400_000)
    assert "extrapolation" in beyond.caution
    # the ends of the band go on with the slopes' own
    (line,) = law.lines
    step = 10**7 - line.band.student[-1]
    assert beyond.interval[0] == pytest.approx(line.band.low[-1] + line.slope.low * step)
    assert beyond.interval[1] == pytest.approx(line.band.high[-1] + line.slope.high * step)
    write_json(tmp_path / "law.json", law.as_dict())
    found = capgap.recommend(
        80_000, 1_600_000, teachers=["100k", "250k", "480k", "2M"], law=tmp_path / "law.json"
    )
    assert found.take == "480k"
    assert found.agreed
    assert found.linear_law.source.startswith("your sweep")


def test_a_sweep_without_a_line_advises_its_own_students():
    records = sweep([40_000], lambda _: ladder(60_000, 1.5, 6), lambda _: 135_000)
    law = fit(cells_of(records), draws=200)
    rule = own_rule(law, 40_000, 400_000)
    curve = law.curves[0]
    assert rule.interval == (
        curve.will_do[0].teacher_parameters,
        curve.will_do[-1].teacher_parameters,
    )
    found = advised(40_000, 400_000, candidates_of(None, ["60k", "135k", "450k"]), law=law)
    assert found.take == "135k"
    with pytest.raises(capgap.errors.UserError, match="says nothing of a student of 80k on 400k"):
        advised(80_000, 400_000, candidates_of(None, ["135k"]), law=law)


def test_lines_of_several_budgets_advise_by_the_nearest():
    students = [40_000, 63_000, 100_000, 160_000]
    records = []
    for tokens, times in ((400_000, 6), (1_600_000, 12)):
        made = sweep(students, lambda s: ladder(3 * s, 1.4, 9), lambda s, k=times: k * s)
        records += [dataclasses.replace(one, tokens=tokens) for one in made if one.kind == "cell"]
    law = fit(cells_of(records), draws=200)
    few, many = (own_rule(law, 80_000, tokens).teacher for tokens in (300_000, 2_000_000))
    assert few == pytest.approx(6 * 80_000, rel=0.05)
    assert many == pytest.approx(12 * 80_000, rel=0.05)


def test_a_teacher_between_two_that_will_do_is_not_one_of_them():
    points = tuple(
        (float(size), will_do) for size, will_do in ((10, True), (20, False), (40, True))
    )
    rule = LineRule(source="a curve", teacher=10.0, interval=(10.0, 40.0), measured=points)
    assert [rule.holds(size) for size in (10, 19, 22, 39)] == [True, False, False, True]
    assert rule.distance(20) == pytest.approx(math.log(2))


def test_equal_flops_are_those_of_the_teacher_that_is_taken():
    found = advised("300M", "20B", candidates_of(None, ["Qwen2.5-1.5B", "Llama-3.2-1B"]))
    first, equal = found.recommendations[0], found.without_teacher[1]
    assert equal.flops_total == pytest.approx(first.flops_total, rel=1e-6)
    same = found.without_teacher[0]
    assert first.flops_total - same.flops_total == 2 * first.total * 20 * 10**9


def test_the_published_line_says_how_far_it_reaches():
    rule = published_rule(500_000_000)
    assert rule.interval == (10**9, pytest.approx(5e8 / 0.3))
    assert rule.caution is None
    assert "extrapolation" in published_rule(3_000_000_000).caution
    # below zero for a tiny student
    tiny = published_rule(40_000)
    assert (tiny.teacher, tiny.interval) == (None, None)
    assert not tiny.holds(40_000)


def test_a_folder_is_counted_by_its_config(tmp_path):
    from capgap.models.build import to_config
    from capgap.models.shape import Shape

    shape = Shape("llama", 64, 2, 4, 4, 16, 96, 500, 32, False)
    to_config(shape).save_pretrained(tmp_path / "own")
    (found,) = candidates_of(None, [str(tmp_path / "own")])
    counts = shape.parameters()
    source = str(tmp_path / "own")
    expected = Candidate("own", counts.non_embedding, counts.total, None, source, shape=shape)
    assert found == expected


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--family", "lama2"], "no family 'lama2': known are llama2"),
        ([], "no teachers to choose from"),
        (["--teachers", "best"], "'best' is no published model"),
        (["--family", "llama2", "--teachers", "Llama-2-7B"], "is given twice"),
        (["--family", "llama2", "--gpus", "8xP100"], "give a number and one of T4, V100"),
        (["--family", "llama2", "--gpus", "0xA100"], "give a number"),
        (["--family", "llama2", "--law", "none.json"], "no law none.json"),
        (["--family", "llama2", "--student", "0"], "is no count"),
        (
            ["--family", "llama2", "--student", "3B", "--tokens", "20"],
            "is next to nothing for a student",
        ),
    ],
)
def test_mistakes(typed, asked, told):
    given = [] if "--student" in asked else ["--student", "1B"]
    budget = [] if "--tokens" in asked else ["--tokens", "20B"]
    found = typed("recommend", *given, *budget, *asked)
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert told in found.err


def test_a_law_that_is_none(typed, tmp_path):
    asked = ("recommend", "--student", "1B", "--tokens", "20B", "--family", "llama2", "--law")
    (tmp_path / "law.json").write_text("{}")
    assert "is no law.json" in typed(*asked, tmp_path / "law.json").err
    (tmp_path / "law.json").write_text('{"schema": 1, "laws": []}')
    found = typed(*asked, tmp_path / "law.json")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert "schema 1" in found.err


def test_a_family_is_found_however_it_is_written():
    assert find_family("Llama-2") is find_family("llama2")
    assert find_family("Qwen2.5").title == "Qwen2.5"
