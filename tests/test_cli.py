"""The command line: starting and running a study."""

from pathlib import Path

import pytest
import yaml
from conftest import write_patient
from test_progress import shown, terminal

from segtrust import cli
from segtrust.config import checked_config
from segtrust.patients import read_sheet


@pytest.fixture
def data(tmp_path):
    for number in range(3):
        write_patient(tmp_path / "data", f"BraTS2021_{number:05d}", number, seg=number != 2)
    return tmp_path / "data"


def test_init_writes_a_sheet_and_a_config_that_are_valid(data, tmp_path, capsys):
    assert cli.main(["init", str(data), str(tmp_path / "study")]) == 0
    patients = read_sheet(tmp_path / "study/patients.tsv")
    assert [patient.patient for patient in patients] == [f"BraTS2021_{number:05d}" for number in range(3)]
    assert all(len(patient.scan) == 4 for patient in patients)
    assert [patient.seg is None for patient in patients] == [False, False, True]
    checked_config(yaml.safe_load((tmp_path / "study/config.yaml").read_text()))
    told = capsys.readouterr().out
    assert "BraTS 2017–2021" in told
    assert "3, 2 with reference labels" in told
    assert "20×22×18 voxels of 1×1×1 mm, LPS" in told
    assert "maps only: BraTS2021_00002" in told


def test_init_writes_here_by_default(data, tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path / "study")
    assert cli.main(["init", str(data)]) == 0
    assert read_sheet("patients.tsv")[0].scan["t1"] == "../data/BraTS2021_00000/BraTS2021_00000_t1.nii.gz"


def test_init_replaces_nothing_unless_told(data, tmp_path, capsys):
    study = str(tmp_path / "study")
    cli.main(["init", str(data), study])
    (tmp_path / "study/config.yaml").write_text("mine")
    assert cli.main(["init", str(data), study]) == 1
    assert "exist already" in capsys.readouterr().err
    assert (tmp_path / "study/config.yaml").read_text() == "mine"
    assert cli.main(["init", str(data), study, "--force"]) == 0


def test_init_writes_nothing_when_a_patient_cannot_be_used(data, tmp_path, capsys):
    for number in (0, 1):
        (data / f"BraTS2021_{number:05d}" / f"BraTS2021_{number:05d}_t2.nii.gz").write_text("no image")
    assert cli.main(["init", str(data), str(tmp_path / "study")]) == 1
    told = capsys.readouterr().err
    assert "BraTS2021_00000, t2: not a readable NIfTI" in told
    assert "BraTS2021_00001, t2: not a readable NIfTI" in told
    assert not list((tmp_path / "study").iterdir())


def test_init_takes_the_coding_it_is_told(data, tmp_path):
    assert cli.main(["init", str(data), str(tmp_path / "study"), "--coding", "brats2024"]) == 0
    assert {patient.coding for patient in read_sheet(tmp_path / "study/patients.tsv")} == {"brats2024"}


def test_run_prints_the_command_it_executes_and_hands_options_on(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.yaml").write_text("")
    executed = []
    monkeypatch.setattr(cli.subprocess, "run", lambda command, **_: executed.append(command) or Done())
    assert cli.main(["run", str(tmp_path), "-n", "--cores", "2"]) == 7
    command = executed[0]
    assert command[command.index("-n") :][:3] == ["-n", "--cores", "2"]
    assert command[command.index("--directory") + 1] == str(tmp_path)
    assert "snakemake --snakefile" in capsys.readouterr().out


class Done:
    """What a finished command that failed looks like."""

    returncode = 7
    stdout = ""


def test_jobs_side_by_side_may_use_the_memory_of_the_machine(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("")
    executed = []
    monkeypatch.setattr(cli.subprocess, "run", lambda command, **_: executed.append(command) or Done())
    cli.main(["run", str(tmp_path)])
    cli.main(["run", str(tmp_path), "--resources", "mem_mb=7"])
    limits = [[option for option in command if option.startswith("mem_mb=")] for command in executed]
    assert int(limits[0][0].removeprefix("mem_mb=")) > 500
    assert limits[1] == ["mem_mb=7"]


def test_run_without_a_study_says_how_to_start_one(tmp_path, capsys):
    assert cli.main(["run", str(tmp_path)]) == 1
    assert "segtrust init FOLDER" in capsys.readouterr().err


def test_run_names_the_profiles_there_are(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    assert cli.main(["run", str(tmp_path), "--profile", "slrum"]) == 1
    assert "local" in capsys.readouterr().err


def test_phantom_draws_a_cohort_with_its_splits(tmp_path):
    folder = str(tmp_path / "demo")
    assert cli.main(["phantom", folder, "--patients", "3", "--shape", "28", "30", "26", "--train", "1"]) == 0
    patients = read_sheet(tmp_path / "demo/patients.tsv")
    assert [patient.split for patient in patients] == ["train", "test", "test"]


@pytest.mark.parametrize(
    ("arguments", "bar"),
    [
        (["init", "data", "study"], "patients checked: 3 of 3 |"),
        (["phantom", "demo", "--patients", "2", "--shape", "28", "30", "26"], "patients drawn: 2 of 2 |"),
    ],
)
def test_commands_that_take_long_show_a_bar_above_what_they_say(data, monkeypatch, arguments, bar):
    monkeypatch.chdir(data.parent)
    with terminal() as sent:
        assert cli.main(arguments) == 0
    first, *said = shown(sent())
    assert first.startswith(bar)
    assert said


def test_unknown_options_of_other_commands_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["phantom", str(tmp_path), "--patients", "1", "--colour"])


def test_a_value_of_a_snakemake_option_is_not_taken_for_the_study(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    executed = []
    monkeypatch.setattr(cli.subprocess, "run", lambda command, **_: executed.append(command) or Done())
    assert cli.main(["run", "--cores", "4"]) == 7
    assert executed[0][executed[0].index("--cores") + 1] == "4"
    assert executed[0][executed[0].index("--directory") + 1] == str(tmp_path)
    assert executed[0][executed[0].index("--directory") + 1] == str(tmp_path)


def test_a_study_behind_a_link_gets_paths_that_hold_from_inside_it(data, tmp_path, monkeypatch):
    (tmp_path / "deep/er/study").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep/er/study")
    assert cli.main(["init", str(data), str(tmp_path / "link")]) == 0
    monkeypatch.chdir(tmp_path / "link")
    assert Path(read_sheet("patients.tsv")[0].scan["t1"]).is_file()


LAYERED = {"m": {"network": {"name": "UNet-Res", "channels": [4, 8], "strides": [2]}, "checkpoint": "nowhere.pt"}}


def test_layers_prints_the_layers_of_a_model_of_a_study(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"models": LAYERED}))
    assert cli.main(["layers", "m", str(tmp_path)]) == 0
    assert "ResidualUnit" in capsys.readouterr().out


def test_layers_takes_the_study_of_this_folder_by_default(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"models": LAYERED}))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["layers", "m"]) == 0
    assert "model.0.conv.unit0" in capsys.readouterr().out


def test_layers_of_a_model_that_is_not_there_fails_in_words(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"models": LAYERED}))
    assert cli.main(["layers", "n", str(tmp_path)]) == 1
    assert "has no model n; it has m" in capsys.readouterr().err


def test_layers_without_a_study_says_how_to_start_one(tmp_path, capsys):
    assert cli.main(["layers", "m", str(tmp_path)]) == 1
    assert "segtrust init FOLDER" in capsys.readouterr().err
