"""Runs one program that nobody has read, in a process of its own: `code_runner` starts this file.

It imports nothing of capgap. Standard input has what to run as JSON, standard output gets one
line of JSON. What holds the program back, from the outside in:

- limits of the process: processor time, memory, size of files, number of files;
- Landlock, where the kernel has it: no file outside of the current folder is written or removed,
  and none read but those of Python and the system's libraries. Before Linux 6.2 files can still be
  cut off, so that it is not counted there;
- seccomp, where the kernel has it: no socket, no other process, no signal, no change of rights;
- an audit hook of Python: the same from inside the interpreter, everywhere, but a program that
  knows how can get around it. It is a fence for accidents, the kernel's two are walls.

Names, sizes and times of files can be seen, and what leaks through timing is not held back.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
# Architecture as the kernel tells it, and the numbers of: socket, socketpair, bind, connect,
# sendto, ptrace, clone, clone3, execve, execveat, kill, tkill, tgkill, io_uring_setup,
# process_vm_writev, mount, unshare, setns, fchmod, fchmodat, fchmodat2, fchown, fchownat,
# keyctl, bpf, pidfd_send_signal, setrlimit, prlimit64; then what x86 alone has: fork, vfork,
# chmod, chown, lchown
_CALLS = {
    "x86_64": (
        0xC000003E,
        (
            *(41, 53, 49, 42, 44, 101, 56, 435, 59, 322, 62, 200, 234, 425, 311, 165, 272, 308),
            *(91, 268, 452, 93, 260, 250, 321, 424, 160, 302, 57, 58, 90, 92, 94),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(198, 199, 200, 203, 206, 117, 220, 435, 221, 281, 129, 130, 131, 425, 271, 40, 97),
            *(268, 52, 53, 452, 55, 54, 219, 280, 424, 164, 261),
        ),
    ),
}
_FORBIDDEN = ("socket.", "subprocess.", "ctypes.", "pty.", "os.exec", "os.spawn", "os.posix_spawn")
_FORBIDDEN_ALONE = {"os.fork", "os.forkpty", "os.system", "os.kill", "os.killpg"}
_CHANGES = {
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr"),
}


# Places that Python and its extension modules read
_LIBRARIES = [
    os.path.join(prefix, name)
    for prefix in sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix})
    for name in ("lib", "lib64")
]
_READABLE = [*_LIBRARIES, "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
_READABLE += ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]


def main() -> None:
    order = json.load(sys.stdin)
    told = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    sys.dont_write_bytecode = True
    _limit(order)
    kernel = order["kernel"]
    layers = {
        "landlock": kernel and _guard_files(os.getcwd()),
        "seccomp": kernel and _guard_calls(),
        "audit_hook": order["hook"],
    }
    if order["hook"]:
        sys.addaudithook(_hook(os.path.realpath(os.getcwd())))
    error = None
    try:
        exec(compile(order["program"], "<program>", "exec"), {"__name__": "program"})
    except BaseException as raised:  # also SystemExit: a program that leaves early has not passed
        error = f"{type(raised).__name__}: {raised}"[:300]
    answer = {"key": order["key"], "error": error, "layers": layers}
    os.write(told, json.dumps(answer).encode())
    os._exit(0)


def _limit(order):  # type: ignore[no-untyped-def]
    for kind, most in (
        (resource.RLIMIT_CPU, order["cpu_seconds"]),
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        # root may go on, which seccomp does not let it
        (resource.RLIMIT_NPROC, 0),
    ):
        # a second more, so that the soft limit's signal tells why
        wanted = (most, most + (kind == resource.RLIMIT_CPU))
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            # only root may raise it
            wanted = (min(wanted[0], hard), min(wanted[1], hard))
        resource.setrlimit(kind, wanted)


def _guard_files(folder: str) -> bool:
    """Landlock: whether the kernel refuses all ways to write but below `folder`, and to read but
    there and in _READABLE. False also where it holds back all but cutting files off."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    # write, remove folder and file, make every kind of file; from version 2 on move, from 3 cut
    writes = 1 << 1 | sum(1 << bit for bit in range(4, 13))
    writes |= (version >= 2) << 13 | (version >= 3) << 14
    read_file, read_folder = 1 << 2, 1 << 3
    everything = writes | read_file | read_folder
    attributes = ctypes.create_string_buffer(struct.pack("<Q", everything), 8)
    rules = libc.syscall(444, attributes, ctypes.c_size_t(8), 0)
    allowed = {path: read_file | os.path.isdir(path) * read_folder for path in _READABLE}
    allowed = {path: rights for path, rights in allowed.items() if os.path.exists(path)}
    is_ruled = rules >= 0
    for path, rights in (allowed | {folder: everything}).items():
        place = os.open(path, os.O_PATH)
        beneath = ctypes.create_string_buffer(struct.pack("<Qi", rights, place), 12)
        is_ruled = is_ruled and libc.syscall(445, rules, 1, beneath, 0) == 0
        os.close(place)
    return (
        is_ruled
        and libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
        and libc.syscall(446, rules, 0) == 0
        and version >= 3
    )


def _guard_calls() -> bool:
    """Seccomp: whether the kernel now refuses the calls in _CALLS, and other ways to call it."""
    if platform.machine() not in _CALLS:
        return False
    architecture, calls = _CALLS[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, 0x80000000)]
    program.append((load, 0, 0, 0))
    # the second way to call an x86 kernel has numbers of its own
    program.append((at_least, len(calls) + 1, 0, 0x40000000))
    program += [(equal, len(calls) - place, 0, call) for place, call in enumerate(calls)]
    refused = 0x00050000 | 1  # errno EPERM
    program += [(give, 0, 0, 0x7FFF0000), (give, 0, 0, refused)]
    code = b"".join(struct.pack("<HBBI", *step) for step in program)
    held = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of steps, and after padding where they lie
    pointer = ctypes.create_string_buffer(
        struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(held)), 16
    )
    libc = ctypes.CDLL(None, use_errno=True)
    return (
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
        and libc.prctl(_SET_SECCOMP, _FILTER, pointer, 0, 0) == 0
    )


def _hook(folder: str):  # type: ignore[no-untyped-def]
    """The audit hook that keeps a program in `folder`, and from reading but there and in
    _READABLE."""
    real, is_text = os.path.realpath, (str, bytes, os.PathLike)
    inside = (folder + os.sep,)
    readable = inside + tuple(real(path) + os.sep for path in _READABLE)

    def outside(path: object, places: tuple[str, ...] = inside) -> bool:
        return isinstance(path, is_text) and not (real(os.fsdecode(path)) + os.sep).startswith(
            places
        )

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES and outside(path):
                raise PermissionError(f"writes outside of its folder: {path!r}")
            if outside(path, readable):
                raise PermissionError(f"reads outside of its folder: {path!r}")
        elif event in ("os.listdir", "os.scandir") and outside(arguments[0], readable):
            raise PermissionError(f"lists a folder outside of its own: {arguments[0]!r}")
        elif event in _FORBIDDEN_ALONE or event.startswith(_FORBIDDEN):
            raise PermissionError(f"not allowed: {event}")
        elif event in _CHANGES and any(outside(argument) for argument in arguments[:2]):
            raise PermissionError(f"changes files outside of its folder: {event}")

    return hook


if __name__ == "__main__":
    main()
