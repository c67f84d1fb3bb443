"""The workflow is clean, pinned versions agree, and every stage has its one word."""

import re
import subprocess
import sys

import pytest
import yaml

from segtrust.config import ROOT

STAGES = (
    *("preprocess", "train", "inject", "sample", "gather", "maps", "voxels", "tally"),
    *("cohort", "comparison", "report"),
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
    assert re.search(rf"^rule {stage}:", (ROOT / f"workflow/rules/{stage}.smk").read_text(), flags=re.MULTILINE)


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
