"""Models as the workflow sees them: what kind each is, the settings that change its numbers, and its files."""

from dataclasses import dataclass
from pathlib import Path

from segtrust.bundle import read_bundle
from segtrust.config import VIEW_KEYS, view_defaults
from segtrust.errors import SegtrustError, raise_if_any
from segtrust.gather import find_passes
from segtrust.moments import block_ends

# of a model's settings, those that the course of a training depends on
TRAINED_KEYS = ("channels", "outputs", "window", "overlap", "seed")


@dataclass(frozen=True)
class Model:
    """One entry of `config["models"]`.

    name : checked identifier
    source : word for where passes come from; begins the names of files in samples/
    settings : what changes the numbers of a pass, JSON-able: `network`, `backend`, and `sample` as
        `segtrust.sample.sample` takes it; for predictions, the order of their channels
    checkpoint : path of given weights, or None
    trained_as : name of the model under which the weights are trained here, or None
    train : training settings, or None
    predictions : pattern of files made elsewhere, or None
    """

    name: str
    source: str
    settings: dict
    checkpoint: str | None = None
    trained_as: str | None = None
    train: dict | None = None
    predictions: str | None = None

    @property
    def is_network(self):
        """Say whether passes are drawn here, rather than gathered."""
        return self.predictions is None

    @property
    def train_settings(self):
        """Return what changes the weights that training gives, JSON-able."""
        view = {key: self.settings["sample"][key] for key in TRAINED_KEYS}
        return {"network": self.settings["network"], **view, "train": self.train}


def read_models(config):
    """Return the models of a checked configuration, a dict by name.

    Raises Problems naming every bundle that cannot be used and every checkpoint that is not there.
    """
    models, problems = {}, []
    for name, entry in config["models"].items():
        try:
            models[name] = _model(name, entry, config)
        except SegtrustError as error:
            problems.append(f"models.{name}: {error}")
    for name, model in models.items():
        if model.checkpoint and not Path(model.checkpoint).is_file():
            problems.append(f"models.{name}: there is no checkpoint {model.checkpoint}.")
    raise_if_any(problems)
    return models


def _model(name, entry, config):
    view = {key: entry[key] for key in VIEW_KEYS if key in entry}
    if "predictions" in entry:
        return Model(name, "predictions", {"outputs": entry["outputs"]}, predictions=entry["predictions"])
    network, checkpoint, trained_as = entry.get("network"), entry.get("checkpoint"), None
    if "bundle" in entry:
        bundle = read_bundle(entry["bundle"])
        network = bundle["network"]
        said = {key: bundle[key] for key in VIEW_KEYS if bundle[key] is not None}
        view = {**view_defaults(), **said, **view}
        checkpoint = checkpoint or str(bundle["checkpoint"])
    if isinstance(checkpoint, dict):
        trained_as, checkpoint = checkpoint["model"], None
    if "train" in entry:
        trained_as = name
    settings = {
        "network": network,
        "backend": "torch",
        "sample": {**view, "precision": config["sample"]["precision"], "seed": config["seed"]},
    }
    return Model(name, "dropout", settings, checkpoint, trained_as, entry.get("train"))


def passes_of(model, patients, passes):
    """Return T, the number of passes that every patient has under a model.

    patients : ids of the sampled patients
    passes : `config["sample"]["passes"]`, which holds for networks

    Raises Problems naming the patients without predictions, and those with another number of passes than most.
    """
    if model.is_network:
        return passes
    found, problems = {}, []
    for patient in patients:
        try:
            found[patient] = len(find_passes(model.predictions, patient))
        except SegtrustError as error:
            problems.append(f"models.{model.name}: {error}")
    raise_if_any(problems)
    numbers = list(found.values()) or [0]  # no patient to sample is told of elsewhere
    usual = max(set(numbers), key=numbers.count)
    raise_if_any(
        [
            f"models.{model.name}: {patient} has {number} passes, the others have {usual}."
            for patient, number in found.items()
            if number != usual
        ]
    )
    return usual


def plan_chunks(existing, passes, per_job):
    """Return the chunks (first, last) of passes, last included, that give passes 0 … passes - 1.

    existing : chunks that files hold already
    per_job : most passes of a new chunk, or None for no limit; new chunks end before its multiples

    Chunks that exist are kept wherever they fit, so that more passes draw only the new ones and a changed
    `passes_per_job` draws none. A chunk that reaches beyond T serves when T ends one of its blocks.
    """
    held = sorted(existing, key=lambda chunk: (chunk[0], -chunk[1]))
    chunks, position = [], 0
    while position < passes:
        chunk = next(
            (
                (first, last)
                for first, last in held
                if first == position and (last < passes or passes in block_ends(last + 1))
            ),
            None,
        )
        if chunk is None:
            limit = passes if per_job is None else (position // per_job + 1) * per_job
            chunk = (position, min(limit, passes) - 1)
        chunks.append(chunk)
        position = chunk[1] + 1
    return chunks
