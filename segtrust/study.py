"""A study: its configuration, patients and models, checked together before anything runs."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from segtrust.config import checked_config
from segtrust.errors import Problems, SegtrustError, raise_if_any
from segtrust.files import canonical_json, read_json
from segtrust.gather import companions, find_passes
from segtrust.jobs import input_state
from segtrust.models import passes_of, plan_chunks, read_models
from segtrust.patients import SAMPLED_SPLITS, header_problems, read_sheet


@dataclass(frozen=True)
class Study:
    """What the rules of the workflow ask.

    config : dict with all defaults filled in
    patients : dict from id to Patient, in the sheet's order, without those left out
    models : dict from name to Model
    passes : dict from the name of a model to the number of passes from each of its sources
    left_out : dict from the id of a patient left out of everything to the reason
    """

    config: dict
    patients: dict
    models: dict
    passes: dict
    left_out: dict

    @property
    def sampled(self):
        """Return the ids of the patients that passes are drawn for (splits calibration and test)."""
        return [name for name, patient in self.patients.items() if patient.split in SAMPLED_SPLITS]

    @property
    def evaluated(self):
        """Return the ids of the sampled patients that have a reference."""
        return [name for name in self.sampled if self.patients[name].seg]

    @property
    def tested(self):
        """Return the ids of the patients of split test, with a reference or without one."""
        return self.of_split("test")

    @property
    def scored(self):
        """Return the ids of the test patients without a reference, of whom uncertainty and volumes are all there is."""
        return [name for name in self.tested if not self.patients[name].seg]

    @property
    def has_cohort(self):
        """Say whether there is a patient of split test with a reference, so that tables can be made."""
        return any(self.patients[name].split == "test" for name in self.evaluated)

    @property
    def not_evaluated(self):
        """Return why patients of the study are in no table of the cohort, a dict from id to reason."""
        without = {name: "no reference (seg is empty)" for name in self.sampled if not self.patients[name].seg}
        return {**self.left_out, **without}

    def rows(self, names):
        """Return patients as one canonical JSON text: what a table needs to know about each, in the sheet's order."""
        return canonical_json([asdict(self.patients[name]) for name in names])

    def of_split(self, *splits):
        """Return the ids of the patients of some splits, sorted: no training depends on the order of the sheet."""
        return sorted(name for name, patient in self.patients.items() if patient.split in splits)

    def chunks(self, model, patient):
        """Return the files of passes that a patient needs under a model, planned around those that exist.

        Predictions made elsewhere are gathered into one file.
        """
        folder = Path("results") / model / "samples" / patient
        is_network, passes = self.models[model].is_network, self.passes[model]
        names = [path.name for path in folder.iterdir()] if is_network and folder.is_dir() else []
        per_job = self.config["sample"]["passes_per_job"] if is_network else None
        chunks = []
        for source in self.models[model].sources:
            pattern = re.compile(re.escape(source) + r"_(\d+)-(\d+)\.safetensors")
            existing = [tuple(map(int, match.groups())) for name in names if (match := pattern.fullmatch(name))]
            planned = plan_chunks(existing, passes, per_job)
            chunks += [f"{folder}/{source}_{first}-{last}.safetensors" for first, last in planned]
        return chunks

    @property
    def fitting(self):
        """Return the ids of the patients that dropout rates and scales are fitted on: calibration, with a reference."""
        return [name for name in self.of_split("calibration") if self.patients[name].seg]

    def sources(self):
        """Say where the passes of each model come from, a dict from model to text."""
        return {name: model.described(self.passes[name]) for name, model in self.models.items()}

    def settings(self, stage):
        """Return the settings of a stage as one canonical JSON text."""
        return canonical_json(self.config[stage])

    def report_settings(self):
        """Return the settings of the report's first page as one canonical JSON text; it shows no patients' pages."""
        return canonical_json({name: value for name, value in self.config["report"].items() if name != "pages"})

    def advice(self):
        """Say what to do about the patients whose content made jobs fail, as text."""
        failed = failures(self.patients, self.config["models"])
        if not failed:
            return "A job failed; its log is named above. What is finished is kept: run the same command again."
        lines = [f"  {reason}" for reason in failed.values()]
        if self.config["on_bad_patient"] == "exclude":
            advice = "Run again: they are left out until their files change, and the report says so."
        else:
            advice = "Mend the files and run again, or set `on_bad_patient: exclude` to finish without them."
        return "\n".join([f"{len(failed)} patient(s) could not be used:", *lines, advice])

    def cohort_settings(self):
        """Return what `segtrust.cohort.cohort` takes, as one canonical JSON text."""
        settings = self.config["cohort"]
        more = {"failure_dice": settings["failure_dice"], "groups": settings["groups"]}
        return canonical_json({**self._resampling, **more})

    def comparison_settings(self):
        """Return what `segtrust.comparison.comparison` takes, as one canonical JSON text."""
        return canonical_json(self._resampling)

    @property
    def _resampling(self):
        settings = self.config["cohort"]
        return {"n_resamples": settings["resamples"], "n_bins": settings["bins"], "seed": self.config["seed"]}


