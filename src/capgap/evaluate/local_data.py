"""Local copies of the evaluation sets as the records that the harness' tasks read.

Imports no torch and no harness.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from capgap.errors import UserError
from capgap.evaluate.archive import find_copy, read_copy

Records = list[dict[str, Any]]
# {split: records} of every part; the part of a set without parts is ""
LocalSet = dict[str, dict[str, Records]]


def read_local(folder: Path, name: str, parts: Sequence[str]) -> tuple[Path, LocalSet] | None:
    """Where a set's copy lies in the folder, and its records; None without a copy.

    UserError for a copy that is not whole, that lacks one of the set's `parts`, or cannot be read.
    docs/evaluation.md has the files.
    """
    kept_as = "bbh" if name == "bbh_cot" else name
    path = find_copy(folder, kept_as)
    if path is None:
        return None
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


class _Files:
    """Files by their bare names, wherever in the copy they lie; the last one is told in errors."""

    def __init__(self, path: Path, contents: Mapping[str, bytes]) -> None:
        self.path = path
        self.last = ""
        self._contents = {PurePosixPath(name).name: data for name, data in contents.items()}

    def text(self, name: str) -> str:
        """UserError where there is no such file."""
        self.last = name
        if name not in self._contents:
            raise UserError(f"the copy in {self.path} lacks {name}: get the whole set")
        return self._contents[name].decode()

    def unzipped(self, name: str) -> str:
        """NAME.gz where there is one, else NAME."""
        self.last = f"{name}.gz"
        if self.last in self._contents:
            return gzip.decompress(self._contents[self.last]).decode()
        return self.text(name)


def _json_lines(text: str) -> Records:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _kept(records: Records, *fields: str) -> Records:
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


def _humaneval(files: _Files, part: str) -> dict[str, Records]:
    records = _json_lines(files.unzipped("HumanEval.jsonl"))
    return {"test": _kept(records, "task_id", "prompt", "test", "entry_point")}


def _bbh(files: _Files, part: str) -> dict[str, Records]:
    return {"test": _kept(json.loads(files.text(f"{part}.json"))["examples"], "input", "target")}


def _gsm8k(files: _Files, part: str) -> dict[str, Records]:
    return {
        split: _kept(_json_lines(files.text(f"{split}.jsonl")), "question", "answer")
        for split in ("train", "test")
    }


def _blimp(files: _Files, part: str) -> dict[str, Records]:
    pairs = _json_lines(files.text(f"{part}.jsonl"))
    return {"train": _kept(pairs, "sentence_good", "sentence_bad")}


def _lambada(files: _Files, part: str) -> dict[str, Records]:
    return {"test": _kept(_json_lines(files.text("lambada_test.jsonl")), "text")}


def _piqa(files: _Files, part: str) -> dict[str, Records]:
    records = _kept(_json_lines(files.text("valid.jsonl")), "goal", "sol1", "sol2")
    labels = [int(label) for label in files.text("valid-labels.lst").split()]
    pairs = zip(records, labels, strict=True)
    return {"validation": [record | {"label": label} for record, label in pairs]}


READERS: dict[str, Callable[[_Files, str], dict[str, Records]]] = {
    "mmlu": _mmlu,
    "ceval": _ceval,
    "drop": _drop,
    "humaneval": _humaneval,
    "bbh": _bbh,
    "gsm8k": _gsm8k,
    "blimp": _blimp,
    "lambada": _lambada,
    "piqa": _piqa,
}
