"""Model folders tensor by tensor: more than fits into memory can be read, cut and written."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import DryRunError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from capgap.artifact import file_hash, folder_written, read_json, write_json
from capgap.corpus.names import (
    OWN_CODE,
    at_revision,
    cached_file,
    check_model_name,
)
from capgap.errors import UserError, border, first_line, warn_once
from capgap.mirror import local
from capgap.sizes import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Config and weights of a model that capgap wrote, with their hashes
WRITTEN = "capgap.json"
SHARD_BYTES = 1 << 30
ROWS = 4096
# A download of less is not told
WORTH_TELLING = 10**8
# What transformers calls otherwise in memory than in the files of GPT-NeoX
STORED_AS = {"lm_head.weight": "embed_out.weight"}
# How names of the table of tokens end
TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# Weights as pickles, which run code when they are read
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# What stages say of a model they made; it goes along with what is made of that model
RECORDS = ("pruning.json", "distill.json", "adapt.json", "instruct.json", "prefer.json")
# What belongs to a model beside its config, weights and tokenizer
PAPERS = ("generation_config.json", *LICENCES)
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "normalizer.json"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken", "*.bpe"),
    *("chat_template*", "additional_chat_templates/*"),
    *("preprocessor_config.json", "processor_config.json", *PAPERS),
)
_FLOATS = {"F64": torch.float64, "F32": torch.float32}
_FLOATS |= {"F16": torch.float16, "BF16": torch.bfloat16}


def read_config(path_or_name: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """The transformers config of a folder or of a name on the Hub; weights are not looked at.

    `trust_remote_code` runs the checkpoint's own code where only that describes its architecture.
    UserError: nothing there, no config, quantised, an adapter, a config that transformers does not
    take; no network, without waiting for it.
    """
    from transformers import AutoConfig, PreTrainedConfig

    name = local(path_or_name, light=True)
    folder = Path(name)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            # transformers would add it to what lies beside it, where the library peft is there
            raise UserError(
                f"{name} holds an adapter (adapter_config.json): merge it with merge_and_unload() "
                "and give the merged model in a folder without the adapter's files"
            )
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} is no model folder: it has no config.json")
    check_model_name(name)
    with border(f"cannot read the config of the model {name}"):
        repository, revision = at_revision(name)
        at: dict[str, Any] = {"revision": revision or "main"}
        fields = PreTrainedConfig.get_config_dict(repository, **at)[0]
        if not isinstance(fields, dict):
            raise UserError(f"config.json of the model {name} is no object: give the model's own")
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            # kernels may be named by a repository, whose code would be fetched and run
            if "/" in str(fields.get(key)):
                raise UserError(
                    f"config.json of the model {name} asks for code of another repository ({key}: "
                    f"{fields[key]!r}): take that key out"
                )
        needs_code = needs_own_code(fields)
        if needs_code and not trust_remote_code:
            raise UserError(
                f"{name} brings its own code (auto_map in config.json) for the architecture "
                f"{fields.get('model_type')!r}, which transformers does not have: {OWN_CODE}"
            )
        config = AutoConfig.from_pretrained(repository, trust_remote_code=needs_code, **at)
    quantised: Any = getattr(config, "quantization_config", None)
    if quantised is not None:
        settings = quantised if isinstance(quantised, dict) else vars(quantised)
        method = settings.get("quant_method", "an unknown method")
        raise UserError(
            f"{name} is quantised ({method}): give the unquantised model; fp32, fp16 and bf16 are "
            "supported"
        )
    if getattr(config, "tie_word_embeddings", False) and _has_own_head(folder):
        warn_once(
            f"{name}: its config ties the head to the table of tokens, its weights hold another "
            "head: that is taken"
        )
        config.tie_word_embeddings = False
    return config


def _has_own_head(folder: Path) -> bool:
    """Whether the files, where there are some yet, hold a head that is not the table of tokens."""
    try:
        weights = StoredWeights(folder)
    except UserError:
        return False
    heads = [name for name in (*STORED_AS, *STORED_AS.values()) if name in weights.names]
    if not heads:
        return False
    tables = [name for name in weights.names if name.endswith(TABLES)]
    # of several tables (Gemma 3n's, a tower's) only one has the head's shape
    alike = [name for name in tables if weights.shape(name) == weights.shape(heads[0])]
    return bool(alike) and not any(weights.same(heads[0], name) for name in alike)


def text_config(config: "PreTrainedConfig") -> Any:
    """The part of a config that describes the language model, where it also sees or hears."""
    return config.get_text_config(decoder=True)


def positions_of(config: "PreTrainedConfig") -> int | None:
    """The longest text that a model reads; None where its config sets no limit."""
    positions: int | None = getattr(text_config(config), "max_position_embeddings", None)
    return positions


def needs_own_code(fields: Mapping[str, Any]) -> bool:
    """Whether only code of the checkpoint describes the architecture of this config."""
    if "auto_map" not in fields:
        return False
    from transformers import CONFIG_MAPPING

    return fields.get("model_type") not in CONFIG_MAPPING


def local_folder(path_or_name: str | Path) -> Path:
    """A folder as it is; a model of the Hub by its folder in the cache, downloaded if need be; of
    one at a URL the local copy."""
    name = local(path_or_name)
    if Path(name).is_dir():
        return Path(name)
    repository, revision = at_revision(name)
    asked: dict[str, Any] = {
        "repo_id": repository,
        "revision": revision,
        "allow_patterns": ["*.safetensors", "*.json", *COMPANIONS],
        # of other libraries
        "ignore_patterns": ["consolidated*", "original/*"],
    }
    try:
        _tell_download(name, asked)
        return Path(snapshot_download(**asked))
    except (OSError, ValueError) as error:
        raise UserError(f"no folder {name}, and from the Hub: {first_line(error)}") from None


def _tell_download(name: str, asked: Mapping[str, Any]) -> None:
    """How much of a model will be fetched; UserError where the disk has no room for it."""
    if any(cached_file(name, file) is not None for file in (SINGLE, INDEX)):
        return  # there, but for what another process fetches or a stopped one left
    try:
        files = snapshot_download(**asked, dry_run=True)
    except DryRunError:
        return  # no network: what is in the cache has to do
    size = sum(one.file_size or 0 for one in files if one.will_download)
    if size < WORTH_TELLING:
        return
    cache = Path(HF_HUB_CACHE)
    told = f"{format_bytes(size)} of {name} from the Hub into {cache}"
    there = next(one for one in (cache, *cache.parents) if one.exists())
    if shutil.disk_usage(there).free < size:
        raise UserError(f"no space for {told}: free some, or set HF_HOME to another disk")
    warn_once(f"fetches {told}")


class StoredWeights:
    """The tensors in a model folder's safetensors files, one at a time; weights[name].

    Names are the model's: files may leave the first part out (a bare backbone) or have GPT-NeoX's
    name for the head. UserError at once: no safetensors, a shard that the index names is missing or
    is cut off; later: the tensor is not stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        for path in _weight_files(folder):
            self._files |= dict.fromkeys(self._open(path).keys(), path)

    @property
    def names(self) -> list[str]:
        """All tensors, as the files call them."""
        return list(self._files)

    @property
    def paths(self) -> list[Path]:
        """The files, in order."""
        return sorted(set(self._files.values()))

    def verify(self) -> None:
        """UserError where a file is not as capgap wrote it; other models have no list of files."""
        written = self.folder / WRITTEN
        if not written.is_file():
            return
        for name, expected in read_json(written, schema=1, files=dict)["files"].items():
            path = self.folder / name
            if path.is_file() and file_hash(path) != expected:
                raise UserError(
                    f"{path} is damaged (not as it was written): make the model again, or delete "
                    f"{WRITTEN} beside it if the change is yours"
                )

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored_name(name)
        return self._open(self._files[stored]).get_tensor(stored)

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def shape(self, name: str) -> list[int]:
        return list(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in; UserError where that is no floating-point one."""
        kind = self._slice(name).get_dtype()
        if kind not in _FLOATS:
            raise UserError(
                f"{self.folder} holds {self._stored_name(name)} as {kind}: quantised weights are "
                "not supported, give fp32, fp16 or bf16"
            )
        return _FLOATS[kind]

    def check(self, names: Iterable[str]) -> None:
        """UserError where one of these is not there, or is no floating-point numbers, and as
        `verify`."""
        self.verify()
        for name in names:
            self.dtype(name)

    def check_config(self, config: "PreTrainedConfig") -> None:
        """UserError where the config describes tensors of other shapes, or weights that are no
        floating-point numbers, and as `verify`. Tensors that transformers stores under other names
        are left to it.
        """
        self.verify()
        wanted = {name: list(one.shape) for name, one in empty_model(config).named_parameters()}
        for name in filter(self.has, wanted):
            self.dtype(name)
            if self.shape(name) != wanted[name]:
                raise UserError(
                    f"{self.folder}: config.json describes {name} as {wanted[name]}, the weights "
                    f"have {self.shape(name)}: give the model's own config"
                )

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors of one shape are equal, read in pieces."""
        left, right = self._slice(one), self._slice(other)
        return all(
            torch.equal(left[start : start + ROWS], right[start : start + ROWS])
            for start in range(0, self.shape(one)[0], ROWS)
        )

    def _slice(self, name: str) -> Any:
        stored = self._stored_name(name)
        return self._open(self._files[stored]).get_slice(stored)

    def _find(self, name: str) -> str | None:
        names = (name, name.partition(".")[2], STORED_AS.get(name))
        return next((stored for stored in names if stored in self._files), None)

    def _stored_name(self, name: str) -> str:
        stored = self._find(name)
        if stored is None:
            raise UserError(f"the weights in {self.folder} lack {name}: give the whole model")
        return stored

    def _open(self, path: Path) -> Any:
        """Opened for every tensor: what stays open keeps the pages that were read in memory."""
        check_inside(path, self.folder)
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {path} ({error}): download it again") from None


def _weight_files(folder: Path) -> list[Path]:
    """The single file before those of an index, as transformers reads them."""
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        if index.is_file():
            warn_once(f"{folder}: {SINGLE} is read, and not the files that {INDEX} names")
        return [single]
    paths = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        paths = [folder / name for name in _indexed_files(index)]
    if not paths:
        pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
        code = "is a pickle, which can run any code when it is read"
        why = f" ({pickles[0]} {code})" if pickles else ""
        raise UserError(
            f"{folder} holds no *.safetensors weights{why}: convert the model with save_pretrained "
            "and try again"
        )
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {missing[0]}, {len(missing)} of {len(paths)} shards that its index "
            "names: download the model again"
        )
    return paths


