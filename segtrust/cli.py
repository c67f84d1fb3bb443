"""The command `segtrust`: start a study, run it, see how far it is, look into its networks, draw phantoms."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from segtrust.config import ROOT
from segtrust.errors import SegtrustError

SPLITS = ("train", "validation", "calibration")


def main(arguments=None):
    """Run the command line; returns the exit status."""
    parser = _parser()
    # what `run` does not know is for Snakemake
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        _check_installation()
        return _COMMANDS[options.command](options, rest)
    except SegtrustError as error:
        print(f"segtrust {options.command}: {error}", file=sys.stderr)
        return 1


def _check_installation():
    """Raise SegtrustError where the workflow does not lie beside the package."""
    if not (ROOT / "Snakefile").is_file():
        raise SegtrustError(
            f"there is no Snakefile in {ROOT}: the package was installed without its workflow. Install it from a clone "
            "of the repository, editable: pip install -c constraints.txt -e '.[slurm,openvino]' (docs/install.md)"
        )


def _parser():
    parser = argparse.ArgumentParser(prog="segtrust", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    init = commands.add_parser("init", help="write patients.tsv and config.yaml for a data folder")
    init.add_argument("folder", help="a cohort in BraTS, Medical Segmentation Decathlon or nnU-Net layout")
    init.add_argument("study", nargs="?", default=".", help="where to write (default: here)")
    init.add_argument("--coding", help="what label codes mean, where file names cannot tell (brats2024)")
    init.add_argument("--force", action="store_true", help="replace files that are there")

    run = commands.add_parser(
        "run",
        help="run a study; prints the Snakemake command and executes it",
        usage="segtrust run [-h] [--profile PROFILE] [STUDY] [options of Snakemake]",
        epilog="STUDY: folder with config.yaml (default: here). All other options go to Snakemake, such as -n "
        "(dry run) or --cores 4.",
        allow_abbrev=False,
    )
    run.add_argument("--profile", default="local", help="local, allocation, slurm, or the path of a Snakemake profile")

    status = commands.add_parser("status", help="tell what of a study is done, stale, failed or missing")
    status.add_argument(
        "study", metavar="STUDY", nargs="?", default=".", help="folder with config.yaml (default: here)"
    )

    cohort = commands.add_parser("cohort", help="pool the patients that are finished, while others still fail")
    cohort.add_argument("model", metavar="MODEL", help="name of a model in config.yaml")
    cohort.add_argument(
        "study", metavar="STUDY", nargs="?", default=".", help="folder with config.yaml (default: here)"
    )
    cohort.add_argument(
        "--partial",
        action="store_true",
        required=True,
        help="write to results/MODEL/cohort_partial, and say who is missing; whole cohorts are made by `segtrust run`",
    )

    export = commands.add_parser("export", help="pack settings, tables and report of a study into one archive")
    export.add_argument("study", metavar="STUDY", help="folder with config.yaml")
    export.add_argument("archive", metavar="FILE.tar.gz")
    export.add_argument(
        "--with",
        dest="extras",
        nargs="+",
        default=[],
        choices=("maps", "pages", "tally", "voxels", "samples"),
        help="add these; the pages of patients show their scans",
    )

    layers = commands.add_parser("layers", help="list the layers of a model's network, to inject dropout after")
    layers.add_argument("model", metavar="MODEL", help="name of a model in config.yaml; its weights need not exist")
    layers.add_argument(
        "study", metavar="STUDY", nargs="?", default=".", help="folder with config.yaml (default: here)"
    )

    phantom = commands.add_parser("phantom", help="draw a cohort of synthetic patients in BraTS 2021 files")
    phantom.add_argument("folder")
    phantom.add_argument("--patients", type=int, required=True, help="how many")
    phantom.add_argument(
        "--shape", type=int, nargs=3, default=(240, 240, 155), metavar=("X", "Y", "Z"), help="voxels of 1 mm"
    )
    phantom.add_argument("--seed", type=int, default=0)
    for split in SPLITS:
        phantom.add_argument(f"--{split}", type=int, default=0, help=f"how many of them have split {split}")
    return parser


def _init(options, _):
    from segtrust.study_files import start_study

    print(start_study(options.folder, options.study, options.coding, options.force))
    return 0


def _run(options, rest):
    from segtrust.clusters import check, only_looks
    from segtrust.runs import prepare

    # argparse would take the value of one of Snakemake's options for the study
    study, rest = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else (".", rest)
    study = _folder(study)
    profile = Path(options.profile) if os.sep in options.profile else ROOT / "profiles" / options.profile
    if not (profile / "config.yaml").is_file():
        known = ", ".join(sorted(path.parent.name for path in ROOT.glob("profiles/*/config.yaml")))
        raise SegtrustError(f"no profile {profile}; known are {known}, or give the path of a folder with a config.yaml")
    snakemake = shutil.which("snakemake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    limits = _limits(profile, rest)
    command = [
        *(snakemake, "--snakefile", str(ROOT / "Snakefile")),
        *("--workflow-profile", str(profile.resolve()), "--directory", str(study)),
        *rest,
        *limits,
    ]
    if not any(map(only_looks, rest)):
        for line in [*check(profile, study, rest), *prepare(study, unlock=lambda: _unlock(command))]:
            print(f"segtrust run: {line}", file=sys.stderr)
    print(shlex.join(command), flush=True)
    return subprocess.run(command, check=False).returncode


def _unlock(command):
    done = subprocess.run([*command, "--unlock"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SegtrustError(f"Snakemake does not remove the lock of the study:\n{done.stdout}{done.stderr}")


def _folder(study):
    """Return the absolute path of a study's folder; SegtrustError where it is none."""
    study = Path(study).resolve()
    if not (study / "config.yaml").is_file():
        raise SegtrustError(f"no config.yaml in {study}; start a study with `segtrust init FOLDER`")
    return study


