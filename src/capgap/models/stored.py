"""Model folders tensor by tensor: more than fits into memory can be read, cut and written."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from capgap.corpus.hub import HUB_NAME, OWN_CODE, hub_revision, is_cached, looks_like_path
from capgap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 1 << 30
# What transformers calls otherwise in memory than in the files of GPT-NeoX
STORED_AS = {"lm_head.weight": "embed_out.weight"}
# Weights as pickles, which run code when they are read
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# What belongs to a model beside its config, weights and tokenizer
PAPERS = ("generation_config.json", *LICENCES)
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    *PAPERS,
)
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_config(path_or_name: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """The transformers config of a folder or of a name on the Hub; weights are not looked at.

    `trust_remote_code` runs the checkpoint's own code where nothing else describes its
    architecture.
    UserError in one line: nothing there, no config, quantised; no network, without waiting for it.
    """
    from transformers import AutoConfig, PreTrainedConfig

    name = str(path_or_name)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{name} is no model folder: it has no config.json")
    elif looks_like_path(name) or not HUB_NAME.fullmatch(name):
        raise UserError(f"{name} is no model folder")
    elif not is_cached(name, "config.json"):
        # without a network the loader below would retry for most of a minute
        hub_revision(name, kind="model")
    try:
        fields = PreTrainedConfig.get_config_dict(name)[0]
        needs_code = needs_own_code(fields)
        if needs_code and not trust_remote_code:
            raise UserError(
                f"{name} brings its own code (auto_map in config.json) for the architecture "
                f"{fields.get('model_type')!r}, which transformers does not have: {OWN_CODE}"
            )
        config = AutoConfig.from_pretrained(name, trust_remote_code=needs_code)
    except (OSError, ValueError, KeyError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the model {name}: {cause}") from None
    _refuse_quantised(name, config)
    return config


def needs_own_code(fields: Mapping[str, Any]) -> bool:
    """Whether code of the checkpoint describes its architecture and nothing else does, by its
    config."""
    if "auto_map" not in fields:
        return False
    from transformers import CONFIG_MAPPING

    return fields.get("model_type") not in CONFIG_MAPPING


def _refuse_quantised(name: str, config: "PreTrainedConfig") -> None:
    """UserError for weights that are packed codes and no numbers."""
    quantised: Any = getattr(config, "quantization_config", None)
    if quantised is not None:
        fields = quantised if isinstance(quantised, dict) else vars(quantised)
        method = fields.get("quant_method", "an unknown method")
        raise UserError(
            f"{name} is quantised ({method}): give the unquantised model; fp32, fp16 and bf16 are "
            "supported"
        )


def local_folder(path_or_name: str | Path) -> Path:
    """A folder as it is; a model of the Hub by its folder in the cache, downloaded if need be."""
    if Path(path_or_name).is_dir():
        return Path(path_or_name)
    wanted = ["*.safetensors", "*.json", *COMPANIONS]
    try:
        return Path(snapshot_download(str(path_or_name), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"no folder {path_or_name}, and from the Hub: {cause}") from None


class StoredWeights:
    """The tensors in a model folder's safetensors files, one at a time; weights[name].

    UserError at once: no safetensors, a shard that the index names is missing or is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._find_files()

    def check(self, names: Iterable[str]) -> None:
        """UserError where one of these is not there, or is no floating-point numbers."""
        for name in names:
            self.dtype(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in; UserError as `check`."""
        stored = self._find(name)
        with self._open(self._files[stored]) as opened:
            kind = opened.get_slice(stored).get_dtype()
        if kind not in _FLOATS:
            raise UserError(
                f"{self._files[stored]} holds {stored} as {kind}: quantised weights are not "
                "supported, give fp32, fp16 or bf16"
            )
        return _FLOATS[kind]

    def __getitem__(self, name: str) -> Tensor:
        """The tensor by its name in the model; UserError where it is not stored."""
        stored = self._find(name)
        # opened for every tensor: what stays open keeps the pages that were read in memory
        with self._open(self._files[stored]) as opened:
            return opened.get_tensor(stored)

    def _find(self, name: str) -> str:
        """What it is called in the files: checkpoints of a bare backbone leave the first word, and
        GPT-NeoX has a name of its own for the head."""
        for stored in (name, name.partition(".")[2], STORED_AS.get(name)):
            if stored in self._files:
                return stored
        raise UserError(f"the weights in {self.folder} lack {name}: give the whole model")

    def _find_files(self) -> dict[str, Path]:
        """Where every tensor lies."""
        index = self.folder / INDEX
        single = self.folder / SINGLE
        if index.is_file():
            paths = sorted({self.folder / name for name in _weight_map(index).values()})
        else:
            paths = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
        if not paths:
            pickles = sorted(one.name for kind in PICKLES for one in self.folder.glob(kind))
            reason = (
                f" ({pickles[0]} is a pickle, which can run any code when it is read)"
                if pickles
                else ""
            )
            raise UserError(
                f"{self.folder} holds no *.safetensors weights{reason}: convert the model with "
                "save_pretrained and try again"
            )
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise UserError(
                f"{self.folder} lacks {missing[0]}, {len(missing)} of {len(paths)} shards that "
                "its index names: download the model again"
            )
        found = {}
        for path in paths:
            with self._open(path) as opened:
                found.update(dict.fromkeys(opened.keys(), path))
        return found

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {path} ({error}): download it again") from None


def write_weights(
    folder: Path,
    skeleton: dict[str, Tensor],
    make: Callable[[str], Tensor],
    *,
    shard_bytes: int | None = None,
) -> None:
    """Writes the tensors of `skeleton` (on the meta device, by name) as transformers would.

    Files have at most `shard_bytes`, SHARD_BYTES if None. `make` gives each tensor when its turn
    comes; no more than one file's are in memory.
    """
    plan = split_torch_state_dict_into_shards(skeleton, max_shard_size=shard_bytes or SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = make(name).contiguous()
            assert tensors[name].shape == skeleton[name].shape, name
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A folder to write in that takes the place of `path` when all is well: `path` never holds
    half of something. What is there already is replaced."""
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    for leftover in (partial, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for file in partial.glob("*.safetensors"):
        # safetensors lets nobody but the owner read; the config has what the system gives
        shutil.copymode(partial / "config.json", file)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    if replaced.exists():
        shutil.rmtree(replaced)


def copy_companions(source: Path, folder: Path, patterns: Iterable[str] = COMPANIONS) -> list[str]:
    """Tokenizer, chat template, generation config and licence, byte by byte; their names."""
    paths = {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    for path in paths:
        shutil.copyfile(path, folder / path.name)
    return sorted(path.name for path in paths)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise UserError(f"cannot read {index} ({error}): download it again") from None
    if any("/" in name or name.startswith(".") for name in found.values()):
        raise UserError(f"{index} names files outside of its folder: give another model")
    return found


def empty_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """A model without weights, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
