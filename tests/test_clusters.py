"""What a cluster lacks for a study is told before anything is submitted, and its failures in words."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import write_patient, write_sheet
from test_bundle import INFERENCE, METADATA

from segtrust import cli, clusters
from segtrust.config import ROOT
from segtrust.errors import Problems, SegtrustError

# `sinfo -a -h -o "%P|%a|%G|%T"` of a cluster with three partitions, one line per state of nodes
SINFO = """\
cpu*|up|(null)|idle
gpu|up|gpu:a100:4(S:0-1)|mixed
gpu|up|gpu:a100:4(S:0-1),mps:400|drained*
gpu|up|gpu:v100:2|down*
old|down|gpu:2|idle
"""
CLUSTER = clusters.read_partitions(SINFO)
NETWORK = {"models": {"m": {"network": {"name": "UNet-Res"}, "checkpoint": "model.pt"}}}


@pytest.fixture(autouse=True)
def no_partition_of_the_environment(monkeypatch):
    for name in ("SBATCH_PARTITION", "SNAKEMAKE_SLURM_PARTITIONS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins of SLURM's commands on PATH, which say what the files beside them hold."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    says = {
        "sbatch": "",
        "sinfo": SINFO,
        "sacctmgr": "lab\nteaching\n",
        "scontrol": "AccountingStorageEnforce = associations,limits\n",
    }
    for name, text in says.items():
        (folder / f"{name}.says").write_text(text)
        # cat may be elsewhere than on the PATH of the test
        command = folder / name
        command.write_text(f'#!/bin/sh\nwhile IFS= read -r line; do echo "$line"; done < {folder}/{name}.says\n')
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(NETWORK))
    return folder


def check(study, *options):
    return clusters.check(ROOT / "profiles/slurm", study, [*options])


def problems(study, *options):
    with pytest.raises(Problems) as raised:
        check(study, *options)
    return raised.value.problems


def test_partitions_are_read_with_their_gpus_and_what_of_them_is_up():
    assert CLUSTER["cpu"] == clusters.Partition(default=True, up=True, gpus=set(), usable=set())
    assert CLUSTER["gpu"] == clusters.Partition(default=False, up=True, gpus={"a100", "v100"}, usable={"a100"})
    assert CLUSTER["old"] == clusters.Partition(default=False, up=False, gpus={""}, usable={""})


@pytest.mark.parametrize(
    "options",
    [
        ["--default-resources", "slurm_partition=gpu", "slurm_account=lab", "-T", "2"],
        ["--default-resources=slurm_partition=gpu", "--verbose"],
    ],
)
def test_what_options_ask_for_wins_over_the_profile(options):
    default, _ = clusters.asked({"default-resources": {"slurm_partition": "cpu"}}, options)
    assert default["slurm_partition"] == "gpu"


@pytest.mark.parametrize("form", [{"sample": {"gpu_model": "a100"}}, ["sample:gpu_model=a100"]])
def test_a_profile_may_write_resources_of_rules_in_both_of_snakemakes_ways(form):
    assert clusters.asked({"set-resources": form}, [])[1] == {"sample": {"gpu_model": "a100"}}


def test_an_unknown_partition_is_told_with_those_there_are():
    (problem,) = clusters.partition_problems(CLUSTER, {"slurm_partition": "gpus"}, {})
    assert "no partition 'gpus'; did you mean 'gpu'?" in problem
    assert "cpu (the default), gpu (a100, v100), old (GPUs; down)" in problem


def test_partitions_of_single_rules_are_checked_too():
    found = clusters.partition_problems(CLUSTER, {}, {"sample": {"slurm_partition": "gpux"}, "train": {"gpu": 1}})
    assert len(found) == 1
    assert "slurm_partition (of sample)" in found[0]


def test_a_partition_that_is_closed_is_told():
    assert "starts no jobs now" in clusters.partition_problems(CLUSTER, {"slurm_partition": "old"}, {})[0]


def test_no_partition_named_where_the_cluster_has_no_default_is_told():
    partitions = clusters.read_partitions(SINFO.replace("*|up", "|up"))
    (problem,) = clusters.partition_problems(partitions, {}, {})
    assert "no partition is named, and the cluster has none by default" in problem
    assert "SITE" in problem


@pytest.mark.parametrize("request_", [{}, {"slurm_partition": "gpu"}, {"slurm_partition": "cpu,gpu"}])
def test_partitions_that_exist_are_no_problem(request_):
    assert clusters.partition_problems(CLUSTER, request_, {}) == []


def test_an_expression_of_snakemake_in_the_place_of_a_partition_is_not_judged():
    assert clusters.partition_problems(CLUSTER, {"slurm_partition": "'a' if attempt > 1 else 'b'"}, {}) == []


@pytest.mark.parametrize(
    ("default", "by_rule", "told"),
    [
        ({}, {}, "the partition 'cpu' has no GPU;"),
        ({"slurm_partition": "gpu"}, {"sample": {"gpu_model": "h100"}}, "has no GPU of model 'h100'"),
        ({"slurm_partition": "gpu"}, {"sample": {"slurm_partition": "cpu"}}, "the partition 'cpu' has no GPU;"),
        ({}, {"sample": {"gpu": 0, "gres": "gpu:1"}}, "the partition 'cpu' has no GPU;"),
    ],
)
def test_gpus_that_a_partition_lacks_are_told_with_where_there_are_some(default, by_rule, told):
    (problem,), notes = clusters.gpu_problems(CLUSTER, default, by_rule, ["sample"])
    assert told in problem
    assert "the cluster has gpu (a100, v100), old (GPUs; down)" in problem
    assert "device: cpu" in problem
    assert notes == []


@pytest.mark.parametrize(
    ("default", "by_rule"),
    [
        ({"slurm_partition": "gpu"}, {}),
        ({"slurm_partition": "cpu,gpu"}, {}),
        ({}, {"sample": {"slurm_partition": "gpu", "gpu_model": "a100"}}),
        ({"slurm_partition": "old"}, {"sample": {"gpu_model": "a100"}}),  # SLURM was told no models there
        ({}, {"sample": {"gpu": 0}}),
        ({"slurm_partition": "unknown"}, {}),  # told as such
    ],
)
def test_gpus_that_are_there_or_not_asked_for_are_no_problem(default, by_rule):
    assert clusters.gpu_problems(CLUSTER, default, by_rule, ["sample"]) == ([], [])


def test_gpus_all_of_whose_nodes_are_down_are_a_note():
    by_rule = {"sample": {"gpu_model": "v100"}}
    found, notes = clusters.gpu_problems(CLUSTER, {"slurm_partition": "gpu"}, by_rule, ["sample"])
    assert found == []
    assert "are down or drained now; jobs will wait" in notes[0]


def test_a_cluster_without_any_gpu_is_called_so():
    partitions = clusters.read_partitions("cpu*|up|(null)|idle")
    (problem,), _ = clusters.gpu_problems(partitions, {}, {}, ["sample", "train"])
    assert problem.startswith("sample, train: ")
    assert "no node with a GPU at all" in problem


@pytest.mark.parametrize(
    ("config", "rules"),
    [
        (NETWORK, ["sample"]),
        ({**NETWORK, "sample": {"device": "cpu"}}, []),
        ({"models": {"m": {"predictions": "{patient}.nii.gz"}}}, []),
        ({"models": {"m": {"network": {}, "train": {}, "stochastic": {"inject": {}}}}}, ["sample", "train", "inject"]),
        ({"models": "broken"}, []),
    ],
)
def test_only_networks_on_gpus_ask_for_gpus(config, rules):
    assert clusters.gpu_rules(config) == rules


def test_an_account_one_does_not_have_is_told_with_those_one_has():
    (problem,) = clusters.account_problems("lab\nteaching\n", "", {"slurm_account": "labb"}, {})
    assert "no account 'labb'" in problem
    assert "lab, teaching" in problem


def test_accounts_are_compared_as_slurm_does_and_need_not_be_named():
    assert clusters.account_problems("lab\n", "", {"slurm_account": "LAB"}, {}) == []
    assert clusters.account_problems("lab\n", "AccountingStorageEnforce = associations", {}, {}) == []
    assert clusters.account_problems(None, "", {"slurm_account": "any"}, {}) == []


@pytest.mark.parametrize(("enforced", "n"), [("associations,limits", 1), ("none", 0)])
def test_having_no_account_matters_where_the_cluster_wants_one(enforced, n):
    found = clusters.account_problems("", f"AccountingStorageEnforce = {enforced}\n", {}, {})
    assert len(found) == n


def test_all_problems_are_told_at_once(slurm, study):
    found = problems(study, "--default-resources", "slurm_partition=nowhere", "slurm_account=labb", "--set-resources",
                     "sample:slurm_partition=cpu")  # fmt: skip
    assert [re.match(r"[\w, ]+", problem)[0].split()[0] for problem in found] == [
        "slurm_partition",
        "sample",
        "slurm_account",
    ]


def test_a_study_that_the_cluster_can_run_is_let_through(slurm, study):
    (slurm / "sinfo.says").write_text(SINFO.replace("cpu*", "cpu").replace("gpu|up", "gpu*|up"))
    assert [note for note in check(study) if "down or drained" in note] == []


@pytest.mark.parametrize("options", [["-n"], ["-np"], ["--unlock"], ["--report=report.zip"], ["--executor", "local"]])
def test_nothing_is_checked_where_nothing_is_submitted(study, monkeypatch, options):
    monkeypatch.setenv("PATH", str(study))
    assert check(study, *options) == []
    with pytest.raises(SegtrustError):
        check(study)


def test_the_local_profile_needs_no_cluster(study, monkeypatch):
    monkeypatch.setenv("PATH", str(study))
    assert clusters.check(ROOT / "profiles/local", study, []) == []


def test_a_machine_without_sbatch_is_told_where_to_go(study, monkeypatch):
    monkeypatch.setenv("PATH", str(study))
    with pytest.raises(SegtrustError, match=rf"`sbatch`, which {socket.gethostname()} does not have; run on a login"):
        check(study)


def test_a_slurm_that_does_not_answer_is_quoted(slurm, study):
    (slurm / "sinfo").write_text("#!/bin/sh\necho 'slurm_load_partitions: Unable to contact' >&2\nexit 1\n")
    with pytest.raises(SegtrustError, match="SLURM does not answer: slurm_load_partitions: Unable to contact"):
        check(study)


def test_a_study_whose_device_an_option_gives_is_not_judged_by_its_file(slurm, study):
    (slurm / "sinfo.says").write_text("cpu*|up|(null)|idle\n")
    assert "has no GPU" in problems(study)[0]
    check(study, "--configfile", "other.yaml")


@pytest.mark.parametrize("name", ['a "b"', "a$HOME", "a`b`"])
def test_paths_that_the_shell_would_change_are_refused(slurm, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"sample": {"device": "cpu"}}))
    (problem,) = problems(folder)
    assert str(folder) in problem


def test_paths_with_spaces_and_letters_that_are_not_ascii_are_not(slurm, tmp_path):
    folder = tmp_path / "Studie für «Zürich» (é, 脑)"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"sample": {"device": "cpu"}}))
    check(folder)


MOUNTS = r"""/dev/sda1 / ext4 rw 0 0
tmpfs /local tmpfs rw 0 0
nas:/home /home nfs4 rw 0 0
/dev/sdb1 /home/odd\040name xfs rw 0 0
scratch /scratch lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/local/study", "tmpfs"),
        ("/data/study", "ext4"),
        ("/home/me/study", None),
        ("/home/odd name/study", "xfs"),
        ("/scratch/me", None),
    ],
)
def test_paths_on_a_disk_of_this_machine_are_noted(path, kind):
    notes = clusters.disk_notes({"the study": Path(path)}, MOUNTS, "login1")
    assert [f"on a disk of login1 itself ({kind}): the study ({path})" in note for note in notes] == (
        [True] if kind else []
    )


