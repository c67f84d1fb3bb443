"""The workflow is clean, pinned versions agree, and every stage has its one word."""

import re
import subprocess
import sys

import pytest
import yaml

from segtrust.config import ROOT

STAGES = (
    *("preprocess", "train", "inject", "sample", "gather", "maps", "voxels", "tally"),
    *("score", "cohort", "comparison", "triage", "page", "report"),
)


def pinned(text):
    """Return {package: version} of lines such as `numpy==2.4.6`, names as pip compares them."""
    found = re.findall(r"^\s*-?\s*([A-Za-z0-9_.-]+)==([^\s;]+)", text, flags=re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


CONSTRAINTS = pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))


def test_the_workflow_passes_snakemakes_lint(tmp_path):
    from conftest import write_patient, write_sheet

    write_sheet(tmp_path / "patients.tsv", [{"patient": "a", **write_patient(tmp_path, "a", 0), "split": "train"},
                                           {"patient": "b", **write_patient(tmp_path, "b", 1)}])  # fmt: skip
    model = {"network": {"name": "UNet-Res"}, "train": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"models": {"m": model}}))
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--lint", "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_word_everywhere(stage):
    assert (ROOT / f"workflow/rules/{stage}.smk").is_file()
    assert (ROOT / f"workflow/scripts/{stage}.py").is_file()
    assert (ROOT / f"segtrust/{stage}.py").is_file()
    assert (ROOT / f"tests/test_{stage}.py").is_file()
    assert re.search(
        rf"^(rule|checkpoint) {stage}:", (ROOT / f"workflow/rules/{stage}.smk").read_text(), flags=re.MULTILINE
    )


@pytest.mark.parametrize("path", sorted(ROOT.glob("envs/*.yaml")), ids=lambda path: path.name)
def test_conda_environments_pin_what_the_constraints_pin(path):
    environment = yaml.safe_load(path.read_text(encoding="utf-8"))
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    versions = pinned("\n".join(pip))
    assert versions
    assert versions == {name: CONSTRAINTS[name] for name in versions}


def test_every_dependency_of_the_package_is_pinned():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(
        r"^(?:dependencies|test|openvino|lint|slurm) = \[(.*?)\]", project, flags=re.MULTILINE | re.DOTALL
    )
    names = {re.split(r"[<>=!~]", item)[0].lower() for part in lists for item in re.findall(r'"([^"]+)"', part)}
    assert names
    assert names <= set(CONSTRAINTS)


def test_packaging_stays_below_what_snakemake_refuses():
    assert int(CONSTRAINTS["packaging"].split(".")[0]) < 26


# --- containers: two recipes of one image ---


def dockerfile():
    """Return {instruction: [arguments]} of the Dockerfile; the last of each instruction counts where it is one."""
    parts = {}
    for line in (ROOT / "containers/Dockerfile").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            parts.setdefault(name, []).append(rest)
    return parts


def definition():
    """Return {section: [lines]} of the Apptainer definition; the header has no name."""
    sections, name = {"": []}, ""
    for line in (ROOT / "containers/segtrust.def").read_text(encoding="utf-8").splitlines():
        if line.startswith("%"):
            name = line.strip()
            sections[name] = []
        elif line.strip() and not line.startswith("#"):
            sections[name].append(line.strip())
    return sections


def copied():
    """Return ({(source, target)} of the Dockerfile, the same of the definition); a target is a file's or a folder's."""
    pairs = set()
    for line in dockerfile()["COPY"]:
        *sources, target = line.split()
        pairs |= {(source, f"{target}{source}" if target.endswith("/") else target) for source in sources}
    return pairs, {tuple(line.split()) for line in definition()["%files"]}


def test_both_container_recipes_begin_with_the_same_exact_image():
    (image,) = dockerfile()["FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", image)
    assert definition()[""] == ["Bootstrap: docker", f"From: {image}"]


def test_both_container_recipes_copy_the_same_files_which_exist():
    docker, apptainer = copied()
    assert docker == apptainer
    assert [source for source, _ in docker if not (ROOT / source).exists()] == []


def test_containers_hold_all_that_the_workflow_reads():
    sources = {source for source, _ in copied()[0]}
    assert {
        "segtrust",
        "workflow",
        "profiles",
        "envs",
        "studies",
        "Snakefile",
        "pyproject.toml",
        "README.md",
    } <= sources
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a clone of git, which knows what belongs to the repository")
    parts = {path.split("/")[0] for path in listed} - sources
    apart = {"tests", "benchmarks", "docs", "containers", "Makefile", "CITATION.cff", ".ci", ".gitignore"}
    assert parts <= apart, f"neither copied into the containers nor listed here as not needed: {parts - apart}"


def test_both_container_recipes_install_the_same_by_the_constraints_alone():
    apart = dockerfile()["WORKDIR"][0]
    (run,) = dockerfile()["RUN"]
    assert definition()["%post"] == [f"cd {apart}", run]
    assert "-c constraints.txt -e '.[slurm,openvino]'" in run
    assert not re.search(r"[<>=~]=|--pre|--upgrade", run)


def test_both_containers_run_in_the_same_environment():
    assert definition()["%environment"] == [f"export {line}" for line in dockerfile()["ENV"]]
    assert dockerfile()["ENTRYPOINT"] == ['["segtrust"]']
    assert definition()["%runscript"] == ['exec segtrust "$@"']


def test_conda_environments_and_containers_have_the_same_python():
    (image,) = dockerfile()["FROM"]
    for path in ROOT.glob("envs/*.yaml"):
        environment = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert f"python={'.'.join(image.split(':')[1].split('.')[:2])}" in environment["dependencies"]
