"""Inputs and outputs at URLs: the same results as on the local disk, whatever fails on the way."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from capgap import Distill, Prepare, Sweep, Train, mirror, storage
from capgap.errors import Interrupted, UserError
from capgap.leases import Leases
from capgap.mirror import Copy, local, mirrored
from capgap.storage import Store, Unreachable, as_urls, is_url, place
from test_bad_input import use_own_workers
from test_column import recipe as recipe
from test_column import results

needs_s3 = pytest.mark.skipif(
    not (find_spec("s3fs") and find_spec("moto")), reason="s3fs or moto is not installed"
)
needs_gs = pytest.mark.skipif(
    not (find_spec("gcsfs") and find_spec("gcp_storage_emulator")),
    reason="gcsfs or gcp-storage-emulator is not installed",
)
STORES = [
    "memory",
    "file",
    pytest.param("s3", marks=needs_s3),
    pytest.param("gs", marks=needs_gs),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPGAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "PATIENCE", 1.0)
    monkeypatch.setattr(storage, "PAUSES", (0.01, 0.1))
    monkeypatch.setattr(mirror, "SYNC_SECONDS", 0.1)
    monkeypatch.setattr(mirror, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(mirror, "LOOK_SECONDS", 0.02)


@pytest.fixture(scope="session")
def s3():
    """A server that speaks S3, with one bucket; what it gives stops it for a while."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    told = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")

        def pause(seconds):
            nonlocal server
            server.stop()
            time.sleep(seconds)
            server = ThreadedMotoServer(ip_address=host, port=port, verbose=False)
            server.start()

        yield pause
    server.stop()


@pytest.fixture(scope="session")
def gs():
    """A server that speaks as Google's store does, with one bucket."""
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import create_server

    def refusing(upload):
        """It knows of no preconditions; Google's store answers 412 where the file is there."""

        def call(request, response, storage):
            name = request.query.get("name") or [request.data["meta"]["name"]]
            if request.query.get("ifGenerationMatch") == ["0"]:
                with suppress(NotFound):
                    storage.get_file_obj(request.params["bucket_name"], *name)
                    response.status = HTTPStatus.PRECONDITION_FAILED
                    return
            upload(request, response, storage)

        return call

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host, port = server._api._httpd.server_address
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_multipart_upload", "_create_resumable_upload"):
            patch.setattr(objects, name, refusing(getattr(objects, name)))
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        # it would ask Google who we are
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield
    server.stop()


@pytest.fixture(params=STORES)
def url(request, tmp_path):
    """A folder that nobody has used."""
    if request.param in ("s3", "gs"):
        request.getfixturevalue(request.param)
    where = {"file": f"file://{tmp_path}/store"}.get(request.param, f"{request.param}://bucket")
    return f"{where}/{uuid.uuid4().hex}"


