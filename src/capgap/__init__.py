"""capgap: the working system of the law of capacity gap in distilling language models."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capgap.distill.module import DistillationLoss as DistillationLoss
    from capgap.distill.module import TeacherColumn as TeacherColumn
    from capgap.distill.module import distillation_loss as distillation_loss
    from capgap.law.advise import Advice
    from capgap.law.law import Law
    from capgap.prune.surgery import prune_model as prune_model
    from capgap.stages.adapt import Adapt as Adapt
    from capgap.stages.cache import Cache as Cache
    from capgap.stages.corpus import Prepare as Prepare
    from capgap.stages.distill import Distill as Distill
    from capgap.stages.distill import Train as Train
    from capgap.stages.evaluate import Evaluate as Evaluate
    from capgap.stages.export import Export as Export
    from capgap.stages.inputs import open_text as open_text
    from capgap.stages.instruct import Instruct as Instruct
    from capgap.stages.instruct import Prefer as Prefer
    from capgap.stages.prune import Prune as Prune
    from capgap.stages.score import Score as Score
    from capgap.sweep.search_stage import Search as Search
    from capgap.sweep.stages import Column as Column
    from capgap.sweep.stages import Quickstart as Quickstart
    from capgap.sweep.stages import Sweep as Sweep

__version__ = "0.1.0"


def fit(
    source: Path | str,
    *,
    confidence: float = 0.9,
    independent_errors: bool = False,
    seed: int = 0,
) -> "Law":
    """Fit the law of capacity gap (arXiv 2311.07052) to a CSV of cells, or to the output folder of
    a sweep or of distillations. `capgap.report.sentences.sentences(law)` puts it in words.

    Intervals are at `confidence`. independent_errors: whether a table's `loss_stderr` is each
    cell's own noise. The same seed gives the same numbers. Raises UserError for a table that cannot
    be read (docs/output.md#a-table-of-cells).
    """
    # numpy, scipy and pandas are loaded here, so that `import capgap` stays instant
    from capgap.law.fit import fit as fit_cells
    from capgap.law.table import load_cells

    cells = load_cells(source, independent_errors=independent_errors)
    return fit_cells(cells, confidence=confidence, seed=seed)


def recommend(
    student: str | int,
    tokens: str | int,
    *,
    family: str | None = None,
    teachers: Sequence[str] = (),
    law: Path | str | None = None,
    gpus: str | None = None,
) -> "Advice":
    """Which teacher to take for a student of this size on these tokens, among the members of a
    family and the teachers named: published models, folders, names on the Hub, NAME=FOLDER, sizes.

    student: "3B" without embeddings, "3.2B total", or a published model's name. law: the law.json
    of a sweep of one's own. gpus: such as "16xA100", for hours. Raises UserError for names and
    sizes that are none.
    """
    from capgap.law.advise import recommend as advise
    from capgap.law.law import read_law
    from capgap.law.published import candidates_of

    own = None if law is None else read_law(law)
    return advise(student, tokens, candidates_of(family, teachers), law=own, gpus=gpus)


def plan(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    gpus: str | None = None,
    utilisation: float | None = None,
) -> dict[str, Any]:
    """What a run or a sweep would take (parameters, steps, FLOPs, memory, time, disk), as `capgap
    plan --json` tells it.

    recipe: a file or a shipped recipe's name; gpus: such as "16xA100", of whose peak the share
    `utilisation` is reached. UserError for a mistake in these.
    """
    from capgap.config import find_recipe, load_any_recipe
    from capgap.cost.plan import estimate

    loaded = load_any_recipe(find_recipe(str(recipe)), overrides)
    return estimate(loaded, gpus=gpus, utilisation=utilisation)


# Where the stages are defined; they are loaded when they are asked for
STAGES = {
    "Adapt": "stages.adapt",
    "Cache": "stages.cache",
    "Column": "sweep.stages",
    "Distill": "stages.distill",
    "Evaluate": "stages.evaluate",
    "Export": "stages.export",
    "Instruct": "stages.instruct",
    "Prefer": "stages.instruct",
    "Prepare": "stages.corpus",
    "Prune": "stages.prune",
    "Quickstart": "sweep.stages",
    "Score": "stages.score",
    "Search": "sweep.search_stage",
    "Sweep": "sweep.stages",
    "Train": "stages.distill",
}
_ELSEWHERE = STAGES | {
    "DistillationLoss": "distill.module",
    "TeacherColumn": "distill.module",
    "distillation_loss": "distill.module",
    "open_text": "stages.inputs",
    "prune_model": "prune.surgery",
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'capgap' has no attribute {name!r}")
    return getattr(import_module(f"capgap.{_ELSEWHERE[name]}"), name)
