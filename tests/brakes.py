"""A brake for jobs, so that a test can strike one while it is in flight."""

import os
import time
from pathlib import Path


def wait_until(condition, what, timeout_s=60, every_s=0.2):
    """Return the first true value of `condition()`; AssertionError that says `what` did not come about in time."""
    until = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < until, f"{what}: not within {timeout_s} s"
        time.sleep(every_s)
    return value


class Brake:
    """Hold a job just before it renames what it has written; it waits until `release`.

    folder : where the brake's files lie
    pattern : the results to hold, such as "*/maps/p3_*"
    """

    def __init__(self, folder, pattern):
        self._file = Path(folder) / "brake"
        self._file.write_text(pattern)
        python_path = f"{Path(__file__).parent / 'brake'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        self.environment = {"SEGTRUST_TEST_BRAKE": str(self._file), "PYTHONPATH": python_path.rstrip(os.pathsep)}

    def wait(self, run):
        """Wait for the job, and return (its process id, Path of what it has written); run : what has started it."""

        arrival = Path(f"{self._file}.arrived")

        def arrived():
            assert run.process.poll() is None, f"Snakemake has ended before the fault:\n{run.said()}"
            return arrival.is_file() and arrival.read_text()

        said = wait_until(arrived, "the job to be struck is in flight", timeout_s=120, every_s=0.05)
        process, partial = said.split(" ", 1)
        return int(process), Path(partial)

    def release(self):
        self._file.unlink()
