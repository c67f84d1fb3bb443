"""Who computes a chunk of passes: this process, or a warm worker that keeps the network on a GPU between patients.

A worker belongs to one GPU. The first job that needs it starts it (`python -m segtrust.worker`); it listens on a socket
in `gpus.folder()`, takes requests of jobs as lines of JSON, and ends when it has been idle for a minute. Scans are read
and moments written beside the computing of another patient, but one thread alone computes. Result, log and errors of a
job are what they are without a worker. When a job has gone, its patient is abandoned after the pass at hand.
"""

import argparse
import builtins
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import segtrust
from segtrust import gpus
from segtrust.channel import Channel, Gone, connected, listening
from segtrust.errors import PatientError, SegtrustError
from segtrust.files import canonical_json, replacing
from segtrust.jobs import log_line

IDLE_S = 60
START_S = 120
MODELS_KEPT = 8  # weights alone: what is computed with them leaves the memory again
_POLL_S = 0.05
_PATHS = ("scan", "checkpoint", "rate", "output", "cache")
_KINDS = {"PatientError": PatientError, "SegtrustError": SegtrustError}


# --- a job ---


def sample_on_gpu(*, warm, log=log_line, **request):
    """Draw a chunk of passes of one patient in a slot of a GPU; without one where none is to be used.

    warm : whether a worker that keeps the network computes them
    log : function that takes a line of text
    request : as in `sample.sample_chunk`; paths may be relative

    Raises what `sample.sample_chunk` raises, and SegtrustError where the worker ends.
    """
    request |= {name: request[name] and os.path.abspath(request[name]) for name in _PATHS}
    if warm and (devices := gpus.used_for(request["device"])):
        with gpus.one_share(devices) as device:
            _ask_worker(device, request, log)
        return
    with gpus.own_gpu(request["device"]):
        from segtrust.sample import sample_chunk

        sample_chunk(request, log=log)


# --- a job and its worker ---


def _ask_worker(device, request, log):
    log_path = Path(f"logs/sample/worker-{gpus.named(device)}.log").absolute()
    # the job alone puts its output in place, so that nothing appears when it has ended
    with replacing(request["output"]) as partial:
        answered = False
        while not answered:
            channel, greeting = _worker(device, request["code"], log_path)
            with channel:
                try:
                    answered = _answered(channel, {**request, "output": str(partial)}, log)
                except Gone:
                    raise SegtrustError(
                        f"{request['patient']}: the worker of GPU {device} (process {greeting['process']}) ended while "
                        f"it had this patient. Its last words are in {greeting['log']}; out of memory? The next job "
                        "starts another: run again."
                    ) from None


def _answered(channel, request, log):
    """Hand a request over and print what is said of it; return whether it is done, False where another must do it."""
    channel.send(request)
    while True:
        message = channel.receive()
        if "log" in message:
            log(message["log"])
        elif "error" in message:
            _raise(message["error"], log)
        else:
            return message["done"]


def _raise(error, log):
    """Raise what a worker has met, as the same kind where that is one of this package or of Python."""
    if error["kind"] in _KINDS:
        raise _KINDS[error["kind"]](*error["arguments"])
    log(error["traceback"])
    if error["arguments"]:
        raise getattr(builtins, error["kind"])(*error["arguments"])
    raise RuntimeError(f"{error['kind']}: {error['message']}")


def _worker(device, code, log_path):
    """Return (Channel, greeting) of the worker of a GPU that runs this code; start it where there is none."""
    wanted = {"code": code, "python": sys.executable}
    started, until = None, time.monotonic() + START_S
    while time.monotonic() < until:
        if found := connected(gpus.socket_of(device)):
            channel, greeting = found
            if all(greeting[key] == value for key, value in wanted.items()):
                return found
            with channel:
                gpus.end(channel)
            continue
        if started and started.poll():
            raise SegtrustError(
                f"the worker of GPU {device} did not start (exit status {started.returncode}): {log_path}"
            )
        if not started or started.poll() == 0:  # another was there first
            started = _start(device, code, log_path)
        time.sleep(_POLL_S)
    raise SegtrustError(f"the worker of GPU {device} did not answer within {START_S} s, see {log_path}")


