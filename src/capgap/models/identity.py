"""Which model is it: a hash of what decides its outputs, wherever its files lie."""

import hashlib
import json
from pathlib import Path

from capgap.artifact import file_hash
from capgap.errors import UserError
from capgap.models.stored import StoredWeights, local_folder, needs_own_code

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
