"""capgap: the working system of the law of capacity gap in distilling language models."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from capgap.law.advise import Advice
    from capgap.law.law import Law

__version__ = "0.1.0"


def fit(
    source: Path | str,
    *,
    confidence: float = 0.9,
    independent_errors: bool = False,
    seed: int = 0,
) -> "Law":
    """Fit the law of capacity gap (arXiv 2311.07052) to a CSV of cells, or to the output folder of
    a sweep. `capgap.report.sentences.sentences(law)` puts it in words.

    Intervals are at `confidence`. independent_errors: whether a table's `loss_stderr` is each
    cell's own noise. Raises UserError for a table that cannot be read (docs/output.md).
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
    from capgap.law.candidates import candidates_of
    from capgap.law.law import read_law

    own = None if law is None else read_law(law)
    return advise(student, tokens, candidates_of(family, teachers), law=own, gpus=gpus)
