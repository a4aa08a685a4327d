"""Where an evaluation set comes from: a local copy, or the Hub. Imports no torch and no harness.

A copy's files become the records that the harness' tasks read.
"""

import csv
import gzip
import hashlib
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from capgap.archives import safe_members
from capgap.errors import UserError, first_line
from capgap.evaluate.sets import BenchmarkSet, NotMeasured

ARCHIVES = (".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".tar")
Records = list[dict[str, Any]]
# {split: records} of every part; the part of a set without parts is ""
LocalSet = dict[str, dict[str, Records]]


@dataclass(frozen=True)
class SetSource:
    """`about`: what the record tells of it; `local`: the records of a local copy, None for the
    Hub."""

    about: dict[str, Any]
    local: LocalSet | None = None


def find_source(one: BenchmarkSet, folder: Path | None, parts: Sequence[str]) -> SetSource:
    """The set's copy in the folder, or else its dataset on the Hub; NotMeasured without either.
    UserError as `read_local`."""
    copy = None if folder is None else read_local(folder, one.name, parts)
    if copy is not None:
        path, records = copy
        return SetSource({"kind": "local", "path": str(path), "sha256": _sha256(path)}, records)
    return _on_hub(one.hub, "" if folder is None else f" in {folder}")


def _on_hub(dataset: str, where: str) -> SetSource:
    """One request, because the harness' loader would try again for most of a minute."""
    import datasets

    from capgap.corpus.hub import hub_revision

    revision = None
    try:
        revision = hub_revision(dataset, kind="dataset")
    except UserError as error:
        cached = Path(datasets.config.HF_DATASETS_CACHE) / dataset.replace("/", "___").lower()
        if not cached.is_dir():
            cause = str(error).partition(": there is no file")[0]
            raise NotMeasured(f"no local copy{where}, and {cause}") from None
    return SetSource({"kind": "hub", "dataset": dataset, "revision": revision})


def _sha256(path: Path) -> str:
    """Of an archive, or of all files of a folder with their names."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    whole = hashlib.sha256()
    for one in sorted(path.rglob("*")):
        if one.is_file():
            whole.update(f"{one.relative_to(path)}\0{_sha256(one)}\n".encode())
    return whole.hexdigest()


def read_local(folder: Path, name: str, parts: Sequence[str]) -> tuple[Path, LocalSet] | None:
    """Where a set's copy lies in the folder, and its records; None without a copy, which is NAME/
    or NAME.tar.xz (.tar.gz, .tgz, .tar.bz2, .tar).

    UserError for a copy that is not whole, that lacks one of the set's `parts`, or cannot be read.
    docs/evaluation.md has the files.
    """
    kept_as = "bbh" if name == "bbh_cot" else name
    archives = [folder / f"{kept_as}{ending}" for ending in ARCHIVES]
    copies = [one for one in archives if one.is_file()]
    if (folder / kept_as).is_dir():
        copies = [folder / kept_as]
    if not copies:
        return None
    path = copies[0]
    files = _Files(path, read_copy(path))
    try:
        found = {part: READERS[kept_as](files, part) for part in parts}
    except (LookupError, ValueError, TypeError, AttributeError, EOFError, OSError) as error:
        cause = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"the copy of {kept_as} in {path} cannot be read: {files.last}: {cause}"
        ) from None
    for part, splits in found.items():
        for split, records in splits.items():
            if not records:
                where = f"{part}, {split}" if part else split
                raise UserError(f"the copy of {kept_as} in {path} is empty ({where}): get it again")
    return path, found


def read_copy(path: Path) -> dict[str, bytes]:
    """The contents of all files of a folder or an archive, by their path inside; an archive is not
    unpacked. UserError for one that is damaged, or that `capgap.archives.safe_members` refuses."""
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}
    try:
        with tarfile.open(path) as archive:
            return {name: file.read() for name, file in safe_members(archive)}
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        cause = first_line(error)
        raise UserError(f"cannot read the archive {path} ({cause}): get it again") from None


class _Files:
    """Files by their bare names, wherever in the copy they lie; the last one is told in errors."""

    def __init__(self, path: Path, contents: Mapping[str, bytes]) -> None:
        self.path = path
        self.last = ""
        self._contents = {PurePosixPath(name).name: data for name, data in contents.items()}

    def text(self, name: str) -> str:
        """Of NAME.gz where there is one, else of NAME; UserError where there is no such file."""
        self.last = f"{name}.gz"
        if self.last in self._contents:
            return gzip.decompress(self._contents[self.last]).decode()
        self.last = name
        if name not in self._contents:
            raise UserError(f"the copy in {self.path} lacks {name}: get the whole set")
        return self._contents[name].decode()


Reader = Callable[[_Files, str], dict[str, Records]]


def _json_lines(fields: str, **files_of: str) -> Reader:
    """Of a set in lines of JSON: the fields that are read, and the file of every split."""

    def read(files: _Files, part: str) -> dict[str, Records]:
        found = {}
        for split, name in files_of.items():
            # not splitlines: it parts at characters that stand within texts too
            lines = filter(str.strip, files.text(name.format(part=part)).split("\n"))
            found[split] = _kept(map(json.loads, lines), *fields.split())
        return found

    return read


def _kept(records: Iterable[dict[str, Any]], *fields: str) -> Records:
    """KeyError for a record that lacks a field."""
    return [{field: record[field] for field in fields} for record in records]


def _mmlu(files: _Files, part: str) -> dict[str, Records]:
    def rows(split: str) -> Records:
        table = list(csv.reader(io.StringIO(files.text(f"{part}_{split}.csv"))))
        # the first publication has no heading, and letters for answers
        if table and table[0][-1] == "answer":
            table = table[1:]
        return [
            {"question": row[0], "choices": row[1:5], "answer": _choice(row[5])} for row in table
        ]

    return {split: rows(split) for split in ("dev", "test")}


def _choice(answer: str) -> int:
    """0 to 3; ValueError for what is no choice."""
    if answer not in (*"ABCD", *"0123"):
        raise ValueError(f"the answer {answer!r} is no choice")
    return "ABCD".index(answer) if answer in "ABCD" else int(answer)


def _ceval(files: _Files, part: str) -> dict[str, Records]:
    def rows(split: str) -> Records:
        text = files.text(f"{part}_{split}.csv").removeprefix("\ufeff")
        table = list(csv.DictReader(io.StringIO(text)))
        return _kept(table, "question", "A", "B", "C", "D", "answer")

    return {split: rows(split) for split in ("dev", "val")}


def _drop(files: _Files, part: str) -> dict[str, Records]:
    return {
        "train": list(_drop_records(files.text("drop_dataset_train.json"))),
        "validation": list(_drop_records(files.text("drop_dataset_dev.json"))),
    }


def _drop_records(text: str) -> Iterator[dict[str, Any]]:
    """The first publication's form in that of the Hub."""
    for passage in json.loads(text).values():
        for pair in passage["qa_pairs"]:
            validated = [_drop_answer(one) for one in pair.get("validated_answers", [])]
            yield {
                "query_id": pair["query_id"],
                "passage": passage["passage"],
                "question": pair["question"],
                "answer": _drop_answer(pair["answer"]),
                "validated_answers": {
                    field: [one[field] for one in validated]
                    for field in ("number", "date", "spans")
                },
            }


def _drop_answer(answer: dict[str, Any]) -> dict[str, Any]:
    date = answer.get("date") or {}
    return {
        "number": str(answer["number"]),
        "date": {field: date.get(field, "") for field in ("day", "month", "year")},
        "spans": list(answer["spans"]),
    }


def _bbh(files: _Files, part: str) -> dict[str, Records]:
    return {"test": _kept(json.loads(files.text(f"{part}.json"))["examples"], "input", "target")}


def _piqa(files: _Files, part: str) -> dict[str, Records]:
    records = _json_lines("goal sol1 sol2", validation="valid.jsonl")(files, part)["validation"]
    labels = [int(label) for label in files.text("valid-labels.lst").split()]
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
