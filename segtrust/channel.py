"""Messages between processes of one machine, over a Unix socket: one line of JSON each."""

import json
import os
import socket
from contextlib import contextmanager


class Gone(Exception):
    """Who was at the other end of a socket is there no more."""


class Channel:
    """Messages over a socket, one line of JSON each."""

    def __init__(self, connection):
        self._connection = connection
        self._lines = connection.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._lines.close()
        self._connection.close()

    def send(self, message):
        """Send a JSON-able value; raise Gone where nobody is there."""
        try:
            self._connection.sendall(json.dumps(message, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise Gone from error

    def receive(self):
        """Return the next value; raise Gone where nobody is there."""
        try:
            line = self._lines.readline()
        except OSError as error:
            raise Gone from error
        if not line.endswith(b"\n"):
            raise Gone
        return json.loads(line)


def listening(path):
    """Return a socket that listens at a path, where no file may be."""
    listener = socket.socket(socket.AF_UNIX)
    with _address(path) as address:
        listener.bind(address)
    listener.listen(64)
    return listener


def connected(path):
    """Return (Channel, first message) of who listens at a path; None where nobody does."""
    connection = socket.socket(socket.AF_UNIX)
    channel = Channel(connection)
    try:
        with _address(path) as address:
            connection.connect(address)
        return channel, channel.receive()
    except (FileNotFoundError, ConnectionError, Gone):
        channel.close()
        return None


@contextmanager
def _address(path):
    """Yield an address of a socket; that of a Unix socket may have 107 bytes, which TMPDIR alone can exceed."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