def test_notes_on_disks_need_a_node_that_is_another_machine(slurm, study, monkeypatch):
    (study / "config.yaml").write_text(yaml.safe_dump({"sample": {"device": "cpu"}}))
    monkeypatch.setattr(clusters, "disk_notes", lambda paths, mounts, host: [f"{len(paths)} paths"])
    command = '#!/bin/sh\ncase "$*" in *-N*) echo {};; *) echo "cpu*|up|(null)|idle";; esac\n'
    (slurm / "sinfo").write_text(command.format(socket.gethostname()))
    assert check(study) == []
    (slurm / "sinfo").write_text(command.format("node1"))
    assert check(study) == ["3 paths"]


def test_named_paths_are_those_of_the_models_and_a_scan(tmp_path):
    write_sheet(tmp_path / "patients.tsv", [{"patient": "a", **write_patient(tmp_path / "data", "a", 0)}])
    models = {
        "g": {"checkpoint": "w/model.pt"},
        "p": {"predictions": "/there/{patient}_{pass}.nii.gz"},
        "b": {"bundle": "b"},
        "t": {"checkpoint": {"model": "g"}},
    }
    paths = clusters.named_paths(tmp_path, {"models": models})
    assert paths == {
        "models.g.checkpoint": tmp_path / "w/model.pt",
        "models.p.predictions": Path("/there/"),
        "models.b.bundle": tmp_path / "b",
        "the scans": tmp_path / "data/a/a_t1.nii.gz",
    }


