"""Whether a sweep ends with the same records whatever happens to the cluster under it.

    python benchmarks/faults.py --times 20
    python benchmarks/faults.py --table

Ray is started here with nodes of one core. Every trial runs a tiny sweep on them, and does one of
FAULTS to it at a moment drawn for that trial. Its records must be those of an undisturbed run
without Ray, bit for bit. Trials that are in the results are not run again. It needs a C compiler:
one fault makes opening, renaming and making files fail in the output folder for 20 s.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from capgap.artifact import read_json, write_text
from capgap.records import read_records

RESULTS = Path("docs/results/faults.jsonl")
RECIPE = """
name = "tiny"
scoring_tokens = 512
baselines = "best"
[corpus]
source = "pydoc"
max_bytes = 200000
vocabulary = 300
window = 16
heldout_tokens = 1000
[teachers]
sizes = ["14k", "20k"]
tokens = 25600
[students]
sizes = ["8k"]
tokens = [51200]
[training]
batch_tokens = 256
[run]
device = "cpu"
checkpoint_seconds = 0.1
checkpoint_share = 0.9
"""
# a node that is gone is known to be in a second
SYSTEM = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 300}
# Showing the best student and drawing the report would take longer than all the rest
DRIVER = """
from capgap.cli import main
from capgap.sweep import runner

runner.best_of = lambda *_: None
runner.write_report = lambda out: out / "report.html"
main()
"""
TRIAL_SECONDS = 400.0
FAILING_SECONDS = 20.0
FAILING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int fails(const char *path) {
    const char *folder = getenv("FAILING_FOLDER"), *flag = getenv("FAILING_WHILE");
    return folder && flag && path && strstr(path, folder) && access(flag, F_OK) == 0;
}
#define REAL(name, type) static __typeof__(type) *real; \\
    if (!real) real = (__typeof__(type) *)dlsym(RTLD_NEXT, name)
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { \\
    va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
#define REFUSE(path, value) if (fails(path)) { errno = EIO; return value; }

#define OPEN(name) int name(const char *path, int flags, ...) { MODE REFUSE(path, -1) \\
    REAL(#name, int(const char *, int, ...)); return real(path, flags, mode); }
OPEN(open) OPEN(open64)
#define OPENAT(name) int name(int at, const char *path, int flags, ...) { MODE REFUSE(path, -1) \\
    REAL(#name, int(int, const char *, int, ...)); return real(at, path, flags, mode); }
OPENAT(openat) OPENAT(openat64)
#define FOPEN(name) FILE *name(const char *path, const char *how) { REFUSE(path, NULL) \\
    REAL(#name, FILE *(const char *, const char *)); return real(path, how); }
FOPEN(fopen) FOPEN(fopen64)
int rename(const char *from, const char *to) { REFUSE(to, -1)
    REAL("rename", int(const char *, const char *)); return real(from, to); }
int mkdir(const char *path, mode_t mode) { REFUSE(path, -1)
    REAL("mkdir", int(const char *, mode_t)); return real(path, mode); }
"""


class Nodes:
    """A cluster of nodes of one core, which trials share while it lasts."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": SYSTEM}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.others: list[Any] = []

    def be(self, number: int) -> None:
        """So many nodes in all."""
        while len(self.others) < number - 1:
            self.others.append(self.cluster.add_node(num_cpus=1))
        while len(self.others) > number - 1:
            self.cluster.remove_node(self.others.pop())

    def kill(self, node: Any) -> None:
        """With all that runs on it, as when a machine loses its power."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.Error):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)


