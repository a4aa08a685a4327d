"""A sweep on the nodes of a Ray cluster is the sweep of one machine, whatever happens to them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from capgap.config import parse_recipe
from capgap.corpus.prepare import prepare_corpus
from capgap.errors import Interrupted, UserError
from capgap.leases import Leases
from capgap.records import read_records
from capgap.sweep.cells import Context
from capgap.sweep.memory import task_loops
from capgap.sweep.on_ray import RayNodes, _times
from capgap.sweep.plan import make_plan
from capgap.sweep.runner import _become_driver
from capgap.sweep.stages import Sweep
from test_bad_input import as_toml, use_own_workers
from test_corpus_prepare import make_document, write_documents

pytest.importorskip("ray", reason="capgap[ray] is not installed")


@pytest.fixture
def recipe(tiny_recipe, text_file, tmp_path):
    tiny_recipe["corpus"] |= {"source": str(text_file), "heldout_tokens": 500}
    tiny_recipe["teachers"] = {"sizes": ["14k", "20k"], "tokens": 25_600}
    tiny_recipe["students"] = {"sizes": ["8k"], "tokens": [38_400]}
    tiny_recipe["baselines"] = "best"
    tiny_recipe["run"] = {"checkpoint_seconds": 0.1, "checkpoint_share": 0.9, "device": "cpu"}
    path = tmp_path / "tiny.toml"
    path.write_text(as_toml(tiny_recipe))
    return path


NODES = """
import sys
from ray.cluster_utils import Cluster

# a node that is gone is known to be in a second
config = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 300}
labels = {"gpu-memory-gb": "24"}
head = {"num_cpus": 1, "include_dashboard": False, "_system_config": config, "labels": labels}
cluster = Cluster(initialize_head=True, head_node_args=head)
node = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(node, allow_graceful=False)
    node = cluster.add_node(num_cpus=1)
    print("replaced", flush=True)
cluster.shutdown()
"""


class Nodes:
    """Two nodes of one core in processes of their own; the first is the head."""

    def __init__(self):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODES],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            self.process.communicate()
            pytest.skip("Ray starts no cluster on this machine")

    def replace(self):
        """The second is killed, and another comes."""
        self.process.stdin.write("replace\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "replaced\n"


@pytest.fixture(scope="module")
def cluster():
    found = Nodes()
    yield found
    found.process.communicate()


# drawing the report would take longer than all the rest
DRIVER = """
from capgap.cli import main
from capgap.sweep import runner