def in_a_file(paths):
    Path("waited").write_text("\n".join(paths), encoding="utf-8")
    return ["--force", "--wait-for-files-file", "waited"]


@pytest.mark.parametrize("option", [lambda paths: ["--wait-for-files", *paths, "--force"], in_a_file])
def test_a_job_names_the_given_files_that_its_node_does_not_see(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.nii.gz").touch()
    late = ["results/preprocessed/a.safetensors", str(tmp_path / ".snakemake/tmp.x")]
    clusters.raise_if_absent(["--wait-for-files", "there.nii.gz", *late, "--force", "absent"], SegtrustError)
    absent = ["there.nii.gz", "data/a b.nii.gz", "/local/model.pt", *late]
    with pytest.raises(SegtrustError) as raised:
        clusters.raise_if_absent(option(absent), SegtrustError)
    text = str(raised.value)
    assert socket.gethostname() in text
    assert re.findall("^  - (.*)$", text, flags=re.MULTILINE) == [f"{tmp_path}/data/a b.nii.gz", "/local/model.pt"]
    assert "a disk that all nodes share" in text


# --- words of failures, from logs as Snakemake 9.27.1 with version 2.8.0 of its plugin writes them ---

HEAD = "SLURM run ID: 0465f4c8-5ffb-4485-abf2-d1b54969a17b\n"
FAILED = """
Error in rule preprocess:
    message: SLURM-job '5' failed, SLURM status is: 'FAILED'. Detailed failure reason unavailable (status command is \
not 'sacct').For further error details see the cluster/cloud log and the log files of the involved rule(s).
    jobid: 1
    input: data/p2/p2_t1.nii.gz
    output: results/preprocessed/p2.safetensors
    log: {own}, {slurm} (check log file(s) for error details)
    external_jobid: 5
"""


def failed(folder, slurm_says=None, own_says=None):
    """Return the part of a log about a failed job of a study in `folder` with a comma in its name."""
    slurm, own = (
        folder / "a, b/.snakemake/slurm_logs/rule_preprocess/p 2/5.log",
        folder / "a, b/logs/preprocess/p 2.log",
    )
    for path, text in ((slurm, slurm_says), (own, own_says)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            path.write_text(text)
    return FAILED.format(own=own, slurm=slurm)


@pytest.mark.parametrize(
    ("complaint", "remedy"),
    [
        ("invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition name specified",
         "`sinfo` lists the partitions"),
        ("Batch job submission failed: No partition specified or system default partition", "Name one"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "sacctmgr"),
        ("Batch job submission failed: Requested node configuration is not available", "GPUs, processors or memory"),
        ("Batch job submission failed: a new reason", ""),
    ],
)  # fmt: skip
def test_what_sbatch_refuses_is_told_once_with_a_remedy(complaint, remedy):
    log = (
        "Error in rule a:\n"
        f"    message: SLURM sbatch failed. The error message was 'sbatch: error: {complaint}'.\n"
        "    sbatch call:\n        sbatch --parsable …\n"
    )
    text = clusters.words(HEAD + 3 * log)
    assert "3 ×: SLURM did not take it: " in text
    assert complaint.rpartition("error: ")[2] in text
    assert remedy in text
    assert len(text.splitlines()) == 2


def test_an_account_that_the_plugin_refuses_is_told():
    log = (
        "    message: Job submission failed with exception: The given account x appears to be invalid. Available "
        "accounts:\nroot, labFor further error details see the cluster/cloud log"
    )
    text = clusters.words(HEAD + log)
    assert "Available accounts: root, lab. Name an account" in text


def test_a_study_that_a_node_does_not_see_is_told_where_slurm_left_no_log(tmp_path):
    text = clusters.words(HEAD + failed(tmp_path))
    assert f"no folder {tmp_path}/a, b, or may not write there" in text
    assert "all nodes share" in text


def test_what_the_workflow_says_on_a_node_is_shown(tmp_path):
    said = (
        'WorkflowError in file "/x/workflow/rules/common.smk", line 18:\n1 problem found:\n'
        '  - models.m: there is no checkpoint /local/model.pt.\n  File "/x/workflow/rules/common.smk", line 18\n'
    )
    text = clusters.words(HEAD + failed(tmp_path, said, own_says="from an earlier run"))
    assert "refused on its node, though all is sound here" in text
    assert "there is no checkpoint /local/model.pt." in text
    assert "File" not in text
    assert text.count("a disk that all nodes share") == 1


def test_a_job_that_has_a_log_of_its_own_is_left_to_snakemake(tmp_path):
    assert clusters.words(HEAD + failed(tmp_path, "slurmstepd: error", own_says="preprocess: p2: damaged")) == ""


def test_the_end_of_slurms_log_is_shown_where_there_is_no_other(tmp_path):
    text = clusters.words(HEAD + failed(tmp_path, "\n".join(f"line {number}" for number in range(100))))
    assert "line 99" in text
    assert "line 50" not in text


def test_of_many_failures_the_most_frequent_are_shown():
    log = "".join(
        f"    message: SLURM sbatch failed. The error message was 'sbatch: error: reason {number}'.\n"
        for number in range(8)
        for _ in range(number + 1)
    )
    text = clusters.words(HEAD + log)
    assert "8 ×: SLURM did not take it: reason 7" in text
    assert "reason 1" not in text
    assert "and 3 more" in text


def test_a_run_without_slurm_has_no_words_of_it(tmp_path):
    assert clusters.words(failed(tmp_path)) == ""
    assert clusters.words(HEAD) == ""


# --- the command and the workflow ---


def test_run_tells_what_the_cluster_lacks_and_starts_nothing(slurm, study, capsys, monkeypatch):
    monkeypatch.setattr(cli.subprocess, "run", lambda command, **_: pytest.fail(f"executed {command}"))
    monkeypatch.setattr(clusters, "_listed", lambda *command: (SINFO if command[0] == "sinfo" else "", ""))
    assert cli.main(["run", str(study), "--profile", "slurm"]) == 1
    assert "sample: the partition 'cpu' has no GPU" in capsys.readouterr().err


def test_notes_are_shown_and_the_run_goes_on(study, capsys, monkeypatch):
    monkeypatch.setattr(clusters, "check", lambda profile, study, options: ["jobs will wait"])
    monkeypatch.setattr(cli.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 7))
    assert cli.main(["run", str(study), "--profile", "slurm"]) == 7
    assert "segtrust run: jobs will wait" in capsys.readouterr().err


def test_a_package_without_its_workflow_says_how_to_install_it(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert cli.main(["run", str(study)]) == 1
    assert f"no Snakefile in {tmp_path}" in capsys.readouterr().err


def snakemake(folder, *arguments, expect):
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-n", *arguments]
    command += ["--workflow-profile", str(ROOT / "profiles/local")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_called_in_a_folder_that_is_no_study_the_file_that_is_missing_is_named(tmp_path):
    assert re.search(rf"config\.yaml.*not present.*{tmp_path}/config\.yaml", snakemake(tmp_path, expect=1))


@pytest.mark.slow
def test_studies_scans_bundles_checkpoints_and_predictions_may_have_any_letters_in_their_paths(tmp_path):
    study = tmp_path / "Étude n° 1 – «Zürich», 脑"
    (study / "bündel (1)/models").mkdir(parents=True)
    (study / "bündel (1)/configs").mkdir()
    for name, content in (("inference", INFERENCE), ("metadata", METADATA)):
        (study / f"bündel (1)/configs/{name}.json").write_text(json.dumps(content))
    for path in ("bündel (1)/models/model.pt", "modèle 2.pt"):
        (study / path).write_bytes(b"weights")
    write_sheet(study / "patients.tsv", [{"patient": "a", **write_patient(study / "données été", "a", 0)}])
    scan = study / "données été/a/a_t1.nii.gz"
    (study / "prédictions ü").mkdir()
    (study / "prédictions ü/a b.nii.gz").write_bytes(scan.read_bytes())
    models = {
        "bundle": {"bundle": "bündel (1)"},
        "given": {**NETWORK["models"]["m"], "checkpoint": "modèle 2.pt"},
        "elsewhere": {"predictions": "prédictions ü/{patient} b.nii.gz", "outputs": ["TC", "WT", "ET"]},
    }
    config = {"models": models, "sample": {"device": "cpu"}}
    (study / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    said = snakemake(tmp_path, "--directory", str(study), expect=0)
    for path in ("bündel (1)/models/model.pt", "modèle 2.pt", "prédictions ü/a b.nii.gz", str(scan)):
        assert path in said
