"""What a cluster with SLURM lacks for a study, told before anything is submitted, and what its failures mean.

`check` compares what the profile asks for with what `sinfo` and `sacctmgr` list. `raise_if_absent` is for a job whose
node does not see what the study was given. `words` reads Snakemake's log after a run that failed.
"""

import difflib
import getpass
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from segtrust.config import ROOT
from segtrust.errors import SegtrustError, raise_if_any
from segtrust.patients import read_sheet

SITE = "say so in the lines of profiles/slurm/config.yaml that are marked SITE"
SHARE = "Put such files on a disk that all nodes share, and name that path."
COMMAND_S = 20
# with these Snakemake submits nothing
LOOKING = frozenset(
    (
        *("--dry-run", "--dryrun", "--unlock", "--lint", "--summary", "-S", "--detailed-summary", "-D"),
        *("--dag", "--rulegraph", "--filegraph", "--d3dag", "--report", "--archive", "--touch", "-t", "--list-rules"),
        *("--list", "-l", "--list-target-rules", "--lt", "--list-changes", "--lc", "--list-untracked", "--lu"),
        *("--delete-all-output", "--delete-temp-output", "--cleanup-metadata", "--cm", "--version", "-v", "--help"),
        *("-h", "--conda-create-envs-only", "--list-conda-envs"),
    )
)
LOCAL_DISKS = ("tmpfs", "ramfs", "overlay", "squashfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs")
# states of a node that begin like this run no job until somebody changes them
UNUSABLE = ("down", "drain", "draining", "drained", "drng", "fail", "error", "maint", "unk", "inval", "future")
NAME = re.compile(r"[\w.+-]+")


@dataclass
class Partition:
    """A partition as `sinfo` lists it.

    default : whether jobs that name none go there; up : whether jobs start there
    gpus : models of its GPUs, "" where SLURM was not told any; usable : those of them on nodes that are not down
    """

    default: bool
    up: bool
    gpus: set
    usable: set


def check(profile, study, options):
    """Return what a user should know before a study is submitted to a cluster, a list of str.

    profile : Path of the folder of a Snakemake profile; nothing is checked unless its executor is SLURM
    study : Path of the study's folder
    options : options for Snakemake; nothing is checked where they only look

    Raises Problems naming everything that would keep jobs from starting: no sbatch here, no plugin, partitions,
    accounts or GPUs that the cluster does not have, paths that cannot pass through sbatch.
    """
    settings = yaml.safe_load((Path(profile) / "config.yaml").read_text(encoding="utf-8")) or {}
    executor = (values_of(options, "--executor", "-e") or [settings.get("executor")])[0]
    if executor != "slurm" or any(map(only_looks, options)):
        return []
    partitions = read_partitions(_sinfo(profile))
    config, (default, by_rule) = study_config(study, options), asked(settings, options)
    problems, notes = _path_problems(study, config), []
    if not _chosen_by_plugin(settings, options):
        problems += partition_problems(partitions, default, by_rule)
        without, notes = gpu_problems(partitions, default, by_rule, gpu_rules(config))
        problems += without
    accounts, _ = _listed("sacctmgr", "-n", "-P", "-s", "list", "user", getpass.getuser(), "format=account")
    slurm_config, _ = _listed("scontrol", "show", "config")
    problems += account_problems(accounts, slurm_config or "", default, by_rule)
    raise_if_any(problems)
    return notes + _notes_on_disks(study, config)


def only_looks(option):
    """Say whether an option lets Snakemake look and run nothing."""
    return option.partition("=")[0] in LOOKING or bool(re.fullmatch("-[a-zA-Z]*n[a-zA-Z]*", option))  # -np


