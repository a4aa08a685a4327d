"""What the tool writes is whole, belongs to one process, and is checked when it is read again."""

import json
import os
import subprocess
import sys
import threading

import pytest

from capgap.artifact import (
    Damaged,
    InUse,
    begun,
    check_empty,
    difference,
    digest,
    file_hash,
    file_written,
    folder_written,
    locked,
    locked_file,
    read_json,
    write_json,
)
from capgap.errors import UserError


def test_json_comes_back_without_its_checksum(tmp_path):
    value = {"schema": 3, "numbers": [1.5, None, 1e-300], "text": "über\u2028"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", schema=3) == value
    held = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert held == value | {"checksum": digest(value)}
    with pytest.raises(Damaged, match="schema 3, this one reads 4"):
        read_json(tmp_path / "a.json", schema=4)


def test_any_byte_that_changes_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "a.json"
    value = {"schema": 1, "asked": {"seed": 12, "rates": [0.25, 1e-4]}, "finished": False}
    write_json(path, value)
    whole = path.read_bytes()
    noticed = 0
    for place in range(len(whole)):
        for bit in (0, 3, 6):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                found = read_json(path)
            except Damaged:
                noticed += 1
            else:
                # another key than `checksum` holds the checksum, or a blank is another blank
                assert {key: found[key] for key in value} == value
    assert noticed > 2.5 * len(whole)


@pytest.mark.parametrize("text", ["", "null", "[]", "[" * 100_000, '"a"', "\xff", "{", '{"a": NaN'])
def test_what_is_no_json_object_is_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(Damaged, match="is damaged"):
        read_json(path)


def test_keys_that_must_be_there_are_checked_where_there_is_no_checksum(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"schema": 1, "asked": null}')
    with pytest.raises(Damaged, match="no 'asked'"):
        read_json(path, schema=1, asked=dict)


def test_the_first_difference_is_told_by_its_whole_key():
    there = {"seed": 1, "training": {"steps": 5}, "gone": 2}
    here = {"seed": 1, "training": {"steps": 6}}
    assert difference(there, here) == "training.steps is 6, was 5"
    assert difference({"gone": 2}, {}) == "gone is not given, was 2"
    assert difference(here, dict(reversed(here.items()))) is None


def begin(record, asked):
    with begun(record, asked) as found:
        return found


def test_a_run_goes_on_only_with_what_it_was_asked_for(tmp_path):
    record = tmp_path / "run" / "record.json"
    asked = {"seed": 1, "path": tmp_path}
    assert begin(record, asked) == begin(record, asked)
    with pytest.raises(UserError, match=r"holds another run \(seed is 2, was 1"):
        begin(record, asked | {"seed": 2})
    with begun(record, asked), pytest.raises(InUse, match="another process is at work"):
        begin(record, asked)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        begin(tmp_path / "other" / "record.json", {})
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="holds something else"):
        check_empty(tmp_path / "other" / "mine.txt")


def test_a_file_or_folder_is_there_whole_or_not_at_all(tmp_path):
    def write_half(kind):
        with kind(tmp_path / "made") as aside:
            (aside if kind is file_written else aside / "file").write_text("half")
            raise ZeroDivisionError

    for kind in (file_written, folder_written):
        with pytest.raises(ZeroDivisionError):
            write_half(kind)
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with folder_written(tmp_path / "folder") as partial:
            (partial / text).touch()
        assert [path.name for path in (tmp_path / "folder").iterdir()] == [text]
    # what a process that was killed left
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".folder.partial" / "leftover").touch()
    with folder_written(tmp_path / "folder") as partial:
        assert list(partial.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("lock", [locked, locked_file, folder_written])
def test_one_of_several_works_and_the_others_say_so(tmp_path, lock):
    made = tmp_path / "made"
    with lock(made), pytest.raises(InUse, match="another process"), lock(made):
        raise AssertionError("two at once")
    with lock(made):
        pass


def test_many_at_once_write_one_folder(tmp_path):
    outcomes = []

    def write(number: int) -> None:
        try:
            with folder_written(tmp_path / "made") as partial:
                for name in ("a", "b"):
                    (partial / name).write_text(str(number))
            outcomes.append("written")
        except InUse:
            outcomes.append("in use")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 16
    assert "written" in outcomes
    texts = {path.read_text() for path in (tmp_path / "made").iterdir()}
    assert len(texts) == 1


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import os; from pathlib import Path; from capgap.artifact import locked_file\n"
        f"with locked_file(Path({str(tmp_path / 'file')!r})): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with locked_file(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_hashed_again_when_it_changes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = file_hash(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert file_hash(path) != first
    with pytest.raises(UserError, match="cannot read"):
        file_hash(tmp_path / "none")
