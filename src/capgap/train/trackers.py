"""Trackers: what a training step reports, also told to TensorBoard, trackio or wandb.

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
from typing import Any, Protocol
from urllib.parse import urlsplit

from capgap.errors import UserError
from capgap.scrub import scrub

NAMES = ("tensorboard", "trackio", "wandb")
PROJECT = "capgap"
# A network that is gone at the end must not hold a run that is done
FINISH_SECONDS = 60.0


class Tracker(Protocol):
    """Where the numbers of a run go, step by step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers after a step; steps come in order."""

    def close(self) -> None:
        """Everything is written when this returns."""


class Trackers:
    """The trackers of one run; opened at its first step, closed at its end.

    `folder` holds what they write here, `config` what the run was asked for (secrets taken out).
    An error of a tracker is said in one line and ends that tracker alone.
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
        self._folder = folder
        self._run_name = run_name
        self._config: dict[str, Any] = scrub(config)
        self._say = say
        self._open: dict[str, Tracker] = {}

    def begin(self, step: int, logged: int | None) -> None:
        """`step` is the first that will be told, `logged` the last that an earlier process told:
        after a kill a run takes some steps again."""
        for name in dict.fromkeys(self._names):
            self._guarded(name, self._begin, name, step, logged)

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        values = _flat(line)
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.log, values, line["step"])

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.close)

    def _begin(self, name: str, step: int, logged: int | None) -> None:
        openers: dict[str, Callable[..., Tracker]] = {
            "tensorboard": _TensorBoard,
            "trackio": _Trackio,
            "wandb": _Wandb,
        }
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        tracker = openers[name](folder, self._run_name, self._config, step, self._say)
        # TensorBoard forgets what is told again; the others would have such a step twice
        if logged is not None and not isinstance(tracker, _TensorBoard):
            tracker = _After(tracker, logged)
        self._open[name] = tracker

    def _guarded(self, name: str, act: Callable[..., None], *arguments: Any) -> None:
        try:
            act(*arguments)
        # Whatever a library or its network raises: hours of training must not end for a picture
        except Exception as error:
            self._open.pop(name, None)
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._say(f"warning: {name} failed ({scrub(cause)}): training goes on without it")


def check_trackers(names: tuple[str, ...]) -> None:
    """UserError before any work: an unknown name, a package that is not installed, no key."""
    for name in names:
        if name not in NAMES:
            near = get_close_matches(name, NAMES, n=1)
            meant = f"did you mean {near[0]}?" if near else f"take {', '.join(NAMES)}"
            raise UserError(f"no tracker is called {name!r}: {meant}")
        if find_spec(name) is None:
            raise UserError(f"--track {name} needs it installed: `pip install 'capgap[{name}]'`")
    if "wandb" in names and not _wandb_can_start(os.environ):
        raise UserError(
            "--track wandb has no key: run `wandb login`, or set WANDB_MODE=offline to keep the "
            "run here"
        )


def _flat(line: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a line by name: tokens_per_second, NAME/loss; what is null is left out."""
    students: dict[str, dict[str, float | None]] = line.get("students", {})
    values: dict[str, float | None] = {
        key: value for key, value in line.items() if key not in ("step", "students")
    }
    for student, report in students.items():
        values |= {f"{student}/{key}": value for key, value in report.items()}
    return {key: value for key, value in values.items() if value is not None}


class _After:
    """Passes on what comes after a step."""

    def __init__(self, tracker: Tracker, step: int) -> None:
        self._tracker = tracker
        self._step = step
        self.close = tracker.close

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step > self._step:
            self._tracker.log(values, step)


class _TensorBoard:
    """Event files in the folder; `purge_step` hides what an earlier process told of later steps."""

    def __init__(
        self, folder: Path, run_name: str, config: dict[str, Any], step: int, say: Any
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(folder), purge_step=step if step > 0 else None, flush_secs=10
        )
        if step == 0:
            text = json.dumps({"run": run_name, **config}, indent=1)
            self._writer.add_text("config", f"```json\n{text}\n```", 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """A local database in the folder, or wherever TRACKIO_DIR or TRACKIO_SPACE_ID say."""

    def __init__(
        self,
        folder: Path,
        run_name: str,
        config: dict[str, Any],
        step: int,
        say: Callable[[str], None],
    ) -> None:
        # read by the library once, when it is imported
        os.environ.setdefault("TRACKIO_DIR", str(folder.resolve()))
        import trackio

        if not os.environ.get("TRACKIO_SPACE_ID"):
            say(f"trackio: `TRACKIO_DIR={trackio.utils.TRACKIO_DIR} trackio show` shows the run")
        # what it prints would break into standard output, which is for answers
        with redirect_stdout(StringIO()):
            self._run = trackio.init(
                project=PROJECT,
                name=run_name,
                config=config,
                resume="allow" if step > 0 else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        import trackio

        with redirect_stdout(StringIO()):
            trackio.finish()


class _Wandb:
    """One run of wandb, the same id when it is resumed; no code, command line or host is told."""

    def __init__(
        self, folder: Path, run_name: str, config: dict[str, Any], step: int, say: Any
    ) -> None:
        import wandb

        id_file = folder / "run_id"
        if step == 0 or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_name,
            id=id_file.read_text().strip(),
            resume="allow" if step > 0 and not _is_offline(os.environ) else None,
            config=config,
            dir=str(folder),
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

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _is_offline(environment: Mapping[str, str]) -> bool:
    return environment.get("WANDB_MODE", "").lower() in ("offline", "dryrun", "disabled")


def _wandb_can_start(environment: Mapping[str, str]) -> bool:
    """Offline, or with a key where wandb looks for one: it would ask the terminal otherwise."""
    if _is_offline(environment) or environment.get("WANDB_API_KEY"):
        return True
    if environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    netrc = Path(environment.get("NETRC", "~/.netrc")).expanduser()
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    return netrc.is_file() and host in netrc.read_text(errors="replace").split()