def _limits(profile, rest):
    """Return what jobs side by side may use of this machine or allocation, as options for Snakemake.

    profile : path; only under `local` and `allocation` do jobs run here
    rest : options of the user, which come first

    A job that samples on a GPU counts as a core beyond those there are, because it mostly waits.
    """
    if profile.name not in ("local", "allocation"):
        return []
    from segtrust import gpus

    processors, shares = _processors(), gpus.SHARES * len(gpus.visible())
    limits = []
    if not any(option.startswith(("--cores", "-c", "--jobs", "-j")) for option in rest):
        limits += ["--cores", str(processors + shares), "--max-threads", str(processors)]
    if not any(option.startswith("--resources") for option in rest):
        limits += ["--resources", f"mem_mb={_memory_mb()}", f"cpu={processors}", f"gpu_shares={shares}"]
    return limits


def _processors():
    """Return how many processors this process may use; not every SLURM binds jobs to theirs."""
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, int(os.environ.get("SLURM_CPUS_ON_NODE", allowed)))


def _memory_mb():
    """Return the memory of this machine, or of the allocation on it, in MiB."""
    memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    allocated = int(os.environ.get("SLURM_MEM_PER_NODE", 0))
    if not allocated:
        allocated = int(os.environ.get("SLURM_MEM_PER_CPU", 0)) * int(os.environ.get("SLURM_CPUS_ON_NODE", 0))
    return min(memory_mb, allocated or memory_mb)


def _layers(options, _):
    from segtrust.layers import layers_of

    print(layers_of(options.model, _folder(options.study)))
    return 0


def _export(options, _):
    from segtrust.export import export

    print(export(_folder(options.study), options.archive, options.extras))
    return 0


def _status(options, _):
    from segtrust.status import status

    print(status(_folder(options.study)))
    return 0


def _cohort(options, _):
    from segtrust.partial import pool_finished

    print(pool_finished(options.model, _folder(options.study)))
    return 0


def _phantom(options, _):
    from segtrust.phantoms import write_cohort

    splits = {split: getattr(options, split) for split in SPLITS}
    sheet = write_cohort(options.folder, options.patients, tuple(options.shape), options.seed, splits)
    print(f"{options.patients} patients drawn; the sheet is {sheet}")
    return 0


_COMMANDS = {
    "init": _init,
    "run": _run,
    "status": _status,
    "cohort": _cohort,
    "export": _export,
    "layers": _layers,
    "phantom": _phantom,
}