def _indexed_files(index: Path) -> list[str]:
    with border(f"cannot read {index}, download it again"):
        names = set(json.loads(index.read_text())["weight_map"].values())
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{index} has no map of weights to files: download it again")
    if any("/" in name or name.startswith(".") for name in names):
        raise UserError(f"{index} names files outside of its folder: give another model")
    return sorted(names)


def write_weights(
    folder: Path,
    skeleton: dict[str, Tensor],
    make: Callable[[str], Tensor],
    *,
    shard_bytes: int | None = None,
    on_tensor: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes the tensors of `skeleton` (on the meta device, by name) as transformers would, in
    files of at most `shard_bytes`, by default SHARD_BYTES.

    `make` gives each tensor when its turn comes; no more than one file's are in memory. `on_tensor`
    gets how many are done.
    """
    done = 0
    plan = split_torch_state_dict_into_shards(skeleton, max_shard_size=shard_bytes or SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = make(name).contiguous()
            assert tensors[name].shape == skeleton[name].shape, name
            done += 1
            on_tensor(done)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A folder to write a model in, which takes the place of `path` when all is well; it gets a
    list of its config and weights with their hashes, which `StoredWeights.verify` compares."""
    with folder_written(path) as partial:
        yield partial
        weights = sorted(partial.glob("*.safetensors"))
        for file in weights:
            # safetensors lets nobody but the owner read; the config has what the system gives
            shutil.copymode(partial / "config.json", file)
        files = {file.name: file_hash(file) for file in (partial / "config.json", *weights)}
        write_json(partial / WRITTEN, {"schema": 1, "files": files})


def copy_companions(source: Path, folder: Path, patterns: Iterable[str] = COMPANIONS) -> list[str]:
    """Tokenizer, chat template, generation config and licence, byte by byte; their names."""
    paths = {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    for path in paths:
        check_inside(path, source)
        copied = folder / path.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)
    return sorted(str(path.relative_to(source)) for path in paths)


def check_inside(path: Path, folder: Path) -> None:
    """UserError for a link out of a model's folder. The Hub's cache keeps files as links to its own
    blobs, two folders above."""
    place, own = path.resolve(), folder.resolve()
    is_blob = own.parent.name == "snapshots" and place.parent == own.parents[1] / "blobs"
    if own not in place.parents and not is_blob:
        raise UserError(
            f"{path} is a link out of the model's folder ({place}): put the file itself there"
        )


def empty_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """A model without weights, on the meta device. UserError for a config that describes none."""
    with border(f"config.json describes no {config.model_type} model"), torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config)
        return model


def skeleton_of(config: "PreTrainedConfig") -> dict[str, Tensor]:
    """The tensors that a model of this config stores, by name, on the meta device; the config is
    told the model's class. UserError as `empty_model`."""
    model = empty_model(config)
    config.architectures = [type(model).__name__]
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensors[name] for name in model.state_dict() if name in tensors}


def auto_class(config: "PreTrainedConfig") -> Any:
    """What transformers builds a model with: some that see keep no causal class of their own."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if sees and not is_causal else AutoModelForCausalLM
