"""What people see of a long loop: a bar on a terminal, plain lines in a log."""

import io
import os
import re
import subprocess
import sys
import termios
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from segtrust.jobs import log_line
from segtrust.progress import counting, duration, line_of, progress


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def said(capsys):
    """Return the lines on stderr; nothing may be on stdout."""
    out, error = capsys.readouterr()
    assert out == ""
    return error.splitlines()


def walk(n, seconds):
    """Go through n items that take so many seconds each."""
    clock = Clock()
    for _ in progress(range(n), "passes of p1", clock=clock):
        clock.seconds += seconds


@contextmanager
def terminal(stdout=None, size=(24, 80)):
    """Make stderr a terminal, and stdout too unless it is given; yield what returns all that it was sent.

    pytest takes both streams back between the parts of a test, so that a fixture could not do this.
    """
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    termios.tcsetwinsize(theirs, size)
    with open(theirs, "w", encoding="utf-8") as stream, open(ours, "rb", buffering=0) as other_end:
        with redirect_stderr(stream), redirect_stdout(stdout or stream):
            yield lambda: received.decode()
        received = b"".join(iter(lambda: other_end.read(65536) or b"", b""))


def fail_at(number, items, clock=None):
    """Go through items that take 5 s each, and fail at one of them."""
    for item in items:
        if clock:
            clock.seconds += 5
        if item == number:
            raise ValueError(f"at {number}")


def shown(sent):
    """Return the lines that a person sees after a terminal was sent this, trailing blanks aside."""
    lines = []
    for line in sent.split("\n"):
        cells = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return [line for line in lines if line]


# --- lines ---


def test_items_come_unchanged_and_in_order():
    items = [object() for _ in range(5)]
    assert list(progress(items, "items")) == items
    assert list(progress(iter(items), "items", total=5)) == items
    assert list(progress([], "items")) == []


def test_a_line_says_how_many_are_done_since_when_and_for_how_long_still(capsys):
    walk(20, 2.4)
    assert said(capsys) == [
        "passes of p1: 5 of 20, 12 s, about 36 s left",
        "passes of p1: 10 of 20, 24 s, about 24 s left",
        "passes of p1: 15 of 20, 36 s, about 12 s left",
        "passes of p1: 20 of 20, 48 s",
    ]


@pytest.mark.parametrize(("n", "seconds", "n_lines"), [(1000, 1, 10), (1000, 0.02, 2), (7, 60, 7), (1000, 0.005, 1)])
def test_lines_are_ten_at_most_and_ten_seconds_apart(capsys, n, seconds, n_lines):
    walk(n, seconds)
    lines = said(capsys)
    assert len(lines) == n_lines
    assert lines[-1].startswith(f"passes of p1: {n:,} of {n:,}, ")


def test_what_ends_within_a_second_says_nothing(capsys):
    walk(9, 0.1)
    assert said(capsys) == []


def test_no_control_character_reaches_a_log(capsys):
    walk(40, 5)
    out, error = capsys.readouterr()
    assert error
    assert re.fullmatch(r"[ -~\n]+", out + error)


def test_a_log_that_is_given_has_a_line_every_time_and_nothing_else_is_said(capsys):
    lines, clock = [], Clock()
    with counting(4, "iterations", first=2, log=lines.append, clock=clock) as count:
        clock.seconds += 0.25
        count.reached(3, "loss 0.500")
        count.say("validation")
        clock.seconds += 0.25
        count.reached(4)
    assert lines == [
        "iterations: 3 of 4, 0.2 s, about 0.2 s left; loss 0.500",
        "validation",
        "iterations: 4 of 4, 0.5 s",
    ]
    assert said(capsys) == []


def test_what_was_done_before_took_none_of_the_time():
    assert line_of("iterations", 60, 100, 10, first=50) == "iterations: 60 of 100, 10 s, about 40 s left"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_seconds_are_told_in_the_units_of_people(seconds, words):
    assert duration(seconds) == words


