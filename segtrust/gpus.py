"""GPUs of this machine, told apart among the jobs of one user: no two compute on one GPU at a time.

Locks on files say who has which; they vanish with the process that holds them, however it ends. A GPU has `SHARES`: a
patient that is sampled by a warm worker (`segtrust.worker`) takes one of them, so that the next can start while this
one is computed; a job that computes by itself takes all of a GPU.
"""

import fcntl
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from segtrust.channel import Gone, connected
from segtrust.errors import SegtrustError

SHARES = 2
VARIABLE = "CUDA_VISIBLE_DEVICES"
_POLL_S = 0.1


def visible():
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them.

    Those of CUDA_VISIBLE_DEVICES where that is set, and otherwise those that nvidia-smi lists: parts of a GPU (MIG) by
    themselves. PyTorch is not asked, because importing it takes seconds.
    """
    if VARIABLE in os.environ:
        # CUDA takes no notice of what follows an invalid name, such as -1 or SLURM's NoDevFiles
        names = [name.strip() for name in os.environ[VARIABLE].split(",")]
        invalid = [index for index, name in enumerate(names) if not re.match(r"\d|GPU-|MIG-", name)]
        return names[: invalid[0]] if invalid else names
    if not shutil.which("nvidia-smi") or not _may_be_there():
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return _names(listed)


def used_for(device):
    """Return the names of the GPUs that jobs use under a `device` of the configuration: auto, cuda or cpu."""
    return [] if device == "cpu" else visible()


def _may_be_there():
    return Path("/dev/dxg").exists() or any(Path("/dev").glob("nvidia[0-9]*"))


def _names(listed):
    """Return the names in what `nvidia-smi -L` says: a GPU that is divided is named by its parts alone."""
    names = []
    for line in listed.splitlines():
        found = re.search(r"UUID: ((?:GPU|MIG)-[^)]+)\)", line)
        if found and found[1].startswith("MIG-") and names and names[-1].startswith("GPU-"):
            names.pop()
        names += [found[1]] if found else []
    return names


def folder():
    """Return the folder of locks and sockets of this user, on this machine or in this allocation of SLURM; make it.

    Raises SegtrustError where it is open to others.
    """
    path = _place()
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    state = path.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise SegtrustError(
            f"{path} must be a folder of this user (number {os.getuid()}) that nobody else may enter (mode 700), but "
            f"belongs to {state.st_uid} with mode {stat.S_IMODE(state.st_mode):o}; remove it, or set TMPDIR to another "
            "place"
        )
    return path


def _place():
    job = os.environ.get("SLURM_JOB_ID")
    return Path(tempfile.gettempdir()) / "-".join(["segtrust", str(os.getuid()), *([job] if job else [])])


class Lock:
    """A locked file in `folder()`; closing it gives the lock back and leaves nothing behind."""

    def __init__(self, file, path):
        self._file = file
        self._path = path

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        # who waits for this file sees that it is no more the one of this name
        self._path.unlink(missing_ok=True)
        self._file.close()
        with suppress(OSError):  # others have files there
            self._path.parent.rmdir()


def locked(path, wait=False):
    """Return the Lock of a file in `folder()`; None where another has it, unless told to `wait`."""
    while True:
        try:
            folder()
            file = open(path, "a")  # noqa: SIM115 - closed with the Lock
        except FileNotFoundError:  # the last to leave has removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        with suppress(FileNotFoundError):  # who had it has removed it, or another has come since
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return Lock(file, path)
        file.close()


@contextmanager
def own_gpu(device):
    """Keep a GPU to oneself, the only one that CUDA sees from here on; nothing where none is to be used.

    device : "auto", "cuda" or "cpu"

    To be entered before PyTorch is imported, because CUDA looks once for the GPUs that it may use.
    """
    devices = used_for(device)
    if not devices:
        yield
        return
    with all_shares(devices) as name:
        dismiss(name)
        os.environ[VARIABLE] = name
        yield


def dismiss(device):
    """End the worker of a GPU after what it has at present, and wait until its memory is free."""
    if found := connected(socket_of(device)):
        with found[0] as channel:
            end(channel)
    # one that is about to end may not listen any more
    locked(life_of(device), wait=True).close()


def end(channel):
    """Tell a worker to end after what it has at present, and wait for it."""
    try:
        channel.send({"end": True})
        channel.receive()
    except Gone:
        return


def socket_of(device):
    """Return the path of the socket that the worker of a GPU listens at."""
    return _place() / f"{named(device)}.socket"


def life_of(device):
    """Return the file that the worker of a GPU has locked as long as it lives."""
    return _place() / f"{named(device)}.worker"


@contextmanager
def one_share(devices):
    """Wait for a share of a GPU, and yield the GPU's name; one that nobody uses is preferred.

    devices : names of GPUs, at least one
    """
    while True:
        if found := _idle_share(devices) or _any_share(devices):
            break
        time.sleep(_POLL_S)
    device, lock = found
    with lock:
        yield device


@contextmanager
def all_shares(devices):
    """Wait for a GPU that nobody uses, keep it to oneself, and yield its name.

    devices : names of GPUs, at least one
    """
    with ExitStack() as held:
        while True:
            if found := _idle(devices) or _first_share(devices):
                break
            time.sleep(_POLL_S)
        device, locks = found
        for lock in locks:
            held.enter_context(lock)
        # what is left comes free: those who take single shares wait for no other
        for share in range(len(locks), SHARES):
            held.enter_context(locked(_share(device, share), wait=True))
        yield device


def _share(device, share):
    return _place() / f"{named(device)}.{share}"


def named(device):
    """Return the name of a device as a part of a file's name."""
    return "gpu-" + re.sub(r"[^A-Za-z0-9]+", "-", device.removeprefix("GPU-"))


def _idle(devices):
    """Return (device, all its locks) of the first device that nobody uses, or None."""
    for device in devices:
        locks = []
        for share in range(SHARES):
            if not (lock := locked(_share(device, share))):
                break
            locks.append(lock)
        else:
            return device, locks
        for lock in locks:
            lock.close()
    return None


def _idle_share(devices):
    if not (found := _idle(devices)):
        return None
    device, (*others, last) = found
    for lock in others:
        lock.close()
    return device, last


def _any_share(devices):
    # in the order opposite to `_first_share`, so that who waits for all of a GPU gets it soon
    for share in reversed(range(SHARES)):
        for device in devices:
            if lock := locked(_share(device, share)):
                return device, lock
    return None


def _first_share(devices):
    for device in devices:
        if lock := locked(_share(device, 0)):
            return device, [lock]
    return None
