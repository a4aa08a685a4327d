"""Which model is it: a hash of what decides its outputs, wherever its files lie; and its size."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from capgap.artifact import file_hash
from capgap.errors import UserError
from capgap.models.stored import StoredWeights, local_folder, needs_own_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Written by the library that saved the model, without a part in what it computes
_INCIDENTAL = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def model_hash(path_or_name: str | Path) -> str:
    """sha256 of the weight files and the config of a model folder or a model on the Hub, and of the
    code that an architecture of its own brings.

    Raises UserError where there are none.
    """
    folder = local_folder(path_or_name)
    if not (folder / "config.json").is_file():
        raise UserError(f"{path_or_name} is no model folder: it has no config.json")
    weights = StoredWeights(folder)
    weights.verify()
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in _INCIDENTAL}
    whole = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    code = sorted(folder.glob("*.py")) if needs_own_code(config) else []
    for path in (*weights.paths, *code):
        whole.update(bytes.fromhex(file_hash(path)))
    return whole.hexdigest()


def count_parameters(model: "PreTrainedModel") -> tuple[int, int]:
    """(non-embedding, all): the first without tables of tokens and positions and without a head."""
    tables: list[Any] = [one for one in model.modules() if isinstance(one, nn.Embedding)]
    head = model.get_output_embeddings()
    # a tied head is one of the tables
    weights = {id(one.weight): one.weight for one in (*tables, head) if one is not None}
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - sum(weight.numel() for weight in weights.values()), total