def test_an_exception_passes_through_and_nothing_is_said_of_the_end(capsys):
    clock = Clock()
    with pytest.raises(ValueError, match="at 3"):
        fail_at(3, progress(range(9), "items", clock=clock), clock)
    assert said(capsys) == ["items: 2 of 9, 10 s, about 35 s left"]


def test_an_exception_of_the_items_passes_through():
    def items():
        yield 1
        raise KeyError("second")

    with pytest.raises(KeyError, match="second"):
        list(progress(items(), "items", total=2))


# --- a bar ---


@pytest.mark.parametrize("size", [(24, 80), (0, 0)], ids=["24 x 80", "of unknown size"])
def test_on_a_terminal_it_is_a_bar_on_one_line(size):
    with terminal(size=size) as sent:
        assert list(progress(range(5), "patients drawn")) == [0, 1, 2, 3, 4]
    assert "\rpatients drawn: 0 of 5 |" in sent()
    assert sent().endswith("\n")
    (line,) = shown(sent())
    assert re.fullmatch(r"patients drawn: 5 of 5 \|█+\| \d+:\d+", line)
    assert len(line) <= 80


def test_an_exception_leaves_no_half_bar():
    with terminal() as sent, pytest.raises(ValueError, match="at 3"):
        fail_at(3, progress(range(9), "items"))
    assert "items: 0 of 9" in sent()
    assert shown(sent()) == []


def test_a_loop_that_is_left_early_leaves_no_half_bar():
    with terminal() as sent:
        for _ in progress(range(9), "items"):
            break
    assert "items: 0 of 9" in sent()
    assert shown(sent()) == []


def test_lines_stand_above_the_bar_and_a_note_behind_it():
    with terminal() as sent, counting(2, "iterations", log=log_line) as count:
        count.reached(1, "loss 0.500")
        count.say("validation")
        count.reached(2, "loss 0.400")
    line, bar = shown(sent())
    assert line == "validation"
    assert bar.startswith("iterations: 2 of 2 |")
    assert bar.endswith(", loss 0.400")


def test_lines_beside_a_bar_reach_a_file_without_control_characters():
    file = io.StringIO()
    with terminal(stdout=file), counting(2, "iterations", log=log_line) as count:
        count.reached(1)
        count.say("validation")
    assert file.getvalue() == "validation\n"


def test_who_gives_a_log_of_their_own_gets_no_bar():
    lines = []
    with terminal() as sent, counting(2, "passes of p1", log=lines.append) as count:
        count.reached(2)
    assert len(lines) == 1
    assert sent() == ""


JOB = """
import itertools, sys
from types import SimpleNamespace
from segtrust.jobs import job, log_line
from segtrust.progress import counting, progress
print("a terminal:", sys.stderr.isatty(), flush=True)
ticks = itertools.count(step=6)
with job(SimpleNamespace(log=[sys.argv[1]], threads=1, wildcards=SimpleNamespace()), "cohort"):
    list(progress("abcd", "tallies read", clock=lambda: next(ticks)))
    with counting(1, "passes of p1", log=log_line) as count:
        count.reached(1)
"""


def test_a_job_that_was_started_on_a_terminal_writes_lines_to_its_log_alone(tmp_path):
    with terminal() as sent:
        command = [sys.executable, "-c", JOB, str(tmp_path / "log")]
        subprocess.run(command, stdout=sys.stdout, stderr=sys.stderr, check=True)
    assert shown(sent()) == ["a terminal: True"]
    log = (tmp_path / "log").read_text()
    assert re.fullmatch(r"[ -~\n]+", log)
    assert [re.sub(r"[\d.]+ s", "n s", line) for line in log.splitlines()] == [
        "tallies read: 2 of 4, n s, about n s left",
        "tallies read: 4 of 4, n s",
        "passes of p1: 1 of 1, n s",
        "cohort: done in n s",
    ]
