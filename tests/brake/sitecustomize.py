"""Stop a job between the writing of a file and its renaming into place, so that a test can strike it just there.

Python imports this by itself where this folder is on PYTHONPATH. SEGTRUST_TEST_BRAKE names a file; as long as it
exists, whoever is about to rename a written file whose path fits the pattern in it says so and waits.
"""

import os
import time
from fnmatch import fnmatch
from pathlib import Path

replace = os.replace


def replace_when_allowed(source, target, **options):
    brake = Path(os.environ["SEGTRUST_TEST_BRAKE"])
    if Path(source).name.startswith(".partial-") and brake.exists() and fnmatch(str(target), brake.read_text()):
        Path(f"{brake}.arrived").write_text(f"{os.getpid()} {source}")
        while brake.exists():
            time.sleep(0.05)
    return replace(source, target, **options)


if "SEGTRUST_TEST_BRAKE" in os.environ:
    os.replace = replace_when_allowed
