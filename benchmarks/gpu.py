"""capgap on a card, piece by piece: each measurement is a process, and is written when it is done.

    python benchmarks/gpu.py --missing --budget 420
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --toy --device cpu

FOLDER/CARD/NAME.json has an entry for every commit: versions, driver, command, figures, or the
traceback. Runs from a checkout that is not installed.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# also of the processes that are started from here
for place in (ROOT / "benchmarks", ROOT / "src"):
    sys.path.insert(0, str(place))

from card import MEASUREMENTS, DoesNotFit, Measurement, Place  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "gpu"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by benchmarks/gpu.py --table -->\n", "<!-- end of what is made -->\n"
LIMIT_SECONDS = 90.0
LACKING = "not installed"
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "triton")
# Where a process begins with everything imported and no context of CUDA
PRELOADED = ("card.steps", "card.losses", "card.repairs")


def about_machine(place: Place) -> dict[str, Any]:
    """The card or processor by name; takes a context of CUDA."""
    import torch

    from capgap.machine import machine

    described = {**machine(place.device, torch.get_num_threads()), "cuda": torch.version.cuda}
    if place.is_gpu:
        torch.zeros(1, device=place.device)
        properties = torch.cuda.get_device_properties(place.device)
        described |= {"memory_gb": properties.total_memory / 1e9, "driver": driver()}
    return described


def driver() -> str | None:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        return None


def child(one: Measurement | None, place: Place, log: str, told: Connection) -> None:
    """Measures, or looks at the machine, with all that libraries print in the log."""
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        if place.is_toy:
            import torch

            # beside other tests
            torch.set_num_threads(1)
        figures = about_machine(place) if one is None else one.run(place)
        told.send({"figures": figures})
    except DoesNotFit as error:
        told.send({"skipped": str(error)})
    # whatever a library raises is written down, and the next measurement goes on
    except BaseException:
        told.send({"failure": traceback.format_exc()})


def measured(context: BaseContext, one: Measurement | None, place: Place) -> dict[str, Any]:
    """`figures`, or `failure`, of a process of its own that has its `limit`, or LIMIT_SECONDS."""
    limit = (one and one.limit) or LIMIT_SECONDS
    mine, its = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = context.Process(target=child, args=(one, place, str(log), its))
        process.start()
        its.close()
        found: dict[str, Any]
        try:
            if mine.poll(limit):
                found = mine.recv()
            else:
                found = {"failure": f"not done after {limit:.0f} s"}
        except EOFError:
            process.join()
            found = {"failure": f"the process ended with exit code {process.exitcode}"}
        process.kill()
        process.join()
        if "failure" in found and log.exists():
            found["log"] = log.read_text(errors="replace")[-2000:]
    return found


def start(place: Place) -> tuple[BaseContext, dict[str, Any]]:
    """How processes are begun, and the machine as one of them finds it."""
    # without it, asking whether there is a GPU would spoil every process that is forked later
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    found: dict[str, Any] = {}
    for method in ("forkserver", "spawn"):
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(list(PRELOADED))
        found = measured(context, None, place)
        if "figures" in found:
            return context, found["figures"]
    cause = found["failure"].strip().splitlines()[-1]
    raise SystemExit(f"no measurement can run on {place.device}: {cause}")


def code_hash(sources: Sequence[str]) -> str:
    """Of the content of these files and folders."""
    digest = hashlib.sha256()
    for source in sources:
        top = ROOT / source
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """Of the checkout, `unknown` where git cannot tell; + where files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        found = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks")
    except OSError:
        return "unknown"
    return found + ("+" if changed else "") if found else "unknown"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def entries(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def add_entry(path: Path, entry: dict[str, Any]) -> None:
    """In the place of an earlier one of the same commit; the last is the newest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [one for one in entries(path) if one["commit"] != entry["commit"]]
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps([*kept, entry], indent=1) + "\n")
    os.replace(aside, path)


def lacking(one: Measurement) -> str | None:
    """The packages that it needs and that are not here."""
    missing = [package for package in one.packages if find_spec(package) is None]
    return f"{LACKING}: {', '.join(missing)}" if missing else None


def is_missing(one: Measurement, folder: Path) -> bool:
    """Without a result on this card, failed, or older than the code that it measures."""
    found = entries(folder / f"{one.name}.json")
    if not found:
        return True
    last = found[-1]
    if last.get("skipped", "").startswith(LACKING):
        return lacking(one) is None
    return "failure" in last or last["code"] != code_hash(one.sources)


def expected_seconds(one: Measurement, folder: Path) -> float:
    """What it took here the last time, else what it says of itself."""
    found = [entry["seconds"] for entry in entries(folder / f"{one.name}.json")]
    return found[-1] if found else one.seconds


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def tell(line: str) -> None:
    print(line, flush=True)


def run(wanted: Sequence[Measurement], arguments: argparse.Namespace, began: float) -> int:
    """Measures what fits into the budget; returns how many failed."""
    device = arguments.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = Place(device, arguments.toy)
    context, machine = start(place)
    name = machine.get("gpu", f"cpu {machine['cpu']}")
    folder = arguments.out / (f"toy-{slug(name)}" if place.is_toy else slug(name))
    tell(f"{name}: {len(wanted)} measurements, results in {folder}")
    shared = {
        "commit": arguments.commit or commit(),
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "machine": machine,
        "versions": versions(),
    }
    failed = 0
    if arguments.missing:
        # what nobody has measured there comes first
        wanted = sorted(wanted, key=lambda one: bool(entries(folder / f"{one.name}.json")))
    for one in wanted:
        if arguments.missing and not is_missing(one, folder):
            tell(f"{one.name}: as it was")
            continue
        left = arguments.budget - (time.monotonic() - began)
        if expected_seconds(one, folder) > left:
            tell(f"{one.name}: not begun, {left:.0f} s are left")
            continue
        started = time.monotonic()
        why = lacking(one)
        found = {"skipped": why} if why else measured(context, one, place)
        seconds = round(time.monotonic() - started, 1)
        entry = {**shared, "code": code_hash(one.sources), "seconds": seconds, **found}
        add_entry(folder / f"{one.name}.json", entry)
        failed += "failure" in found
        tell(f"{one.name}: {seconds:.0f} s, {summary(one, found)}")
    return failed


def summary(one: Measurement, found: dict[str, Any]) -> str:
    """In one line."""
    if "failure" in found:
        return f"FAILED: {found['failure'].strip().splitlines()[-1]}"
    if "skipped" in found:
        return f"skipped, {found['skipped']}"
    return "; ".join(f"{key} {shown(value)}" for key, value in told(one, found["figures"]).items())


def told(one: Measurement, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures that a table has."""
    names = one.told or tuple(figures)
    kept = {name: figures.get(name) for name in names}
    return {name: value for name, value in kept.items() if not isinstance(value, list | dict)}


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(results: Path) -> str:
    """The section of docs/benchmarks.md, from the files."""
    cards = sorted(path for path in results.glob("*") if path.is_dir())
    found = {
        (one.name, card.name): entries(card / f"{one.name}.json")[-1:]
        for one in MEASUREMENTS
        for card in cards
    }
    # a column of its own for what nobody has measured
    gpus = [card.name for card in cards if not card.name.startswith("cpu")] or ["a GPU"]
    columns = [*gpus, *(card.name for card in cards if card.name.startswith("cpu"))]
    lines = [f"| measurement | figure | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for one in MEASUREMENTS:
        last = {name: found.get((one.name, name), []) for name in columns}
        figures = {
            name: told(one, entry[0]["figures"])
            for name, entry in last.items()
            if entry and "figures" in entry[0]
        }
        keys = list(dict.fromkeys(key for values in figures.values() for key in values)) or [""]
        for key in keys:
            cells = [_cell(last[name], figures.get(name), key) for name in columns]
            title = one.title if key == keys[0] else ""
            lines.append(f"| {title} | {key} | {' | '.join(cells)} |")
    seen = sorted({_described(entry[0]) for entry in found.values() if entry})
    return "\n".join([*lines, "", *seen]).rstrip() + "\n"


def _cell(last: list[dict[str, Any]], figures: dict[str, Any] | None, key: str) -> str:
    if not last:
        return "not measured"
    if figures is None:
        return "failed" if "failure" in last[0] else last[0]["skipped"]
    return shown(figures[key]) if key in figures else "-"


def _described(entry: dict[str, Any]) -> str:
    machine, libraries = entry["machine"], entry["versions"]
    name = machine.get("gpu", machine["cpu"])
    kept = {key: libraries[key] for key in ("python", "torch", "transformers") if key in libraries}
    driven = f", driver {machine['driver']}" if machine.get("driver") else ""
    told = ", ".join(f"{key} {value}" for key, value in kept.items())
    return f"- {name}{driven}, {told}, {entry['date']}, commit {entry['commit']}"


def write_table(page: Path, results: Path) -> None:
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + BEGIN + table(results) + END + after)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="names, titles and seconds")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument(
        "--missing",
        action="store_true",
        help="without a result on this card, failed, or older than the code that they measure",
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds; none begins that would not fit"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="write docs/benchmarks.md's section")
    parser.add_argument(
        "--toy", action="store_true", help="small sizes, to see that all of it runs"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--commit", help="what the results are of, where git cannot tell")
    arguments = parser.parse_args(given)
    known = [one.name for one in MEASUREMENTS]
    unknown = [name for name in arguments.only or [] if name not in known]
    if unknown:
        parser.error(f"--only {unknown[0]}: take some of {', '.join(known)}")
    if arguments.toy and arguments.out == RESULTS:
        parser.error("--toy measures nothing: give it an --out of its own")
    return arguments


def main() -> None:
    began = time.monotonic()
    arguments = parse_arguments()
    wanted = [one for one in MEASUREMENTS if not arguments.only or one.name in arguments.only]
    if arguments.list:
        for one in wanted:
            tell(f"{one.name:20} {one.seconds:3} s  {one.title}")
    elif arguments.table:
        write_table(PAGE, arguments.out)
    else:
        raise SystemExit(1 if run(wanted, arguments, began) else 0)


if __name__ == "__main__":
    main()
