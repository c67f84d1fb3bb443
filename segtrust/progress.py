"""Progress: how much of a long loop is done, as a bar on a terminal and as plain lines in a log."""

import os
import sys
import time
from contextlib import contextmanager

from segtrust.jobs import log_line

SHORT_S = 1  # what takes less says nothing in a log
BETWEEN_S = 10  # between two lines
_BAR = "{desc}: {n_fmt} of {total_fmt} |{bar}| {elapsed}, about {remaining} left{postfix}"
_BAR_AT_END = "{desc}: {n_fmt} of {total_fmt} |{bar}| {elapsed}{postfix}"


def progress(items, what, *, total=None, clock=time.monotonic):
    """Yield items as they come, and show on stderr how many are done.

    items : iterable; total : how many there are, where it has no length
    what : words for them, such as "patients drawn"
    clock : function that returns seconds

    Shown as `counting` does without `log`. An item is done when the next one is asked for.
    """
    with counting(len(items) if total is None else total, what, clock=clock) as count:
        for done, item in enumerate(items, start=1):
            yield item
            count.reached(done)


@contextmanager
def counting(total, what, *, first=0, log=None, clock=time.monotonic):
    """Show how much of something is done; yield an object with the methods `reached` and `say`.

    total : how many there are; first : how many were done before, which took none of the time
    what : words for them, such as "passes of p1"
    log : function that takes a line of text and receives one at every call of `reached`, for callers that are followed
        line by line; None for lines on stderr, fewer of them
    clock : function that returns seconds

    `reached(done, note="")` says that so many are done, and what else is worth a word; `say(line)` prints another line.

    On a terminal (stderr) it is a bar, unless another log than `jobs.log_line` is given. Elsewhere it is lines such as
    `passes of p1: 5 of 20, 12 s, about 36 s left`. On stderr such a line comes when 10 s have passed since the last
    one and another tenth is done, and one at the end; none at all when it ends within 1 s. After an exception nothing
    is said of the end, and a bar is removed.
    """
    if log in (None, log_line) and sys.stderr.isatty():
        shown = _Bar(total, what, first)
    else:
        shown = _Lines(total, what, first, log, clock)
    try:
        yield shown
    except BaseException:
        shown.end(False)
        raise
    shown.end(True)


def line_of(what, done, total, seconds, first=0, note=""):
    """Return a line of text: how many are done, for how long, and how long the rest takes at this pace.

    done, total : counts; first : how many of those done took none of the seconds
    note : what follows, or ""
    """
    parts = [f"{what}: {done:,} of {total:,}", duration(seconds)]
    if first < done < total:
        parts.append(f"about {duration(seconds * (total - done) / (done - first))} left")
    return ", ".join(parts) + (f"; {note}" if note else "")


def duration(seconds):
    """Return a number of seconds in words: 4.2 s, 36 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class _Bar:
    """A bar on a terminal."""

    def __init__(self, total, what, first):
        from tqdm import tqdm  # not before: most processes draw no bar

        known = os.get_terminal_size(sys.stderr.fileno()).columns
        # some terminals, such as those of containers, do not know their size
        size = {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}
        self._bar = tqdm(total=total, initial=first, desc=what, bar_format=_BAR, miniters=1, file=sys.stderr, **size)

    def reached(self, done, note=""):
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def say(self, line):
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def end(self, well):
        self._bar.leave, self._bar.bar_format = well, _BAR_AT_END
        self._bar.close()


class _Lines:
    """Lines of a log."""

    def __init__(self, total, what, first, log, clock):
        self._total, self._what, self._first = total, what, first
        self._log, self._clock = log, clock
        self._began = self._last_s = clock()
        self._done, self._note = first, ""
        self._last_tenth = self._tenth(first) if total else 0

    def reached(self, done, note=""):
        self._done, self._note, now = done, note, self._clock()
        if self._log:
            self._log(self._line(now))
        elif done < self._total and now - self._last_s >= BETWEEN_S and self._tenth(done) > self._last_tenth:
            self._last_s, self._last_tenth = now, self._tenth(done)
            self.say(self._line(now))

    def say(self, line):
        if self._log:
            self._log(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self, well):
        now = self._clock()
        if well and not self._log and now - self._began >= SHORT_S:
            self.say(self._line(now))

    def _tenth(self, done):
        return 10 * done // self._total

    def _line(self, now):
        return line_of(self._what, self._done, self._total, now - self._began, self._first, self._note)
