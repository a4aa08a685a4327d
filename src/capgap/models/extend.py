"""More rows for a model's tables of tokens, tensor by tensor from folder to folder."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capgap.models.build import shape_of
from capgap.models.families import HEAD
from capgap.models.stored import (
    PAPERS,
    StoredWeights,
    copy_companions,
    empty_model,
    local_folder,
    read_config,
    write_weights,
    written_beside,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 64


def padded(rows: int, multiple: int = ROWS) -> int:
    """The next multiple, which suits a GPU's products."""
    return -(-rows // multiple) * multiple


def extend_model(
    path_or_name: str | Path,
    out: Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    first: int,
    origins: Sequence[Sequence[int]],
) -> int:
    """Writes the model with rows for new tokens as a Hugging Face folder; returns its rows.

    The row of a new token, of the table and of a head that is not tied to it, is the mean of the
    rows of the old tokens that it is made of. Rows beyond all tokens, up to a multiple of 64, are
    what they were, or the mean of all old tokens'. All other tensors are copied as they are stored;
    one tensor and one file are in memory at a time.

    Args:
        path_or_name: a model of one of the families.
        out: the folder, which appears whole; one that is there is replaced.
        tokenizer: goes into the folder.
        first: id of the first new token.
        origins: of every new token the old ids that it is made of.

    Raises:
        UserError: no such model, an unknown family, weights that are missing.
    """
    source = local_folder(path_or_name)
    config = copy.deepcopy(read_config(path_or_name))
    own = shape_of(config)
    family = own.family
    rows = padded(max(own.vocabulary, first + len(origins)))
    config.vocab_size = rows
    model = empty_model(config)
    config.architectures = [type(model).__name__]
    weights = StoredWeights(source)
    names = [name for name, _ in model.named_parameters()]
    weights.check(names)
    tables = {name for name, axes in family.tables.items() if "words" in axes}
    assert HEAD in tables

    def make(name: str) -> Tensor:
        weight = weights[name]
        return extended_rows(weight, rows, first, origins) if name in tables else weight

    skeleton = {name: tensor.to(weights.dtype(name)) for name, tensor in model.named_parameters()}
    with written_beside(out) as folder:
        config.save_pretrained(folder)
        write_weights(folder, skeleton, make)
        copy_companions(source, folder, PAPERS)
        tokenizer.save_pretrained(folder)
    return rows


def extended_rows(table: Tensor, rows: int, first: int, origins: Sequence[Sequence[int]]) -> Tensor:
    """A table [old rows, width] with `rows` rows: see `extend_model`. Means are taken in fp32."""
    words = min(first, len(table))
    mean = table[:words].float().mean(0)
    longer = table.new_empty(rows, table.shape[1])
    longer[:] = mean.to(table.dtype)
    longer[: len(table)] = table
    for place, origin in enumerate(origins, start=first):
        longer[place] = table[torch.tensor(origin)].float().mean(0).to(table.dtype)
    return longer
