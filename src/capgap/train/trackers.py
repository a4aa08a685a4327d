"""Trackers: what a training step reports goes to TensorBoard, trackio or wandb too.

metrics.jsonl has everything without them; a tracker that fails is left alone and training goes on.
"""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from difflib import get_close_matches
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from capgap.artifact import write_text
from capgap.machine import install_command
from capgap.scrub import scrub
from capgap.stage import FieldError

PROJECT = "capgap"
LAST_LOGGED = "last_told_step"
# A network that is gone at the end must not hold a run that is done
FINISH_SECONDS = 60.0


class Run(NamedTuple):
    """What a tracker learns of a run, `folder` being its own. `continues`: an earlier process has
    logged steps, and `step` is the first that is logged now."""

    folder: Path
    name: str
    config: dict[str, Any]
    say: Callable[[str], None]
    step: int = 0
    continues: bool = False


class Tracker(NamedTuple):
    """Where the numbers of a run go: `log(values, step)` in order of steps; everything is written
    when `close()` returns."""

    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]


def _tensorboard(run: Run) -> Tracker:
    """Event files in the folder; `purge_step` hides what an earlier process logged of later
    steps."""
    from torch.utils.tensorboard import SummaryWriter

    purge_step = run.step if run.continues else None
    writer: Any = SummaryWriter(str(run.folder), purge_step=purge_step, flush_secs=10)
    if not run.continues:
        text = json.dumps({"run": run.name, **run.config}, indent=1)
        writer.add_text("config", f"```json\n{text}\n```", 0)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _trackio(run: Run) -> Tracker:
    """A local database in the folder, or wherever TRACKIO_DIR or TRACKIO_SPACE_ID say."""
    # read by the library once, when it is imported
    os.environ.setdefault("TRACKIO_DIR", str(run.folder.resolve()))
    import trackio

    if not os.environ.get("TRACKIO_SPACE_ID"):
        run.say(f"trackio: `TRACKIO_DIR={trackio.utils.TRACKIO_DIR} trackio show` shows the run")
    # what it prints would break into standard output, which is for answers
    with redirect_stdout(StringIO()):
        opened = trackio.init(
            project=PROJECT,
            name=run.name,
            config=run.config,
            resume="allow" if run.continues else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def close() -> None:
        with redirect_stdout(StringIO()):
            trackio.finish()

    return Tracker(opened.log, close)


def _wandb(run: Run) -> Tracker:
    """One run of wandb, the same id when it goes on; it learns no code, command line or host."""
    import wandb

    id_file = run.folder / "run_id"
    if not run.continues or not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12])
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        id=id_file.read_text().strip(),
        resume="allow" if run.continues and not _wandb_is_offline() else None,
        config=run.config,
        dir=str(run.folder),
        save_code=False,
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        ),
    )
    return Tracker(opened.log, opened.finish)


OPENERS = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}


class Trackers:
    """The trackers of one run; opened at its first step, closed at its end.

    `folder` holds what they write here, `config` what the run was asked for (secrets taken out).
    """

    def __init__(
        self,
        names: tuple[str, ...],
        folder: Path,
        run_name: str,
        config: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._names = names
        self._run = Run(folder, run_name, scrub(config), say)
        self._open: dict[str, Tracker] = {}
        self._logged: int | None = None

    def begin(self, step: int, logged: int | None) -> None:
        """`step` is the first that will be logged, `logged` the last that the process before
        logged: after a kill a run takes some steps again."""
        if self._names and logged is not None:
            # by any process: one that was killed early logged less than others
            path = self._run.folder / LAST_LOGGED
            logged = max(logged, int(path.read_text()) if path.exists() else 0)
            write_text(path, str(logged))
        self._logged = logged
        for name in dict.fromkeys(self._names):
            folder = self._run.folder / name
            run = self._run._replace(folder=folder, step=step, continues=logged is not None)
            self._guarded(name, self._begin, name, run)

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        values, step = _flat(line), line["step"]
        for name, tracker in list(self._open.items()):
            # TensorBoard forgets what is logged again; the others would have such a step twice
            if self._logged is None or step > self._logged or name == "tensorboard":
                self._guarded(name, tracker.log, values, step)

    def close(self) -> None:
        """At the end of the run."""
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.close)

    def _begin(self, name: str, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        self._open[name] = OPENERS[name](run)

    def _guarded(self, name: str, act: Callable[..., None], *arguments: Any) -> None:
        """An error of a tracker is said in one line and ends that tracker alone."""
        try:
            act(*arguments)
        # Whatever a library or its network raises: hours of training must not end for a picture
        except Exception as error:
            self._open.pop(name, None)
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._run.say(f"warning: {name} failed ({scrub(cause)}): training goes on without it")


def gather_trackers(names: tuple[str, ...], out: Path) -> None:
    """Of all runs of a folder, in this process and those that it starts; UserError as
    `check_trackers`."""
    check_trackers(names)
    if "trackio" in names:
        # the library takes one folder for all that a process tells it
        os.environ.setdefault("TRACKIO_DIR", str(out / "trackers" / "trackio"))


def check_trackers(names: tuple[str, ...]) -> None:
    """UserError before any work: an unknown name, a package that is not installed, no key."""
    for name in names:
        if name not in OPENERS:
            near = get_close_matches(name, OPENERS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"take {', '.join(OPENERS)}"
            raise FieldError("track", f"{name!r} is no tracker: {meant}")
        if find_spec(name) is None:
            raise FieldError("track", f"{name} needs it installed: `{install_command(name)}`")
    if "wandb" in names and not _wandb_can_start():
        how = "run `wandb login`, or set WANDB_MODE=offline to keep the run here"
        raise FieldError("track", f"wandb has no key: {how}")


def _flat(line: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a line by name: tokens_per_second, NAME/loss; what is null is left out."""
    values = {key: value for key, value in line.items() if key not in ("step", "students")}
    for student, report in line.get("students", {}).items():
        values |= {f"{student}/{key}": value for key, value in report.items()}
    return {key: value for key, value in values.items() if value is not None}


def _wandb_is_offline() -> bool:
    return os.environ.get("WANDB_MODE", "").lower() in ("offline", "dryrun", "disabled")


def _wandb_can_start() -> bool:
    """Offline, or with a key where wandb looks for one: it would ask the terminal otherwise."""
    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if _wandb_is_offline() or any(os.environ.get(key) for key in keys):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    return netrc.is_file() and host in netrc.read_text(errors="replace").split()