class Trial:
    """An output folder, and a driver at work on it."""

    def __init__(self, folder: Path, seed: int, nodes: Nodes) -> None:
        self.out = folder / "out"
        self.log = folder / "log"
        self.recipe = folder / "recipe.toml"
        self.drawn = random.Random(seed)
        self.nodes = nodes
        self.driver: subprocess.Popen[bytes] | None = None
        self.drivers: list[subprocess.Popen[bytes]] = []

    def drive(self) -> "subprocess.Popen[bytes]":
        """Another driver, as a user starts it."""
        command = [
            sys.executable,
            "-m",
            "capgap",
            "sweep",
            str(self.recipe),
            "--out",
            str(self.out),
        ]
        environment = os.environ | {"RAY_ADDRESS": self.nodes.cluster.address}
        with self.log.open("a") as log:
            self.driver = subprocess.Popen(
                [*command, "--on", "ray"], env=environment, stdout=log, stderr=log
            )
        self.drivers.append(self.driver)
        return self.driver

    def wait(self) -> None:
        """Until the driver has done all."""
        assert self.driver is not None
        code = self.driver.wait(TRIAL_SECONDS)
        assert code == 0, f"the driver ended with {code}"

    def at_work(self) -> None:
        """Waits for a moment, drawn anew in every trial, while tasks are at work."""
        assert self.driver is not None
        pattern = self.drawn.choice(["llama-t*/*/manifest.json", "column-*/*/manifest.json"])
        deadline = time.monotonic() + TRIAL_SECONDS
        while not list((self.out / "work" / "checkpoints").glob(pattern)):
            assert self.driver.poll() is None, "the driver ended before the fault"
            assert time.monotonic() < deadline, f"no {pattern}"
            time.sleep(0.02)
        time.sleep(self.drawn.uniform(0, 2))

    def columns(self) -> list[psutil.Process]:
        """The processes that run tasks."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = process.cmdline()
                if "column" in line and str(self.out) in line:
                    found.append(process)
        return found

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        for process in self.columns():
            with suppress(psutil.Error):
                process.kill()


def node_killed(trial: Trial) -> None:
    """A node dies in the middle of its task; another comes."""
    trial.drive()
    trial.at_work()
    trial.nodes.kill(trial.nodes.others.pop())
    trial.nodes.be(2)


def head_killed(trial: Trial) -> None:
    """The machine with the head dies; a new cluster is begun, and the command given again."""
    driver = trial.drive()
    trial.at_work()
    trial.nodes.kill(trial.nodes.cluster.head_node)
    began = time.monotonic()
    while driver.poll() is None and time.monotonic() - began < TRIAL_SECONDS:
        time.sleep(0.1)
    assert driver.returncode == 2, f"the driver ended with {driver.returncode}"
    with suppress(Exception):
        trial.nodes.cluster.shutdown()
    trial.nodes.start()
    trial.nodes.be(2)
    trial.drive()


def driver_killed(trial: Trial) -> None:
    """The driver dies and is started again."""
    driver = trial.drive()
    trial.at_work()
    driver.kill()
    driver.wait()
    trial.drive()


def node_added(trial: Trial) -> None:
    """Another node comes to one that is at work."""
    trial.drive()
    trial.at_work()
    trial.nodes.be(2)


def memory_killed(trial: Trial) -> None:
    """The kernel kills a task's process, as it does where memory runs out."""
    trial.drive()
    trial.at_work()
    for process in trial.columns()[:1]:
        with suppress(psutil.Error):
            process.kill()


def storage_failing(trial: Trial) -> None:
    """Nothing can be opened, renamed or made in the output folder for 20 s (EIO)."""
    trial.drive()
    trial.at_work()
    flag = Path(os.environ["FAILING_WHILE"])
    flag.touch()
    time.sleep(FAILING_SECONDS)
    flag.unlink()


def two_drivers(trial: Trial) -> None:
    """A second driver comes into the folder; in every other trial the first one dies then."""
    first = trial.drive()
    trial.at_work()
    trial.drive()
    if trial.drawn.random() < 0.5:
        time.sleep(trial.drawn.uniform(0, 2))
        first.kill()
    assert first.wait(TRIAL_SECONDS) in (0, -signal.SIGKILL), f"the first ended {first.returncode}"