def read_study(config, check_headers):
    """Return the Study that a raw configuration describes, read from the working folder.

    check_headers : whether to open the header of every file; needed wherever patients may be left out

    Raises Problems with everything that can be seen wrong, of all patients and models together.
    """
    config = checked_config(config)
    patients = {patient.patient: patient for patient in read_sheet(config["patients"])}
    exclude = config["on_bad_patient"] == "exclude"
    bad = header_problems(patients.values()) if check_headers or exclude else {}
    left_out = {}
    if exclude:
        left_out = {name: " ".join(messages) for name, messages in bad.items()} | failures(patients, config["models"])
        bad = {}
    kept = {name: patient for name, patient in patients.items() if name not in left_out}
    problems = [message for messages in bad.values() for message in messages] + _split_problems(kept.values(), config)
    models, of_models = read_models(config)
    problems += of_models
    sampled = [name for name, patient in kept.items() if patient.split in SAMPLED_SPLITS]
    # all patients have equally many passes: who has checked that once need not look for everybody's files again
    counted = sampled if check_headers else sampled[:1]
    passes = {}
    for name, model in models.items():
        try:
            passes[name] = passes_of(model, counted, config["sample"]["passes"])
        except Problems as error:
            problems += error.problems
    study = Study(config, kept, models, passes, left_out)
    problems += [
        f"models.{name}: inject.rate auto is chosen on patients of split calibration with a reference, of which "
        f"{config['patients']} has none; mark some, or give a rate."
        for name, model in models.items()
        if model.inject and model.inject["rate"] == "auto" and not study.fitting
    ]
    if config["report"]["pages"] != "none" and "probability" not in config["maps"]["write"]:
        problems.append(
            "config.yaml: report.pages shows the map `probability`, which maps.write leaves out; add it there, or say "
            "`pages: none`."
        )
    raise_if_any(problems)
    return study


def _split_problems(patients, config):
    problems, splits = [], {}
    for patient in patients:
        splits.setdefault(patient.subject, {}).setdefault(patient.split, []).append(patient.patient)
    for subject, found in splits.items():
        if len(found) > 1:
            listed = "; ".join(f"{', '.join(names)} in {split}" for split, names in found.items())
            problems.append(f"subject {subject}: sessions of one person must share a split, found {listed}.")
    present = {split for found in splits.values() for split in found}
    if not present & set(SAMPLED_SPLITS):
        problems.append(
            f"{config['patients']}: no patient of split test (or calibration), so nothing could be evaluated; found "
            f"{', '.join(sorted(present)) or 'none left'}. An empty split means test."
        )
    untrained = [name for name, model in config["models"].items() if "train" in model]
    if untrained and "train" not in present:
        problems.append(
            f"models.{', models.'.join(untrained)}: to be trained here, but {config['patients']} has no patient of "
            "split train."
        )
    problems += [
        f"{patient.patient}: split {patient.split} needs a reference, but seg is empty."
        for patient in patients
        if untrained and patient.split in ("train", "validation") and not patient.seg
    ]
    return problems


def failures(patients, models):
    """Return why patients' content made jobs fail, a dict from id, where neither sheet nor files changed since.

    patients : dict from id to Patient; models : `config["models"]`
    """
    found = {}
    for path in sorted(Path("results/failed").rglob("*.json")):
        record = read_json(path)
        patient = patients.get(record["patient"])
        if patient and _still_asked(record, patient, models) and all(_unchanged(state) for state in record["inputs"]):
            found[record["patient"]] = f"{record['stage']}: {record['reason']}"
    return found


def _still_asked(record, patient, models):
    """Say whether the study still has the model, the coding and the files that a failure was about."""
    if record["model"] is not None and record["model"] not in models:
        return False
    named = set(patient.files.values())
    pattern = models.get(record["model"], {}).get("predictions")
    if pattern:
        try:
            for path in find_passes(pattern, patient.patient).values():
                named |= {path, *companions(path)}
        except SegtrustError:
            return False  # told of where passes are counted
    given = {state["path"] for state in record["inputs"] if not state["path"].startswith("results/")}
    return given <= named and record.get("coding") in (None, patient.coding)


def _unchanged(state):
    path = Path(state["path"])
    return path.exists() and input_state(path) == state


def study_or_message(config, check_headers, error_class):
    """Return `read_study(…)`; raise `error_class` with the plain message where a study has problems."""
    try:
        return read_study(config, check_headers)
    except SegtrustError as error:
        raise error_class(str(error)) from None