runner.write_report = lambda out: out / "report.html"
main()
"""


def begin(recipe, out, cluster, log, *more):
    """The command, as a process of its own; its standard output is the answer alone, the rest goes
    to `log`."""
    command = [sys.executable, "-c", DRIVER, "sweep", recipe, "--out", out, "--on", "ray", *more]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    with log.open("w") as error:
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=error
        )


def results(out):
    return {
        record.id: (record.heldout, record.curve, record.after_cut, record.flops)
        for record in read_records(out)
    }


def wait_for(is_true, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert process.poll() is None, process.args
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nodes_and_drivers_come_and_go_and_the_records_are_the_same(
    recipe, tmp_path, monkeypatch, cluster
):
    whole, out = tmp_path / "whole", tmp_path / "nodes"
    use_own_workers(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr("capgap.sweep.runner.write_report", lambda out: out / "report.html")
        Sweep(recipe=str(recipe), out=whole).run()
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    driver = begin(recipe, out, cluster, logs[0])
    checkpoints = out / "work" / "checkpoints"
    # the driver is killed while two teachers are at work
    wait_for(lambda: len(list(checkpoints.glob("*/*/manifest.json"))) >= 2, driver)
    driver.kill()
    driver.communicate()
    # of two that come one waits; the other is stopped while a column is at work
    left = {log: begin(recipe, out, cluster, log, "--json") for log in logs[1:]}
    waits = f"another driver is at work in {out}"

    def waiting():
        return [log for log in left if waits in log.read_text()]

    def at_work():
        return {path: path.stat().st_mtime for path in checkpoints.glob("column-*/*/manifest.json")}

    for process in left.values():
        wait_for(lambda: waiting() and at_work(), process)
    (log,) = set(left) - set(waiting())
    process = left.pop(log)
    process.send_signal(signal.SIGINT)
    answer, _ = process.communicate(timeout=180)
    assert (process.returncode, answer) == (130, ""), log.read_text()
    assert "the same command continues" in log.read_text()
    # the one who waited takes over; a node goes while a column is at work again, another comes
    ((log, driver),) = left.items()
    before = at_work()
    wait_for(lambda: at_work().items() - before.items(), driver)
    cluster.replace()
    answer, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, log.read_text()
    found = json.loads(answer)
    assert found["best"] == json.loads((whole / "sweep.json").read_text())["best"]["cell"]
    assert results(out) == results(whole)
    # what was lost is in the record, where the node had a task
    attempts = json.loads((out / "sweep.json").read_text())["attempts"]
    assert all(one["outcome"] == "lost" for one in attempts)


def test_who_waits_for_another_driver_can_be_stopped(tmp_path):
    said = []
    folder = SimpleNamespace(context=SimpleNamespace(out=tmp_path))
    with Leases(tmp_path, stale=60) as mine, Leases(tmp_path, stale=60) as other:
        assert other.take("driver")
        with pytest.raises(Interrupted):
            _become_driver(mine, folder, said.append, lambda: True)
    assert said[0].startswith(f"another driver is at work in {tmp_path}")


def gpu_node(gb=None, kind=None, gpus=1.0):
    """As Ray tells of one."""
    labels = {"gpu-memory-gb": gb, "ray.io/accelerator-type": kind}
    return {
        "Alive": True,
        "NodeManagerHostname": f"node-{kind}-{gb}",
        "NodeID": f"id-{kind}-{gb}",
        "Resources": {"CPU": 8.0, "GPU": gpus, "memory": 1e12},
        "Labels": {name: value for name, value in labels.items() if value is not None},
    }


@pytest.fixture
def nodes(tiny_recipe, tmp_path, monkeypatch):
    """`nodes(found, device="auto", precision="bf16", **run)` is an engine of these nodes."""

    def engine(found, device="auto", precision="bf16", **run):
        recipe = parse_recipe(tiny_recipe | {"run": {"device": device} | run})
        training = recipe.training.model_copy(update={"precision": precision})
        monkeypatch.setattr("ray.nodes", lambda: found)
        return RayNodes(Context(recipe, tmp_path, "cpu", 1, training), "me")

    return engine


def test_a_task_that_no_node_can_ever_run_is_told(nodes):
    teacher = make_plan(nodes([]).context.recipe).teachers[0]

    def refused(engine):
        with pytest.raises(UserError) as error:
            engine.submit(teacher, None)
        return str(error.value)

    for resources, told in (
        ({"memory": 1e9}, r"needs 1.5\d*e\+09 memory, the largest has 1e\+09"),
        ({"CPU": 0.0}, "needs 1 CPU, the largest has 0"),
    ):
        node = gpu_node()
        node["Resources"] |= resources
        said = refused(nodes([node], device="cpu"))
        assert re.search(f"no node .* can run {teacher.id}: it {told}", said)
    two = nodes([gpu_node()], gpus_per_column=2)
    assert "needs 2 GPU, the largest has 1" in refused(two)
    assert re.search(
        r"needs 0\.00\d+ gpu-memory-gb, the largest has 0", refused(nodes([gpu_node("0")]))
    )
    assert "the label gpu-memory-gb of node-None-80GB: could not convert string" in refused(
        nodes([gpu_node("80GB")])
    )
    # on GPUs what a driver without one would decide holds for no node
    said = refused(nodes([gpu_node()], precision="fp32"))
    assert "say training.precision in the recipe" in said


def test_a_column_goes_where_its_cards_suffice(nodes, caplog, tmp_path):
    found = [gpu_node("24"), gpu_node("80"), gpu_node(), gpu_node("16", "T4")]
    engine = nodes(found, gpus_per_column=1)
    column = make_plan(engine.context.recipe).columns[0]
    (loop,) = task_loops(engine.context.recipe, column, "A100")
    assert engine._needs(column)["gpu-memory-gb"] == pytest.approx(loop.total / 1e9)
    needs = engine._needs() | {"gpu-memory-gb": 60.0}
    assert [_times(needs, node) for node in engine._nodes()] == [0, 1, 1, 0]
    assert "GPUs of node-T4-16 are left out: no bf16 (T4)" in caplog.text
    # the others are excluded
    asked = []
    engine.recipe = tmp_path
    engine.remote = SimpleNamespace(
        options=lambda **options: asked.append(options) or SimpleNamespace(remote=str)
    )
    engine.submit(column, None)
    assert asked[0]["label_selector"] == {"ray.io/node-id": "!in(id-T4-16)"}
    assert (asked[0]["num_gpus"], asked[0]["num_cpus"]) == (1, 1)
    # two cards a column: half of it on each
    shared = nodes(found, gpus_per_column=2)
    assert shared._needs(column)["GPU"] == 2
    assert shared._needs(column)["gpu-memory-gb"] < engine._needs(column)["gpu-memory-gb"]
    fp32 = nodes(found, precision="fp32", device="cuda")
    assert [node["GPU"] for node in fp32._nodes()] == [1, 1, 1, 1]


def on_cluster(cluster, code, *words, cwd=None):
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ray_itself_heeds_what_is_excluded(cluster):
    code = """
import json, ray
ray.init(log_to_driver=False)
unfit = [n["NodeID"] for n in ray.nodes() if n["Labels"].get("gpu-memory-gb") == "24"]
@ray.remote(num_cpus=1, label_selector={"ray.io/node-id": f"!in({','.join(unfit)})"})
def where():
    return ray.get_runtime_context().get_node_id()
found = ray.get([where.remote() for _ in range(6)])
print(json.dumps([len(unfit), any(one in unfit for one in found)]))
"""
    assert json.loads(on_cluster(cluster, code).splitlines()[-1]) == [1, False]


def test_a_corpus_is_the_same_on_a_cluster(cluster, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(4):
        write_documents(text / f"{number}.txt", [make_document(one) for one in range(30 + number)])
    whole = prepare_corpus(str(text), tmp_path / "whole", vocabulary=300, window=16)
    code = """
from capgap.cli import main
from capgap.corpus import chunks
chunks.CHUNK_BYTES = 1
main()
"""
    words = ["corpus", "text", "--out", "out", "--vocabulary", "300", "--on", "ray", "--json"]
    told = json.loads(on_cluster(cluster, code, *words, cwd=tmp_path))
    assert told["corpus_hash"] == whole.corpus_hash


def test_nodes_have_no_copies_of_what_lies_at_urls(tmp_path, monkeypatch, typed, text_file):
    monkeypatch.setenv("CAPGAP_CACHE", str(tmp_path / "cache"))
    answer = typed("corpus", text_file, "--out", f"file://{tmp_path}/a/corpus", "--on", "ray")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert "--on ray: all nodes read and write one disk, and a URL names none" in answer.err