class Failing(MemoryFileSystem):
    """A store that answers nothing while `until` is not over."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    until = 0.0

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("failing://", "memory://"))

    def _checked(name):
        def call(self, *given, **how):
            if time.monotonic() < Failing.until:
                raise ConnectionError("the network is gone")
            return getattr(MemoryFileSystem, name)(self, *given, **how)

        return call

    find, get_file, put_file = map(_checked, ("find", "get_file", "put_file"))
    cat_file, pipe_file, rm_file = map(_checked, ("cat_file", "pipe_file", "rm_file"))


@pytest.fixture
def failing(monkeypatch):
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(storage, "EXCLUSIVE", (*storage.EXCLUSIVE, "failing"))
    Failing.store.clear()
    yield f"failing://bucket/{uuid.uuid4().hex}"
    Failing.until = 0.0


# --- stores ---------------------------------------------------------------------------------------


def test_what_is_a_url_and_where_its_copy_lies(tmp_path):
    assert [
        is_url(one) for one in ("s3://b/x", "/tmp/x", "org/model@main", "C:\\x", Path("/x"))
    ] == [
        True,
        *[False] * 4,
    ]
    for one in ("s3://bucket/run", "file:///tmp/run", "memory://bucket/run/deep"):
        for use in ("staged", "mirrors"):
            path = place(f"{one}/", use)
            assert path.is_relative_to(tmp_path / "cache")
            told = json.dumps({"at": f"{path}/student", "and": str(path)})
            assert json.loads(as_urls(told)) == {"at": f"{one}/student", "and": one}
    # what is removed takes nothing else along
    inner, outer = place("s3://b/models/x", "staged"), place("s3://b/models", "staged")
    assert not inner.is_relative_to(outer)
    for wrong in ("s3://bucket", "s3://b/../x"):
        with pytest.raises(UserError, match="give the folder's own URL"):
            place(wrong, "staged")


def test_files_of_a_store(url, tmp_path):
    store = Store(url)
    assert store.names() == {}
    store.write("a/b.json", b"one")
    store.write("c", b"other")
    assert {name: size for name, (size, _) in store.names().items()} == {"a/b.json": 3, "c": 5}
    assert list(store.names("a")) == ["a/b.json"]
    assert list(store.names("c")) == ["c"]
    assert list(Store(f"{url}/c").names()) == [""]
    before = store.names("c")["c"]
    store.write("c", b"third")
    assert store.names("c")["c"] != before
    store.fetch("c", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"third"
    assert store.put(tmp_path / "c", "d/e") == store.names("d")["d/e"]
    store.remove(["c", "d/e", "nothing"])
    assert list(store.names()) == ["a/b.json"]
    for wrong in (lambda: store.read("c"), lambda: store.put(tmp_path / "none", "c")):
        with pytest.raises(FileNotFoundError):
            wrong()


def test_of_sixteen_one_makes_the_file(url):
    stores = [Store(url) for _ in range(16)]
    begin, won = threading.Barrier(16), []

    def make(number: int) -> None:
        begin.wait()
        if stores[number].create("task/1", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert stores[0].read("task/1") == str(won[0]).encode()
    # whoever asks again, since the answer was lost, has made it
    assert stores[1].create("task/1", str(won[0]).encode())


def test_leases_in_a_store(url):
    now = [0.0]
    gone, other = (Leases(url, stale=10, clock=lambda: now[0]) for _ in range(2))
    assert gone.take("task")
    assert not other.take("task")
    now[0] = 11.0
    assert other.take("task")
    other.release("task")
    assert Leases(url, stale=10).take("task")


@needs_s3
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("s3://nowhere/x", "s3://nowhere/x: The specified bucket does not exist"),
        ("abfs://b/x", "abfs://b/x needs a package that is not installed"),
        ("nothing://b/x", "Protocol not known: nothing"),
        ("http://127.0.0.1:9/x", "does not keep two processes from making the same file"),
    ],
)
def test_a_store_that_is_none_is_told_in_a_line(wrong, told, s3, typed, text_file):
    answer = typed("corpus", text_file, "--out", wrong)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1), answer.err
    assert told in answer.err


def test_a_store_that_fails_for_a_moment_and_for_long(failing):
    store = Store(failing)
    store.write("a", b"x")
    Failing.until = time.monotonic() + 0.3
    assert store.read("a") == b"x"
    Failing.until = time.monotonic() + 60
    begin = time.monotonic()
    with pytest.raises(Unreachable, match=f"^{failing}: the network is gone$"):
        store.names()
    assert time.monotonic() - begin < 5


# --- what is read ---------------------------------------------------------------------------------


def staged(url):
    """As a process finds it that has just begun."""
    mirror._staged.cache_clear()
    return Path(local(url))


def test_what_is_read_is_fetched_once_and_checked(url, monkeypatch):
    store = Store(url)
    store.write("config.json", b"{}")
    store.write("model.safetensors", b"weights")
    fetched = []
    fetch = Store.fetch
    monkeypatch.setattr(
        Store, "fetch", lambda self, name, path: (fetched.append(name), fetch(self, name, path))
    )
    path = Path(local(url, light=True))
    assert [one.name for one in path.iterdir()] == ["config.json"]
    assert staged(url) == path
    assert (path / "model.safetensors").read_bytes() == b"weights"
    assert staged(url) == path
    assert len(fetched) == 2
    status = (path / "model.safetensors").stat()
    (path / "model.safetensors").write_bytes(b"Weights")
    os.utime(path / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert (staged(url) / "model.safetensors").read_bytes() == b"weights"
    store.write("config.json", b"[]")
    store.remove(["model.safetensors"])
    assert (staged(url) / "config.json").read_bytes() == b"[]"
    assert not (path / "model.safetensors").exists()
    with pytest.raises(UserError, match="there is nothing at"):
        local(f"{url}/none")


def test_the_least_recently_used_make_room(url, monkeypatch):
    monkeypatch.setenv("CAPGAP_CACHE_BYTES", "250")
    paths = []
    for name in ("a", "b", "c"):
        Store(f"{url}/{name}").write("file", bytes(100))
        paths.append(staged(f"{url}/{name}"))
        time.sleep(0.02)
    assert [path.exists() for path in paths] == [False, True, True]
    # what is in use stays
    Store(f"{url}/d").write("file", bytes(200))
    staged(f"{url}/b")
    local(f"{url}/d")
    assert [path.exists() for path in paths] == [False, True, False]


# --- what is written ------------------------------------------------------------------------------


def sent(url):
    store = Store(url)
    return {name: store.read(name) for name in store.names()}


def test_an_output_folder_is_sent_and_found_elsewhere(url, tmp_path, monkeypatch):
    out = place(url, "mirrors")
    with mirrored([url]):
        out.mkdir(parents=True)
        (out / "data").write_bytes(b"1")
        (out / ".data.tmp").write_bytes(b"half")
        deadline = time.monotonic() + 20
        while not Store(url).names():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (out / "gone").write_bytes(b"2")
        (out / "record.json").write_bytes(b"3")
    assert sent(url) == {"data": b"1", "gone": b"2", "record.json": b"3"}
    monkeypatch.setenv("CAPGAP_CACHE", str(tmp_path / "elsewhere"))
    other = place(url, "mirrors")
    with pytest.raises(KeyboardInterrupt), mirrored([url]):  # noqa: PT012
        assert {path.name for path in other.iterdir()} == {"data", "gone", "record.json"}
        (other / "gone").unlink()
        (other / "data").write_bytes(b"new")
        raise KeyboardInterrupt
    assert sent(url) == {"data": b"new", "record.json": b"3"}
    # the first machine goes on with what the other has made, not with its own rest
    monkeypatch.setenv("CAPGAP_CACHE", str(tmp_path / "cache"))
    (out / "rest").write_bytes(b"4")
    with mirrored([url]):
        assert {path.name for path in out.iterdir() if path.is_file()} >= {"data", "record.json"}
        assert not (out / "rest").exists()
        assert not (out / "gone").exists()
        assert (out / "data").read_bytes() == b"new"
    # what a killed process had not sent yet is, and what somebody cleared away comes back
    (out / "late").write_bytes(b"5")
    (out / "data").unlink()
    with mirrored([url]):
        assert (out / "data").read_bytes() == b"new"
    assert sent(url) == {"data": b"new", "record.json": b"3", "late": b"5"}


def test_two_write_into_one_folder(url):
    refused = pytest.raises(UserError, match=f"another process is at work in {url}")
    with mirrored([url]), refused, mirrored([url]):
        pass


def test_work_goes_on_while_a_store_fails(failing, capsys):
    out = place(failing, "mirrors")
    with mirrored([failing]):
        out.mkdir(parents=True)
        Failing.until = time.monotonic() + 0.5
        (out / "data").write_bytes(b"1")
        time.sleep(0.4)
    assert sent(failing) == {"data": b"1"}
    refused = pytest.raises(Unreachable, match=f"{failing}: the network is gone")
    with refused, mirrored([failing]):
        (out / "data").write_bytes(b"2")
        Failing.until = time.monotonic() + 60
    Failing.until = 0.0
    with mirrored([failing]):
        pass
    assert sent(failing) == {"data": b"2"}


def test_a_store_that_stays_away_ends_a_command_in_a_line(failing, typed, text_file):
    Failing.until = time.monotonic() + 60
    answer = typed("corpus", text_file, "--out", failing, "--vocabulary", 300)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err == f"capgap: {failing}: the network is gone\n"


# --- stages ---------------------------------------------------------------------------------------


TRAINING = {"batch_tokens": 256}


def stages(where, text, tokens, stop=lambda: False):
    """A corpus, a teacher, and a student that learns from it; all that the last one says."""
    given = {"corpus": [f"{where}/corpus"], "window": 16, "training": TRAINING}
    given["run"] = {"device": "cpu", "checkpoint_seconds": 0, "checkpoint_share": 0.9}
    limits = {"vocabulary": 300}
    Prepare(source=text, out=f"{where}/corpus", **limits).run()
    for size in ("20k", "8k"):
        Train(size=size, tokens=1024, out=f"{where}/{size}", **given).run()
    teacher, student = (f"{where}/{size}/models/llama-{size}" for size in ("20k", "8k"))
    return Distill(
        teacher=teacher,
        students=[student],
        tokens=tokens,
        out=f"{where}/distilled",
        **given,
    ).run(should_stop=stop)


@needs_s3
def test_stages_at_urls_are_those_on_the_disk(s3, text_file, tmp_path, monkeypatch):
    at = f"s3://bucket/{uuid.uuid4().hex}"
    Store(f"{at}/texts").put(text_file, text_file.name)
    on_disk = stages(tmp_path, str(text_file.parent), 5120)
    stops = itertools.chain([False] * 6, itertools.repeat(True))
    with pytest.raises(Interrupted):
        stages(at, f"{at}/texts", 5120, stops.__next__)
    # of the last checkpoint a part was not sent
    store = Store(f"{at}/distilled")
    manifests = sorted(name for name in store.names() if name.endswith("/manifest.json"))
    assert len(manifests) > 1
    store.remove(manifests[-1:])
    # another machine
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("CAPGAP_CACHE", str(tmp_path / "elsewhere"))
    at_url = stages(at, f"{at}/texts", 5120)
    for name, before in on_disk["after"].items():
        found = at_url["after"][name]
        assert (found["heldout"], found["curve"]) == (before["heldout"], before["curve"])
    in_store = sent(f"{at}/distilled")
    for path in (tmp_path / "distilled").rglob("*.safetensors"):
        assert in_store[str(path.relative_to(tmp_path / "distilled"))] == path.read_bytes()
    record = json.loads(in_store["distill.json"])
    assert record["after"]["llama-8k"]["folder"] == f"{at}/distilled/students/llama-8k"
    assert str(tmp_path) not in in_store["distill.json"].decode()
    assert [name for name in in_store if "checkpoints" in name] == []


@needs_s3
def test_two_workers_on_a_store_are_the_sweep(s3, recipe, tmp_path, monkeypatch):
    use_own_workers(monkeypatch)
    Sweep(recipe=str(recipe), out=tmp_path / "whole").run()
    at = f"s3://bucket/{uuid.uuid4().hex}/out"
    words = ["sweep", recipe, "--out", at, "--worker", "--set", "run.workers=1"]
    logs, processes = [tmp_path / name for name in ("one.log", "two.log")], []
    for log in logs:
        # as another machine has it
        own = os.environ | {"CAPGAP_CACHE": str(tmp_path / log.stem)}
        with log.open("w") as told:
            command = [sys.executable, "-m", "capgap", *words]
            processes.append(subprocess.Popen(command, stdout=told, stderr=told, env=own))
    deadline = time.monotonic() + 180
    while any("start " not in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    s3(20)
    for log, process in zip(logs, processes, strict=True):
        assert process.wait(timeout=400) == 0, log.read_text()
    assert all("start " in log.read_text() for log in logs)
    monkeypatch.setenv("CAPGAP_CACHE", str(tmp_path / "third"))
    copy = Copy(at, "mirrors")
    copy.pull()
    assert results(copy.path) == results(tmp_path / "whole")
    assert (copy.path / "report.html").exists()
    for name in ("students", "checkpoints", "sessions"):
        assert not any((copy.path / "work" / name).glob("*"))
    assert str(tmp_path) not in (copy.path / "sweep.json").read_text()
