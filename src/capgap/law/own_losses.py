"""What the teachers' own losses on the user's text change in advice. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from capgap.evaluate.measured import Measured, Measurement

# Standard errors that a difference must exceed: 95% that it is more than noise
BEYOND_NOISE = 1.645


def on_the_scale_of(
    losses: Mapping[str, float], measurement: Measurement
) -> tuple[str, dict[str, float]]:
    """The measured losses on the scale of `losses` (nats per token by name, of a law's own text).

    One factor for all: the one that leaves the best of the measured the loss that it has in
    `losses`. A text's difficulty and the length of tokens fall out; what stays is by how many per
    cent each is above the best. Returns the best one's name, and the losses.
    """
    measured = {name: measurement.models[name].nats_per_byte for name in losses}
    best = min(measured, key=lambda name: measured[name])
    factor = losses[best] / measured[best]
    return best, {name: factor * loss for name, loss in measured.items()}


def tell_measured(rows: Sequence[dict[str, Any]], measurement: Measurement) -> None:
    """Into every row of advice what was measured of its teacher, and beside which it looks poor."""
    models = measurement.models
    best = min(models, key=lambda name: models[name].nats_per_byte)
    for row in rows:
        mine = models[row["teacher"]]
        above, error = mine.above(models[best])
        row["measured"] = mine.as_dict() | {
            "above_lowest": above,
            # a difference to itself has no error
            "above_lowest_stderr": None if row["teacher"] == best else error,
            "no_better_than": None,
        }
        row["rests_on"].append(f"its own loss on {measurement.corpus}")
        if mine.changed_documents:
            row["cautions"].append(
                f"its tokenizer does not give back {mine.changed_documents} of "
                f"{len(mine.document_bytes)} documents as they are: its loss is that of a slightly "
                "different text"
            )
        others = [one for one in rows if one is not row and one["total"] <= row["total"]]
        if others:
            rival = min(others, key=lambda one: models[one["teacher"]].nats_per_byte)
            _compare(row, mine, rival, models[rival["teacher"]])


def is_outdone(row: dict[str, Any]) -> bool:
    """Whether a teacher that is no larger reads the text at least as well."""
    return row["measured"] is not None and row["measured"]["no_better_than"] is not None


def _compare(row: dict[str, Any], mine: Measured, rival: dict[str, Any], its: Measured) -> None:
    """A caution where a model is no better than one that is no larger."""
    above, error = mine.above(its)
    smaller = rival["total"] < row["total"]
    size = "smaller" if smaller else "as large"
    noise = "its noise is not known" if error is None else f"paired standard error {error:.4f}"
    if above > 0 or (above == 0 and smaller):
        row["measured"]["no_better_than"] = rival["teacher"]
        row["cautions"].append(
            f"no better than {rival['teacher']}, which is {size}: its own loss is {above:.4f} "
            f"nats/byte higher ({noise})"
        )
    elif smaller and (error is None or -above <= BEYOND_NOISE * error):
        row["cautions"].append(
            f"better than {rival['teacher']}, which is smaller, by {-above:.4f} nats/byte only, "
            f"which may be noise ({noise})"
        )
