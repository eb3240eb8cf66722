"""The command line on a simulated system that lacks calls: ``poorer_system.py here|macos|windows``.

torch is imported first: only what the package itself asks of the system is taken away. The simulated Windows refuses to
rename or replace what is open, to rename onto anything, to open folders, and to sync what was opened for reading.

Each line of stdin is a list in JSON: the files that stdout and stderr go to, a number of tensors after which a merge is
interrupted or null, and the arguments of a command, which runs in a process that begins with everything imported. A
line on stdout has its exit status.
"""

import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

MACOS = {"posix_fallocate", "posix_fadvise", "fdatasync", "sched_getaffinity", "copy_file_range", "sendfile"}
WINDOWS = MACOS | {
    "preadv", "pwritev", "pread", "pwrite", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "fork",
    "mkfifo", "killpg", "getuid", "geteuid", "fchmod", "chown", "link",
}  # fmt: skip
MISSING = {"macos": MACOS, "windows": WINDOWS}
MODULES = ("fcntl", "resource", "pwd", "grp", "termios")  # that Windows lacks
OPEN, RENAME, REPLACE, FSYNC = os.open, os.rename, os.replace, os.fsync


def denied(path):
    return PermissionError(13, "Access is denied", str(path))


def is_open(path):
    """Whether this process has a file open at a path, or below it."""
    path = Path(os.path.realpath(path))
    targets = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
    return any(Path(target).is_relative_to(path) for target in targets)


def windows_rename(source, target):
    if os.path.lexists(target) or is_open(source):
        raise denied(source)
    RENAME(source, target)


def windows_replace(source, target):
    if Path(target).is_dir() or is_open(source) or is_open(target):
        raise denied(source)
    REPLACE(source, target)


def windows_open(path, flags, mode=0o777, *, dir_fd=None):
    if Path(path).is_dir():
        raise denied(path)
    return OPEN(path, flags, mode, dir_fd=dir_fd)


def windows_fsync(file):
    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    FSYNC(file)


def become(name):
    """Take away what a system lacks."""
    import torch  # noqa: F401

    if name == "windows":
        from r_tsvm_kernels import system

        system.WINDOWS, system.HAS_PROCESS_GROUPS = True, False
        os.open, os.rename, os.replace, os.fsync = windows_open, windows_rename, windows_replace, windows_fsync
        shutil._use_fd_functions = False
        shutil._rmtree_impl = shutil._rmtree_unsafe  # chosen at import from Python 3.14 on
        for module in [module for module in sys.modules if module.partition(".")[0] == "filelock"]:
            del sys.modules[module]
        sys.modules.update(dict.fromkeys(MODULES))
    for call in MISSING[name]:
        if hasattr(os, call):
            delattr(os, call)


def interrupt_after(tensors):
    """Stop a merge as Ctrl-C does, when so many tensors are recorded."""
    from r_tsvm_kernels.engine.job import MergeJob

    record = MergeJob.record

    def recorded(job, entry):
        if len(job.finished) == tensors:
            raise KeyboardInterrupt
        record(job, entry)

    MergeJob.record = recorded


def run(out, err, tensors, arguments):
    """Run a command in this process, which ends with it."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(OPEN(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if tensors is not None:
        interrupt_after(tensors)
    from r_tsvm_kernels.cli import main

    sys.exit(main(arguments))


if __name__ == "__main__":
    fork, wait = os.fork, os.waitpid
    if sys.argv[1] in MISSING:
        become(sys.argv[1])
    import r_tsvm_kernels.cli
    import r_tsvm_kernels.engine  # noqa: F401

    for line in sys.stdin:
        if (child := fork()) == 0:
            run(*json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(wait(child, 0)[1])}\n")
        sys.stdout.flush()