def _sinfo(profile):
    """Return what `read_partitions` reads; SegtrustError where this machine cannot submit."""
    if not shutil.which("sbatch"):
        raise SegtrustError(
            f"the profile {profile} submits jobs with `sbatch`, which {socket.gethostname()} does not have; run on a "
            "login node of the cluster, perhaps after `module load slurm`, or use --profile local."
        )
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        raise SegtrustError("Snakemake's plugin for SLURM is not installed; install it: pip install 'segtrust[slurm]'.")
    listed, complaint = _listed("sinfo", "-a", "-h", "-o", "%P|%a|%G|%T")
    if listed is None:
        raise SegtrustError(f"SLURM does not answer: {complaint}")
    return listed


def _notes_on_disks(study, config):
    nodes, _ = _listed("sinfo", "-a", "-h", "-N", "-o", "%n")
    host, mounts = socket.gethostname(), Path("/proc/self/mounts")
    if not mounts.is_file() or not set((nodes or "").split()) - {host, host.split(".")[0]}:
        return []
    paths = {"the study": study, "segtrust": ROOT, "Python": Path(sys.prefix), **named_paths(study, config)}
    return disk_notes(paths, mounts.read_text(encoding="utf-8"), host)


def _listed(*command):
    """Return (what a command of SLURM says or None where it fails, its complaint)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except subprocess.TimeoutExpired:
        return None, f"`{command[0]}` has not ended within {COMMAND_S} s"
    except OSError as error:
        return None, str(error)
    return (done.stdout, "") if done.returncode == 0 else (None, done.stderr.strip())


def values_of(options, *names):
    """Return the values of an option of Snakemake in a list of options: all up to the next option."""
    values, taking = [], False
    for option in options:
        name, equals, value = option.partition("=")
        if option.startswith("-"):
            taking = name in names
            values += [value] if taking and equals else []
        elif taking:
            values.append(option)
    return values


def read_partitions(text):
    """Return {name: Partition} of the lines of `sinfo -a -h -o "%P|%a|%G|%T"`."""
    partitions = {}
    for line in text.splitlines():
        name, available, gres, state = line.strip().split("|")
        default, name = name.endswith("*"), name.removesuffix("*")
        partition = partitions.setdefault(name, Partition(default, available == "up", set(), set()))
        models = {model or "" for model in re.findall(r"(?:^|,)gpu(?::([A-Za-z][^:,(]*))?(?=[:,(]|$)", gres)}
        partition.gpus |= models
        partition.usable |= set() if state.lower().startswith(UNUSABLE) else models
    return partitions


def asked(settings, options):
    """Return ({resource: value} of all jobs, {rule: {resource: value}}) as profile and options ask; options win.

    settings : dict read from the profile's config.yaml
    """
    default = values_of(options, "--default-resources", "--default-res") or settings.get("default-resources") or {}
    by_rule = values_of(options, "--set-resources") or settings.get("set-resources") or {}
    if not isinstance(default, dict):
        default = dict(item.split("=", 1) for item in default if "=" in item)
    if not isinstance(by_rule, dict):
        items = [re.fullmatch(r"(\w+):(\w+)=(.*)", item) for item in by_rule]
        by_rule = {match[1]: {} for match in items if match}
        for match in filter(None, items):
            by_rule[match[1]][match[2]] = match[3]
    return default, by_rule


def study_config(study, options):
    """Return a study's configuration as it was written, a dict; empty where options give another."""
    if values_of(options, "--configfile", "--configfiles", "--config", "-C"):
        return {}
    try:
        read = yaml.safe_load((Path(study) / "config.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError:  # Snakemake tells where
        return {}
    return read if isinstance(read, dict) else {}


def gpu_rules(config):
    """Return the rules of a study that ask for a GPU; config : as written."""
    models = [model for model in _dict(config, "models").values() if isinstance(model, dict)]
    networks = [model for model in models if "predictions" not in model]
    if not networks or _dict(config, "sample").get("device") == "cpu":
        return []
    trained = any("train" in model for model in networks)
    injected = any("inject" in _dict(model, "stochastic") for model in networks)
    return ["sample", *(["train"] if trained else []), *(["inject"] if injected else [])]


def _dict(mapping, key):
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _chosen_by_plugin(settings, options):
    """Say whether the plugin chooses partitions from a file of their limits."""
    given = values_of(options, "--slurm-partition-config") or settings.get("slurm-partition-config")
    return bool(given or os.environ.get("SNAKEMAKE_SLURM_PARTITIONS"))


def _partitions_of(request, partitions):
    """Return the names of the partitions a job goes to, of which SLURM takes one; none where it cannot be told."""
    value = request.get("slurm_partition") or os.environ.get("SBATCH_PARTITION")
    if value:
        names = str(value).split(",")
        return names if all(NAME.fullmatch(name) for name in names) else []  # an expression of Snakemake
    return [name for name, partition in partitions.items() if partition.default]


def partition_problems(partitions, default, by_rule):
    """Return what is wrong with the partitions that jobs ask for, a list of str."""
    problems, known = [], _described(partitions)
    if not default.get("slurm_partition") and not _partitions_of({}, partitions):
        problems.append(f"no partition is named, and the cluster has none by default; {SITE}. It has {known}.")
    wanted = {}
    for rule, request in {"": default, **by_rule}.items():
        for name in _partitions_of(request, partitions) if request.get("slurm_partition") else []:
            wanted.setdefault(name, []).append(rule)
    for name, rules in wanted.items():
        of = f" (of {', '.join(filter(None, rules))})" if "" not in rules else ""
        if name not in partitions:
            close = difflib.get_close_matches(name, partitions, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            problems.append(f"slurm_partition{of}: the cluster has no partition {name!r}; {hint}It has {known}.")
        elif not partitions[name].up:
            problems.append(f"slurm_partition{of}: the partition {name!r} starts no jobs now; it has {known}.")
    return problems


def gpu_problems(partitions, default, by_rule, rules):
    """Return (problems, notes), two lists of str, about the GPUs that some rules ask for."""
    problems, notes = {}, {}
    with_gpus = {name: partition for name, partition in partitions.items() if partition.gpus}
    for rule in rules:
        request = {**default, **by_rule.get(rule, {})}
        names = [name for name in _partitions_of(request, partitions) if name in partitions]
        if not names or (str(request.get("gpu", "1")) == "0" and not request.get("gres")):
            continue
        model = str(request.get("gpu_model") or "")
        found = {name for name in names if _has(partitions[name].gpus, model)}
        what = f"GPU of model {model!r}" if model else "GPU"
        where = " and ".join(map(repr, names))
        if not found:
            problems.setdefault((what, where), []).append(rule)
        elif not any(_has(partitions[name].usable, model) for name in found):
            notes.setdefault((what, where), []).append(rule)
    there = _described(with_gpus) if with_gpus else "no node with a GPU at all"
    texts = [
        f"{', '.join(of)}: the partition {where} has no {what}; the cluster has {there}. Name another with "
        "slurm_partition or gpu_model in set-resources of the profile, or compute on processors: "
        "`sample: {device: cpu}` in config.yaml."
        for (what, where), of in problems.items()
    ]
    waits = [
        f"{', '.join(of)}: all nodes of the partition {where} with a {what} are down or drained now; jobs will wait."
        for (what, where), of in notes.items()
    ]
    return texts, waits


def _has(models, model):
    return any(not model or known in ("", model) for known in models)


def _described(partitions):
    parts = []
    for name, partition in partitions.items():
        models = sorted(model or "GPUs" for model in partition.gpus)
        more = [", ".join(models)] if models else []
        more += ["the default"] if partition.default else []
        more += [] if partition.up else ["down"]
        parts.append(f"{name} ({'; '.join(more)})" if more else name)
    return ", ".join(parts) or "no partition"


def account_problems(accounts, slurm_config, default, by_rule):
    """Return what is wrong with the accounts that jobs are charged to, a list of str.

    accounts : what `sacctmgr -n -P -s list user USER format=account` says, or None where there is no accounting
    slurm_config : what `scontrol show config` says
    """
    if accounts is None:
        return []
    known = sorted({line.strip() for line in accounts.splitlines() if line.strip()})
    enforced = re.search(r"^AccountingStorageEnforce\s*=.*\b(associations|safe|limits)\b", slurm_config, re.MULTILINE)
    if not known:
        text = "the cluster charges every job to an account, and you have none; ask its administrators for one."
        return [text] if enforced else []
    wanted = {str(request["slurm_account"]) for request in (default, *by_rule.values()) if request.get("slurm_account")}
    return [
        f"slurm_account: you have no account {name!r} on this cluster; yours are {', '.join(known)}."
        for item in sorted(wanted)
        for name in re.split(r"[,\s]+", item)
        if NAME.fullmatch(name) and name.lower() not in {account.lower() for account in known}
    ]


def named_paths(study, config):
    """Return {what: Path} of files outside a study's tables that its configuration names, and of a first scan."""
    paths = {}
    for name, model in _dict(config, "models").items():
        for key in ("bundle", "checkpoint", "predictions"):
            value = model.get(key) if isinstance(model, dict) else None
            if isinstance(value, str):
                paths[f"models.{name}.{key}"] = study / value.partition("{")[0]
    try:
        first = read_sheet(study / config.get("patients", "patients.tsv"))[0]
        paths["the scans"] = study / next(iter(first.scan.values()))
    except (SegtrustError, OSError, TypeError):  # the workflow tells what is wrong with it
        pass
    return paths


def _path_problems(study, config):
    """Return the paths that the shell between Snakemake and sbatch would change, told in a list of str."""
    paths = {"the study": study, "segtrust": ROOT, **named_paths(study, config)}
    return [
        f'{what}, {path}: a path with one of " $ ` \\ does not survive its way through sbatch; rename it.'
        for what, path in paths.items()
        if re.search(r'["$`\\]', str(path))
    ]


def disk_notes(paths, mounts, host):
    """Say which paths lie on a disk that may be of one machine alone, a list of str.

    paths : {what: Path}; mounts : text of /proc/self/mounts; host : name of this machine
    """
    lines = [line.split(" ")[1:3] for line in mounts.splitlines()]
    places = [(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place), kind) for place, kind in lines]
    alone = {}
    for what, path in paths.items():
        real = Path(path).resolve()
        kinds = [(len(place), kind) for place, kind in places if real.is_relative_to(place)]
        kind = max(kinds, key=lambda found: found[0])[1] if kinds else ""
        if kind in LOCAL_DISKS:
            alone.setdefault(kind, []).append(f"{what} ({path})")
    return [
        f"on a disk of {host} itself ({kind}): {', '.join(items)}. Unless it is exported to all nodes, jobs fail there."
        for kind, items in alone.items()
    ]


# --- in a job ---


def raise_if_absent(arguments, error_class):
    """Raise `error_class`, which takes a text, where a job's node does not see files that its study was given.

    arguments : command line of the job's Snakemake, which names the job's inputs; those under results/ may come late
        and are left out
    """
    files = values_of(arguments, "--wait-for-files")
    for path in values_of(arguments, "--wait-for-files-file"):
        files += Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
    given = [path for path in files if Path(path).parts[:1] not in (("results",), (".snakemake",))]
    missing = [os.path.abspath(path) for path in given if not os.path.exists(path) and "/.snakemake/" not in path]
    if missing:
        listed = "\n".join(f"  - {path}" for path in missing)
        raise error_class(
            f"{socket.gethostname()} does not see {len(missing)} file(s) of this job, which Snakemake sees where it "
            f"runs:\n{listed}\n{SHARE}"
        )


# --- after a run that failed ---

SBATCH = re.compile(r"message: SLURM sbatch failed\. The error message was '(.*?)'\.\n", re.DOTALL)
ACCOUNT = re.compile(
    r"message: Job submission failed with exception: (The given account .*?)For further error", re.DOTALL
)
LOGS = re.compile(
    r"^    log: (?:(?P<own>.*?), )?(?P<slurm>/.*?/\.snakemake/slurm_logs/.+?\.log) \(check log", re.MULTILINE
)
NO_OUTPUT = re.compile(r"Job \d+ completed successfully, but some output files are missing")
# what sbatch says, and what to do about it
REMEDIES = {
    "Invalid partition name": f"`sinfo` lists the partitions; {SITE}.",
    "No partition specified": f"Name one (slurm_partition); `sinfo` lists them; {SITE}.",
    "Invalid account": f"Name an account of yours for this partition (slurm_account); {SITE}. "
    "`sacctmgr show user $USER withassoc` lists them.",
    "Requested node configuration is not available": "No node of the partition has the GPUs, processors or memory that "
    f"were asked for. `sinfo -o '%P %G %c %m'` lists what there is; {SITE}.",
    "Invalid qos": 'Name one that you may use: slurm_extra: "--qos=…"; `sacctmgr show assoc user=$USER format=qos`.',
    "Requested time limit is invalid": "Take a partition that allows more (`sinfo -o '%P %l'`), or ask for less: "
    "--set-resources RULE:runtime=MINUTES.",
    "Job violates accounting/QOS policy": "Too much at a time for you there; lower `jobs` in the profile, or take "
    "another partition or account.",
    "Unable to contact slurm controller": "SLURM does not answer; try again later, or ask its administrators.",
}
_LAST_LINES, _MOST_NAMED = 8, 5


def words_of(logs):
    """Return `words` of files; logs : paths of Snakemake's own logs."""
    return words("".join(Path(log).read_text(encoding="utf-8", errors="replace") for log in logs))


def words(log):
    """Return what the failures of a run on a cluster mean, as text; empty where there was none of these.

    log : text of Snakemake's own log
    """
    if "SLURM run ID: " not in log:
        return ""
    said = Counter()
    for complaint in SBATCH.findall(log):
        text = " ".join(line.removeprefix("sbatch: error: ") for line in complaint.splitlines())
        remedy = next((remedy for start, remedy in REMEDIES.items() if start in text), "")
        said[f"SLURM did not take it: {text}. {remedy}".strip()] += 1
    for complaint in ACCOUNT.findall(log):
        said[f"SLURM did not take it: {' '.join(complaint.split())}. {REMEDIES['Invalid account']}"] += 1
    for match in LOGS.finditer(log):
        if text := _failed_job(match["own"], Path(match["slurm"])):
            said[text] += 1
    if empty := len(NO_OUTPUT.findall(log)):
        said["SLURM calls it done, but nothing was written, or it shows late here (--latency-wait)."] = empty
    parts = [f"  {count} ×: {text}".replace("\n", "\n    ") for text, count in said.most_common(_MOST_NAMED)]
    parts += [f"  … and {len(said) - _MOST_NAMED} more of this kind"] if len(said) > _MOST_NAMED else []
    return "\n".join(["On the cluster:", *parts]) if parts else ""


def _failed_job(own, slurm_log):
    """Say what SLURM's log of a failed job shows, where the job did not come as far as its own log; else ""."""
    if not slurm_log.is_file():
        study = str(slurm_log).partition("/.snakemake/")[0]
        return (
            f"ended at once and without a log. Most likely its node has no folder {study}, or may not write there; "
            "a study must lie on a disk that all nodes share."
        )
    text = slurm_log.read_text(encoding="utf-8", errors="replace")
    refused = re.search(r"^WorkflowError in file .*?\n(.*?)(?=^  File |\Z)", text, re.DOTALL | re.MULTILINE)
    if refused:
        why = refused[1].strip()
        share = "" if SHARE in why else f"\nWhat is named here is not seen from there. {SHARE}"
        return f"refused on its node, though all is sound here on {socket.gethostname()}: {why}{share}"
    if own and Path(own).is_file() and Path(own).stat().st_size:
        return ""  # shown by Snakemake
    last = "\n".join(text.strip().splitlines()[-_LAST_LINES:])
    return f"ended before it wrote a log of its own; SLURM's says:\n{last}" if last else ""