def _start(device, code, log_path):
    log_path.parent.mkdir(parents=True, exist_ok=True)
    # the very package that runs here, wherever the job found it
    places = [str(Path(segtrust.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]
    environment = {
        gpus.VARIABLE: device,
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "TMPDIR": tempfile.gettempdir(),  # absolute, whatever it was
    }
    with open(log_path, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "segtrust.worker", device, code, str(log_path), "--idle", str(IDLE_S)],
            env={**os.environ, **environment}, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


# --- the worker ---


def main(arguments=None):
    """Serve a GPU until it has been idle for a while; at once where another worker does. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m segtrust.worker", description=main.__doc__)
    parser.add_argument("device", help="name of the GPU, as in CUDA_VISIBLE_DEVICES, which has it alone")
    parser.add_argument("code", help="digest of the code that jobs expect")
    parser.add_argument("log", help="file that this process writes to, which jobs name when it ends")
    parser.add_argument("--idle", type=float, default=IDLE_S, help="seconds without a job after which it ends")
    options = parser.parse_args(arguments)
    with ExitStack() as held:
        life = gpus.locked(gpus.life_of(options.device))
        if not life:
            return 0
        held.enter_context(life)
        path = gpus.socket_of(options.device)
        path.unlink(missing_ok=True)  # of a worker that was killed
        listener = held.enter_context(listening(path))
        server = _Server({"code": options.code, "python": sys.executable, "process": os.getpid(), "log": options.log})
        _say(f"worker of GPU {options.device}, process {os.getpid()}")
        import segtrust.sample  # noqa: F401 - once, before threads need it

        try:
            server.serve(listener, options.idle)
        finally:
            path.unlink(missing_ok=True)
        _say("the end")
    return 0


def _say(line):
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


class _Server:
    """Takes requests over connections, a thread each; one more thread computes.

    about : dict that greets who connects
    """

    def __init__(self, about):
        self._about = about
        self._turns = ThreadPoolExecutor(1)
        self._ending = False
        self._broken = False
        self._ended_for = []
        self._digests = {}
        self._opened = {}

    def serve(self, listener, idle_s):
        at_work, idle_since = [], time.monotonic()
        listener.settimeout(min(0.2, idle_s))
        while not self._ending and time.monotonic() - idle_since < idle_s:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                pass
            else:
                connection.settimeout(None)
                at_work.append(Thread(target=self._attend, args=(Channel(connection),)))
                at_work[-1].start()
            at_work = [thread for thread in at_work if thread.is_alive()]
            if at_work:
                idle_since = time.monotonic()
        listener.close()  # who waits to be greeted sees that nobody is here
        for thread in at_work:
            thread.join()

    def _attend(self, channel):
        try:
            channel.send(self._about)
            request = channel.receive()
        except Gone:
            channel.close()
            return
        if request.get("end"):
            self._ended_for.append(channel)  # closed by the end of this process
            self._ending = True
            return
        with channel:
            self._serve_request(channel, request)

    def _serve_request(self, channel, request):
        from segtrust.sample import sample_chunk

        def log(line):
            channel.send({"log": line})

        def turn(compute):
            return self._turns.submit(self._computed, compute, seconds).result()

        began, answer, seconds = time.perf_counter(), None, []
        try:
            sample_chunk(request, digest_of=self._digest, open_with=self._open, turn=turn, log=log)
            outcome, answer = "done", {"done": True}
        except Gone:
            outcome = "given up, its job has gone"
        except _Broken:
            outcome, answer = "left to another worker", {"done": False}
        except Exception as error:
            outcome, answer = f"failed: {error}", {"error": _told(error)}
        try:
            if answer:
                channel.send(answer)
        except Gone:
            outcome = f"{outcome}, but its job has gone"
            Path(request["output"]).unlink(missing_ok=True)  # nobody puts it in place
        name = f"{request['model']}, {request['patient']}, {request['source']} {request['first']}–{request['last']}"
        _say(f"{name}: {outcome}, {time.perf_counter() - began:.1f} s, {sum(seconds):.1f} s of it computing")

    def _computed(self, compute, seconds):
        """Return what a function returns, and append how long it took; called by the one thread that computes."""
        if self._broken:
            raise _Broken
        began = time.perf_counter()
        try:
            return compute()
        except (Gone, SegtrustError):
            raise
        except Exception:
            # a GPU may compute nothing more in this process
            self._broken = self._ending = True
            raise
        finally:
            seconds.append(time.perf_counter() - began)

    def _digest(self, path):
        """Return the digest of a checkpoint, which is read again when the file has changed."""
        from segtrust.provenance import file_digest

        state = os.stat(path)
        key = path, state.st_ino, state.st_size, state.st_mtime_ns
        if key not in self._digests:
            self._digests[key] = file_digest(path)
        return self._digests[key]

    def _open(self, weights, *, log, **settings):
        """Return the backend of a model, which is kept by all that it depends on, the digest of the weights among it.

        Jobs of an ensemble's members take turns: some models are kept, the one used longest ago goes first.
        """
        from segtrust.backends import open_backend

        key = canonical_json(settings)
        backend = self._opened.pop(key, None)
        if not backend:
            while len(self._opened) >= MODELS_KEPT:
                del self._opened[next(iter(self._opened))]
            began = time.perf_counter()
            backend = open_backend(weights, log=log, **settings)
            _say(f"network opened, {time.perf_counter() - began:.1f} s")
        self._opened[key] = backend
        return backend


class _Broken(Exception):
    """This process computes nothing more; another worker must."""


def _told(error):
    """Return what a job needs to raise an error as it would without a worker, JSON-able.

    `arguments` of its kind, none where `kind` is not Python's or they are no plain values.
    """
    kind = "PatientError" if isinstance(error, PatientError) else "SegtrustError"
    if isinstance(error, SegtrustError):
        return {"kind": kind, "arguments": [str(error)]}
    # the file of an OSError is not among its arguments
    arguments = [error.errno, error.strerror, error.filename] if isinstance(error, OSError) else list(error.args)
    plain = type(error).__module__ == "builtins" and all(isinstance(value, str | int | None) for value in arguments)
    return {
        "kind": type(error).__name__,
        "arguments": arguments if plain else [],
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)).rstrip(),
    }


if __name__ == "__main__":
    sys.exit(main())
