"""Where an evaluation set comes from: a local copy, or the Hub. Imports no torch and no harness.

A copy's files become the records that the harness' tasks read.
"""

import csv
import gzip
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from capgap.artifact import digest, file_hash
from capgap.corpus.readers import safe_members
from capgap.errors import UserError, first_line
from capgap.evaluate.sets import BenchmarkSet, NotMeasured

ARCHIVES = (".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".tar")
Records = list[dict[str, Any]]
Splits = dict[str, Records]
# By part; the part of a set without parts is ""
LocalSet = dict[str, Splits]


@dataclass(frozen=True)
class SetSource:
    """`about`: what the record says of it; `local`: the records of a local copy, None for the
    Hub."""

    about: dict[str, Any]
    local: LocalSet | None = None


def find_source(one: BenchmarkSet, folder: Path | None, parts: Sequence[str]) -> SetSource:
    """The set's copy in the folder, or else its dataset on the Hub; NotMeasured without either.
    UserError as `read_local`."""
    copy = None if folder is None else read_local(folder, one.name, parts)
    if copy is not None:
        path, records = copy
        if path.is_file():
            whole = file_hash(path)
        else:
            whole = digest({str(one.relative_to(path)): file_hash(one) for one in _files(path)})
        return SetSource({"kind": "local", "path": str(path), "sha256": whole}, records)
    import datasets

    from capgap.corpus.names import hub_revision

    revision = None
    try:
        # one request, because the harness' loader would try again for most of a minute
        revision = hub_revision(one.hub, kind="dataset")
    except UserError as error:
        cached = Path(datasets.config.HF_DATASETS_CACHE) / one.hub.replace("/", "___").lower()
        if not cached.is_dir():
            where = "" if folder is None else f" in {folder}"
            cause = str(error).partition(": there is no file")[0]
            raise NotMeasured(f"no local copy{where}, and {cause}") from None
    return SetSource({"kind": "hub", "dataset": one.hub, "revision": revision})


def read_local(folder: Path, name: str, parts: Sequence[str]) -> tuple[Path, LocalSet] | None:
    """The path of a set's copy in the folder, and its records; None without a copy, which is NAME/
    or NAME.tar.xz (.tar.gz, .tgz, .tar.bz2, .tar).

    UserError for a copy that is not whole, that lacks one of the set's `parts`, or cannot be read.
    docs/evaluation.md has the files.
    """
    name = "bbh" if name == "bbh_cot" else name
    archives = (folder / f"{name}{ending}" for ending in ARCHIVES)
    copies = [path for path in archives if path.is_file()]
    if (folder / name).is_dir():
        copies = [folder / name]
    if not copies:
        return None
    path = copies[0]
    # files by their bare names, wherever in the copy they lie
    contents = {PurePosixPath(file).name: data for file, data in read_copy(path).items()}
    last = ""

    def text(file: str) -> str:
        """Of FILE.gz where there is one, else of FILE."""
        nonlocal last
        last = f"{file}.gz"
        if last in contents:
            return gzip.decompress(contents[last]).decode()
        last = file
        if file not in contents:
            raise UserError(f"the copy in {path} lacks {file}: get the whole set")
        return contents[file].decode()

    try:
        local = {part: READERS[name](text, part) for part in parts}
    except (LookupError, ValueError, TypeError, AttributeError, EOFError, OSError) as error:
        cause = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"the copy of {name} in {path} cannot be read: {last}: {cause}") from None
    for part, splits in local.items():
        for split, records in splits.items():
            if not records:
                where = f"{part}, {split}" if part else split
                raise UserError(f"the copy of {name} in {path} is empty ({where}): get it again")
    return path, local


def _files(folder: Path) -> list[Path]:
    """Those of a folder, at any depth."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def read_copy(path: Path) -> dict[str, bytes]:
    """The contents of all files of a folder or an archive, by their path inside; an archive is not
    unpacked. UserError for one that is damaged, or that `safe_members` refuses."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in _files(path)}
    try:
        with tarfile.open(path) as archive:
            return {name: file.read() for name, file in safe_members(archive)}
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        cause = first_line(error)
        raise UserError(f"cannot read the archive {path} ({cause}): get it again") from None