FAULTS: dict[str, Callable[[Trial], None]] = {
    one.__name__: one
    for one in (
        node_killed,
        driver_killed,
        node_added,
        memory_killed,
        two_drivers,
        head_killed,
        storage_failing,
    )
}


def results(out: Path) -> dict[str, Any]:
    return {
        record.id: (record.heldout, record.curve, record.after_cut, record.flops)
        for record in read_records(out)
    }


@contextmanager
def failing_storage(folder: Path, out: Path) -> Iterator[None]:
    """Processes started inside find what lies in `out` failing while a flag is there."""
    write_text(folder / "failing.c", FAILING)
    library = folder / "failing.so"
    words = ["gcc", "-shared", "-fPIC", "-o", str(library), str(folder / "failing.c"), "-ldl"]
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    asked = {"LD_PRELOAD": str(library), "FAILING_FOLDER": str(out)}
    asked["FAILING_WHILE"] = str(folder / "flag")
    os.environ.update(asked)
    try:
        yield
    finally:
        for name in asked:
            os.environ.pop(name)


def run(
    name: str, number: int, folder: Path, nodes: Nodes, whole: dict[str, Any]
) -> dict[str, Any]:
    """One trial, as a line of the results."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(folder / "recipe.toml", RECIPE)
    Path(os.environ["FAILING_WHILE"]).unlink(missing_ok=True)
    fault = FAULTS[name]
    nodes.be(1 if fault is node_added else 2)
    began = time.monotonic()
    found: dict[str, Any] = {"fault": name, "trial": number}
    trial = Trial(folder, number, nodes)
    try:
        fault(trial)
        trial.wait()
        attempts = read_json(trial.out / "sweep.json")["attempts"]
        same = results(trial.out) == whole
        found |= {"same": same, "attempts": [one["outcome"] for one in attempts]}
    except (AssertionError, subprocess.TimeoutExpired) as error:
        told = trial.log.read_text()[-1500:]
        late = f"no end in {TRIAL_SECONDS:g} s"
        why = late if isinstance(error, subprocess.TimeoutExpired) else error
        found |= {"same": False, "reason": f"{why}: {told}"}
    finally:
        trial.close()
    return found | {"seconds": round(time.monotonic() - began, 1)}


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| what happens | same records | median seconds | attempts that failed |"]
    rows.append("|---|---|---|---|")
    for name, fault in FAULTS.items():
        mine = [one for one in lines if one["fault"] == name]
        if mine:
            doc = str(fault.__doc__).rstrip(".")
            same = sum(one["same"] for one in mine)
            seconds = statistics.median(one["seconds"] for one in mine)
            failed = sum(len(one.get("attempts", [])) for one in mine)
            rows.append(f"| {doc} | {same} of {len(mine)} | {seconds:.0f} | {failed} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--fault", choices=FAULTS, action="append")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="of the code, for the record")
    parser.add_argument("--work", type=Path, default=Path("/tmp/capgap-faults"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    out = arguments.out
    lines = [json.loads(one) for one in out.read_text().splitlines()] if out.exists() else []
    if arguments.table:
        print(table(lines))
        return
    done = {(one["fault"], one["trial"]) for one in lines}
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    write_text(work / "recipe.toml", RECIPE)
    command = [sys.executable, "-m", "capgap", "sweep", str(work / "recipe.toml"), "--quiet"]
    subprocess.run([*command, "--out", str(work / "whole")], check=True, stdout=subprocess.DEVNULL)
    whole = results(work / "whole")
    left = [
        (name, number)
        for number in range(arguments.times)
        for name in arguments.fault or FAULTS
        if (name, number) not in done
    ]
    with failing_storage(work, work / "trial" / "out"):
        nodes = Nodes()
        for name, number in left:
            found = run(name, number, work / "trial", nodes, whole)
            found["commit"] = arguments.commit
            print(json.dumps(found), flush=True)
            with out.open("a") as stream:
                stream.write(json.dumps(found) + "\n")
        nodes.cluster.shutdown()


if __name__ == "__main__":
    main()
