"""Evaluation sets that tests make up, in the files that their publishers have."""

import csv
import gzip
import io
import json
import random
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capgap.evaluate.harness import part_names
from capgap.evaluate.sets import SETS
from conftest import WORDS

CHOOSER = random.Random(5)


def words(count: int) -> str:
    return " ".join(CHOOSER.choice(WORDS) for _ in range(count))


def table(heading: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([heading, *rows] if heading else rows)
    return text.getvalue()


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def mmlu_rows(count: int) -> list[list[Any]]:
    return [[words(3), *(words(1) for _ in range(4)), place % 4] for place in range(count)]


def drop_passages(count: int) -> dict[str, Any]:
    def pair(place: int, answer: dict[str, Any]) -> dict[str, Any]:
        return {"query_id": str(place), "question": words(3), "answer": answer}

    no_date = {"day": "", "month": "", "year": ""}
    answers = [
        {"number": "3", "date": no_date, "spans": []},
        {"number": "", "date": no_date, "spans": ["lo"]},
        {"number": "", "date": {"day": "1", "month": "May", "year": ""}, "spans": []},
    ]
    return {
        f"passage{place}": {
            "passage": words(6),
            "qa_pairs": [
                pair(place, answers[place % 3]) | {"validated_answers": [answers[0]]},
                pair(place + 100, answers[0]),
            ],
        }
        for place in range(count)
    }


def files_of(name: str) -> dict[str, str | bytes]:
    """Two questions of every part, or a few of a set without parts."""
    parts = part_names(SETS[name])
    letters = [[0, words(3), *(words(1) for _ in range(4)), "ABCD"[n % 4], ""] for n in range(7)]
    ceval = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    mmlu = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
    if name == "mmlu":
        return {
            f"data/mmlu/{split}/{part}_{split}.csv": table(mmlu, mmlu_rows(count))
            for part in parts
            for split, count in (("dev", 5), ("test", 2))
        }
    if name == "ceval":
        return {
            f"{split}/{part}_{split}.csv": table(ceval, letters[:count])
            for part in parts
            for split, count in (("dev", 5), ("val", 2))
        }
    if name == "bbh":
        examples = {"examples": [{"input": words(4), "target": words(1)} for _ in range(2)]}
        return {f"bbh/{part}.json": json.dumps(examples) for part in parts}
    if name == "blimp":
        pairs = [{"sentence_good": words(5) + ".", "sentence_bad": words(5) + "."} for _ in "ab"]
        return {f"data/{part}.jsonl": lines(pairs) for part in parts}
    if name == "drop":
        passages = {"train": 6, "dev": 3}
        return {
            f"drop_dataset_{split}.json": json.dumps(drop_passages(count))
            for split, count in passages.items()
        }
    if name == "gsm8k":
        sums = [{"question": words(4), "answer": f"{words(3)} #### {n}"} for n in range(12)]
        return {
            f"school/{split}.jsonl": lines(sums[:n]) for split, n in (("train", 12), ("test", 3))
        }
    if name == "humaneval":
        tasks = [
            {
                "task_id": f"HumanEval/{place}",
                "prompt": f'def add{place}(a, b):\n    """Adds."""\n',
                "entry_point": f"add{place}",
                "canonical_solution": "    return a + b\n",
                "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
            }
            for place in range(2)
        ]
        return {"data/HumanEval.jsonl.gz": gzip.compress(lines(tasks).encode())}
    if name == "piqa":
        goals = [{"goal": words(4), "sol1": words(3), "sol2": words(6)} for _ in range(8)]
        return {"valid.jsonl": lines(goals), "valid-labels.lst": "0\n1\n" * 4}
    assert name == "lambada"
    return {"lambada_test.jsonl": lines([{"text": words(9)} for _ in range(8)])}


def write_archive(path: Path, files: Mapping[str, str | bytes]) -> Path:
    with tarfile.open(path, "w:xz" if path.suffix == ".xz" else "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_folder(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder
