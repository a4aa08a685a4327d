"""A command of capgap in several processes on this machine, started as torchrun starts them.

`python -m capgap.pipeline.processes 8 distill ...` ends with the exit code of the process that was
the first to fail. torchrun itself would end with 1, and with its own account below the command's
line that says what is wrong.
"""

import logging
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Sequence

from capgap.machine import usable_cores

# The first process writes a large model's state before it ends
SHUTDOWN_SECONDS = 600


def run_processes(count: int, argv: Sequence[str]) -> int:
    """The exit code of `capgap ARGV` in so many processes; 128 and the number for a signal."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # the launcher wants one, and would leave it behind
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=secrets.token_hex(4),
            rdzv_backend="c10d",
            # any port that is free
            rdzv_endpoint="localhost:0",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            max_restarts=0,
            monitor_interval=0.1,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "capgap", *argv)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        except SignalException as stopped:
            return 128 + stopped.sigval
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run_processes(int(sys.argv[1]), sys.argv[2:]))
    except KeyboardInterrupt:
        # before torch's launcher listens
        sys.exit(128 + signal.SIGINT)
