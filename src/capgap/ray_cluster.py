"""A connection to a Ray cluster (extra `capgap[ray]`), without its noise."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from capgap.machine import install_command, usable_cores
from capgap.stage import FieldError


def check_installed() -> None:
    """UserError without Ray."""
    if find_spec("ray") is None:
        raise FieldError("on", f"ray needs it installed: `{install_command('ray')}`")


@contextmanager
def connected() -> Iterator[str]:
    """The cluster that RAY_ADDRESS or this machine knows, else one that is started here; gives the
    address of its head."""
    check_installed()
    import ray

    with ExitStack() as stack:
        stack.enter_context(_standard_output_to_nobody())
        quiet: Any = {"log_to_driver": False, "logging_level": "error"}
        if not ray.is_initialized():
            try:
                ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
            except ConnectionError:
                ray.init(num_cpus=usable_cores(), include_dashboard=False, **quiet)
            stack.callback(ray.shutdown)
        yield ray.get_runtime_context().gcs_address


@contextmanager
def _standard_output_to_nobody() -> Iterator[None]:
    """Answers go there, and what Ray's processes print does not belong to them."""
    sys.stdout.flush()
    kept = os.dup(1)
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nobody)
