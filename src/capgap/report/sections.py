"""The figures of the page, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from capgap.law.cells import Kind
from capgap.law.own_surface import surfaces_of
from capgap.report.advice_charts import families_chart
from capgap.report.charts import curve_chart, gain_map, teacher_chart
from capgap.report.compute import compute_chart
from capgap.report.data import Results, kinds_of, law_of
from capgap.report.figures import Figure, Section
from capgap.report.law_charts import law_chart, residual_chart
from capgap.report.published_charts import benchmark_chart
from capgap.report.ratio_charts import ratio_chart
from capgap.report.search_charts import search_chart
from capgap.report.surface_charts import own_surface_chart, published_surface_chart
from capgap.report.training import agreement_chart, cross_entropy_chart, kl_chart

# tokens per student parameter of the surfaces that are drawn
SURFACE_TOKENS = (20, 80)


def report_sections(results: Results) -> Iterator[Section]:
    """All sections with their figures; those without data as `Absent`.

    Of a law without records only what it can show alone.
    """
    yield from _law_sections(results)
    if results.search:
        yield Section(
            "search",
            "The search",
            "Which teachers were chosen while the budget was spent.",
            (search_chart(results),),
        )
    if not results.law_alone:
        yield from _record_sections(results)
    yield Section(
        "surfaces",
        "Surfaces",
        "The loss over both sizes, where a sweep of students from scratch lets it be fitted, and "
        "as published. There the best teacher is no fixed multiple of the student: it depends on "
        "the tokens.",
        (
            *(
                own_surface_chart(own, tokens)
                for own in surfaces_of(results.law)
                for tokens in sorted(set(own.tokens))
            ),
            *(published_surface_chart(tokens) for tokens in SURFACE_TOKENS),
        ),
    )
    if not results.law_alone:
        yield Section(
            "published",
            "Against published models",
            "Models of billions of parameters: what distilling by the law has brought, and what "
            "the published laws say of published teachers.",
            (benchmark_chart(), families_chart()),
        )
        yield Section(
            "training",
            "During training",
            "Each student with its best teacher; all other runs are in the records.",
            _each_kind(results, cross_entropy_chart, kl_chart, agreement_chart),
        )


def _law_sections(results: Results) -> Iterator[Section]:
    kinds = kinds_of(results)
    architectures = sorted({kind.architecture for kind in kinds})
    yield Section(
        "curves",
        "Loss over teacher size",
        "One line is one student, distilled from every teacher. The star marks the best teacher "
        "with its interval.",
        tuple(
            curve_chart(results, kind, relative=relative)
            for kind in kinds
            for relative in (False, True)
        ),
    )
    yield Section(
        "law",
        "The law",
        "How the best teacher grows with the student, beside the published line, and how far each "
        "student is from the law.",
        (
            *(figure for kind in kinds for figure in _law_figures(results, kind)),
            *(ratio_chart(results, architecture) for architecture in architectures),
        ),
    )


def _law_figures(results: Results, kind: Kind) -> Iterator[Figure]:
    yield law_chart(results, kind)
    # where there is no law, its chart has said why
    if (law_of(results, kind) or {}).get("status") == "identified":
        yield residual_chart(results, kind)


def _record_sections(results: Results) -> Iterator[Section]:
    architectures = sorted({record.architecture for record in results.records})
    yield Section(
        "gain",
        "Was distillation worth it?",
        "Every cell against the same student trained as long without a teacher.",
        _each_kind(results, gain_map),
    )
    yield Section(
        "compute",
        "Loss against compute",
        "Once with the teacher's training on the bill, once with the teacher already there.",
        tuple(
            compute_chart(results, architecture, teacher_training=counted)
            for architecture in architectures
            for counted in (True, False)
        ),
    )
    yield Section(
        "teachers",
        "The teachers",
        "A curve over teachers is only worth what its teachers are.",
        tuple(teacher_chart(results, architecture) for architecture in architectures),
    )


def _each_kind(results: Results, *makers: Any) -> tuple[Figure, ...]:
    return tuple(make(results, kind) for kind in kinds_of(results) for make in makers)