# Gets the text of a file by its bare name, and the part
Reader = Callable[[Callable[[str], str], str], Splits]


def _json_lines(fields: str, **files: str) -> Reader:
    """For a set in lines of JSON: the fields that are read, and the file of every split."""

    def read(text: Callable[[str], str], part: str) -> Splits:
        splits = {}
        for split, name in files.items():
            # not splitlines: it parts at characters that stand within texts too
            lines = filter(str.strip, text(name.format(part=part)).split("\n"))
            splits[split] = _only(map(json.loads, lines), fields)
        return splits

    return read


def _only(records: Iterable[dict[str, Any]], fields: str) -> Records:
    """KeyError for a record that lacks a field."""
    return [{field: record[field] for field in fields.split()} for record in records]


def _mmlu(text: Callable[[str], str], part: str) -> Splits:
    def record(question: str, *row: str) -> dict[str, Any]:
        answer = row[4]
        if answer not in (*"ABCD", *"0123"):
            raise ValueError(f"the answer {answer!r} is no choice")
        number = "ABCD".index(answer) if answer in "ABCD" else int(answer)
        return {"question": question, "choices": list(row[:4]), "answer": number}

    splits = {}
    for split in ("dev", "test"):
        table = list(csv.reader(io.StringIO(text(f"{part}_{split}.csv"))))
        # the first publication has no heading, and letters for answers
        has_heading = bool(table) and table[0][-1] == "answer"
        splits[split] = [record(*row) for row in table[has_heading:]]
    return splits


def _ceval(text: Callable[[str], str], part: str) -> Splits:
    splits = {}
    for split in ("dev", "val"):
        table = io.StringIO(text(f"{part}_{split}.csv").removeprefix("\ufeff"))
        splits[split] = _only(csv.DictReader(table), "question A B C D answer")
    return splits


def _drop(text: Callable[[str], str], part: str) -> Splits:
    """The first publication's form in that of the Hub."""

    def answer(given: dict[str, Any]) -> dict[str, Any]:
        date = given.get("date") or {}
        return {
            "number": str(given["number"]),
            "date": {field: date.get(field, "") for field in ("day", "month", "year")},
            "spans": list(given["spans"]),
        }

    def record(passage: dict[str, Any], pair: dict[str, Any]) -> dict[str, Any]:
        others = [answer(other) for other in pair.get("validated_answers", [])]
        return {
            "query_id": pair["query_id"],
            "passage": passage["passage"],
            "question": pair["question"],
            "answer": answer(pair["answer"]),
            "validated_answers": {
                field: [other[field] for other in others] for field in ("number", "date", "spans")
            },
        }

    return {
        split: [
            record(passage, pair)
            for passage in json.loads(text(f"drop_dataset_{file}.json")).values()
            for pair in passage["qa_pairs"]
        ]
        for split, file in (("train", "train"), ("validation", "dev"))
    }


def _bbh(text: Callable[[str], str], part: str) -> Splits:
    return {"test": _only(json.loads(text(f"{part}.json"))["examples"], "input target")}


def _piqa(text: Callable[[str], str], part: str) -> Splits:
    records = _json_lines("goal sol1 sol2", validation="valid.jsonl")(text, part)["validation"]
    labels = [int(label) for label in text("valid-labels.lst").split()]
    pairs = zip(records, labels, strict=True)
    return {"validation": [record | {"label": label} for record, label in pairs]}


READERS: dict[str, Reader] = {
    "mmlu": _mmlu,
    "ceval": _ceval,
    "drop": _drop,
    "humaneval": _json_lines("task_id prompt test entry_point", test="HumanEval.jsonl"),
    "bbh": _bbh,
    "gsm8k": _json_lines("question answer", train="train.jsonl", test="test.jsonl"),
    "blimp": _json_lines("sentence_good sentence_bad", train="{part}.jsonl"),
    "lambada": _json_lines("text", test="lambada_test.jsonl"),
    "piqa": _piqa,
}
