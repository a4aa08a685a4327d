"""Runs one program that nobody has read: `code_runner` starts this text inside of a sandbox.

It imports nothing of capgap. Standard input has what to run as JSON, standard output gets one line
of JSON. Here are the limits of the process; the sandbox around it holds back everything else.
"""

import json
import os
import resource
import sys


def main() -> None:
    order = json.load(sys.stdin)
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    sys.dont_write_bytecode = True
    limit(order)
    error = None
    try:
        exec(compile(order["program"], "<program>", "exec"), {"__name__": "program"})
    except BaseException as raised:  # also SystemExit: a program that leaves early has not passed
        error = f"{type(raised).__name__}: {raised}"[:300]
    os.write(answer, json.dumps({"key": order["key"], "error": error}).encode())
    os._exit(0)


def limit(order):  # type: ignore[no-untyped-def]
    for kind, most in (
        (resource.RLIMIT_CPU, order["cpu_seconds"]),
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        # a second more, so that the soft limit's signal tells why
        wanted = (most, most + (kind == resource.RLIMIT_CPU))
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            # only root may raise it
            wanted = (min(wanted[0], hard), min(wanted[1], hard))
        resource.setrlimit(kind, wanted)


if __name__ == "__main__":
    main()
