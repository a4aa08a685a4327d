"""Held-out loss: every token once, the right context, and an honest standard error."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from capgap.corpus.tokens import HeldoutDocument, Marks
from capgap.distill.head import IGNORED_LABEL, token_losses
from capgap.evaluate import losses
from capgap.evaluate.losses import evaluate_heldout, heldout_set
from capgap.evaluate.measured import ratio_standard_error
from capgap.models.build import build_model
from capgap.models.parallel import Ranks
from capgap.models.parts import Parts
from capgap.models.shape import ladder_shape

WINDOW = 8


@pytest.fixture(scope="module")
def model():
    shape = ladder_shape("llama", 8000, vocabulary=50, positions=WINDOW)
    return build_model(shape, seed=0)


def documents_of(lengths):
    chooser = np.random.default_rng(0)
    return [
        HeldoutDocument(np.r_[0, chooser.integers(1, 50, length)].astype(np.int64), 3 * length)
        for length in lengths
    ]


def test_losses_equal_those_computed_document_by_document(model):
    documents = documents_of([1, 7, 8, 9, 30])
    found = evaluate_heldout(
        Parts(model), heldout_set(documents, Marks(0, 0, begin_windows=False), WINDOW)
    )
    for (tokens, _), total in zip(documents, found.document_losses, strict=True):
        expected = 0.0
        for start in range(0, len(tokens) - 1, WINDOW):
            piece = torch.from_numpy(tokens[start : start + WINDOW + 1])
            logits = model(piece[None, :-1]).logits[0]
            expected += functional.cross_entropy(logits, piece[1:], reduction="sum").item()
        assert total == pytest.approx(expected, rel=1e-5)
    assert found.document_tokens == [1, 7, 8, 9, 30]
    assert found.loss == pytest.approx(sum(found.document_losses) / 55)
    bits = sum(found.document_losses) / math.log(2) / (3 * 55)
    assert found.bits_per_byte == pytest.approx(bits)
    assert found.as_dict()["bits_per_byte_stderr"] == pytest.approx(
        found.loss_stderr / math.log(2) / 3
    )


def test_rows_are_read_once_whatever_their_lengths_and_the_batches(model, monkeypatch):
    """Long rows and short ones, also without a target, one by one and all at once."""
    found = heldout_set(documents_of([1, 7, 8, 9, 30]), Marks(0, 0, begin_windows=False), WINDOW)
    found.targets[0] = IGNORED_LABEL
    several = evaluate_heldout(Parts(model), found)
    assert several.document_losses[0] == 0
    for tokens in (1, 13):
        monkeypatch.setattr(losses, "BATCH_TOKENS", tokens)
        one_by_one = evaluate_heldout(Parts(model), found)
        assert one_by_one.document_losses == pytest.approx(several.document_losses, rel=1e-5)


def test_ranks_read_all_rows_between_them(model, monkeypatch):
    """Each as many times, though there are fewer rows than it takes to share them evenly."""
    monkeypatch.setattr(losses, "BATCH_TOKENS", 2 * WINDOW)
    found = heldout_set(documents_of([1, 7, 8, 9, 30]), Marks(0, 0, begin_windows=False), WINDOW)
    calls = []
    monkeypatch.setattr(
        losses, "token_losses", lambda *given: calls.append(0) or token_losses(*given)
    )
    expected = np.array(evaluate_heldout(Parts(model), found).document_losses)
    total, counts = 0.0, set()
    for rank in range(3):
        del calls[:]
        total += np.array(evaluate_heldout(Parts(model), found, Ranks(rank, 3)).document_losses)
        counts.add(len(calls))
    assert total == pytest.approx(expected, rel=1e-5)
    assert len(counts) == 1


def test_standard_error_agrees_with_a_bootstrap_over_documents():
    chooser = np.random.default_rng(1)
    counts = chooser.integers(20, 400, 200)
    sums = counts * (3 + 0.4 * chooser.standard_normal(200))
    drawn = chooser.integers(0, 200, (4000, 200))
    bootstrap = (sums[drawn].sum(1) / counts[drawn].sum(1)).std()
    assert ratio_standard_error(sums, counts) == pytest.approx(bootstrap, rel=0.05)


def test_one_document_has_no_standard_error():
    assert ratio_standard_error([3.0], [2]) is None
