"""Models as the workflow sees them: what kind each is, the settings that change its numbers, and its files."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from segtrust.bundle import read_bundle
from segtrust.config import VIEW_KEYS, view_defaults
from segtrust.errors import SegtrustError, raise_if_any
from segtrust.gather import find_passes
from segtrust.provenance import file_digest
from segtrust.sources import PREDICTIONS, block_ends, source_named, sources_of

# of a model's settings, those that the course of a training depends on
TRAINED_KEYS = ("channels", "outputs", "window", "overlap")


@dataclass(frozen=True)
class Weights:
    """The weights of one member: a file that is given, or the name of the model under which they are trained here."""

    path: str | None = None
    trained_as: str | None = None

    @property
    def file(self):
        """Return the path of the checkpoint."""
        return self.path or f"results/{self.trained_as}/train/checkpoint.pt"


@dataclass(frozen=True)
class Model:
    """One entry of `config["models"]`.

    name : checked identifier
    settings : what changes the numbers of a pass, JSON-able: `network`, `stochastic` (dropout and inject), `backend`,
        `precision`, and `sample` as `segtrust.sample.sample` takes it; for predictions, their `outputs`
    members : tuple of Weights, one per checkpoint; empty for predictions
    axes : tuple of the axes along which scans are flipped
    passes : dropout passes of each source, or None for `config["sample"]["passes"]`
    train : training settings, or None
    predictions : pattern of files made elsewhere, or None
    """

    name: str
    settings: dict
    members: tuple = ()
    axes: tuple = ()
    passes: int | None = None
    train: dict | None = None
    predictions: str | None = None

    @property
    def is_network(self):
        """Say whether passes are drawn here, rather than gathered."""
        return self.predictions is None

    @property
    def sources(self):
        """Return the names of the sources of passes, in order."""
        if not self.is_network:
            return [PREDICTIONS]
        return [source.name for source in sources_of(len(self.members), self.axes)]

    @property
    def inject(self):
        """Return the settings of injected dropout, or None."""
        return self.settings["stochastic"]["inject"] if self.is_network else None

    @property
    def has_dropout(self):
        """Say whether a source is asked for more than one pass."""
        return self.is_network and (self.settings["stochastic"]["dropout"] or self.inject is not None)

    @property
    def train_settings(self):
        """Return what changes the weights that training gives, JSON-able."""
        view = {key: self.settings["sample"][key] for key in TRAINED_KEYS}
        train = {key: value for key, value in self.train.items() if key != "seed"}
        seed = self.train.get("seed", self.settings["sample"]["seed"])
        return {"network": self.settings["network"], **view, "seed": seed, "train": train}

    def weights_of(self, source):
        """Return the Weights that a source, given by name, is computed with."""
        return self.members[source_named(source).member]

    def described(self, passes):
        """Say in words where the passes come from; passes : of each source."""
        if not self.is_network:
            return f"{passes} {'prediction' if passes == 1 else 'predictions'} made elsewhere"
        parts = []
        if len(self.members) > 1:
            parts.append(f"{len(self.members)} checkpoints")
        if self.axes:
            parts.append(f"{2 ** len(self.axes)} flips")
        if self.has_dropout:
            kind = "injected dropout" if self.inject else "dropout"
            parts.append(f"{passes} {kind} {'pass' if passes == 1 else 'passes'}")
        made_of = " × ".join(parts) or "one deterministic pass"
        return made_of if len(self.sources) == 1 else f"{passes * len(self.sources)} passes: {made_of}"


def read_models(config):
    """Return the models of a checked configuration that can be described, a dict by name, and a list of problems.

    Problems name every bundle that cannot be used, every checkpoint that is not there, and checkpoints of one
    ensemble that are the same file twice.
    """
    models, problems = {}, []
    for name, entry in config["models"].items():
        try:
            models[name] = _model(name, entry, config)
        except SegtrustError as error:
            problems.append(f"models.{name}: {error}")
    for name, model in models.items():
        given = [weights.path for weights in model.members if weights.path]
        absent = [path for path in given if not Path(path).is_file()]
        problems += [f"models.{name}: there is no checkpoint {path}." for path in absent]
        if not absent:
            problems += [
                f"models.{name}: {first} and {second} are the same weights; an ensemble needs different ones."
                for first, second in combinations(given, 2)
                if Path(first).stat().st_size == Path(second).stat().st_size
                and file_digest(first) == file_digest(second)
            ]
        trained = [weights.trained_as for weights in model.members if weights.trained_as]
        problems += [
            f"models.{name}: the weights of {other} are in the ensemble twice; it needs different ones."
            for other in sorted({other for other in trained if trained.count(other) > 1})
        ]
        problems += [f"models.{name}: {problem}" for problem in _misfits(model, models)]
    return models, problems


def _misfits(model, models):
    """Yield what is wrong with taking weights that are trained here for other models."""
    trained = [models[name] for weights in model.members if (name := weights.trained_as) in models]
    for other in trained:
        pairs = {"network": (model.settings["network"], other.settings["network"])}
        pairs |= {
            key: (model.settings["sample"][key], other.settings["sample"][key]) for key in ("channels", "outputs")
        }
        for key in [key for key, (own, theirs) in pairs.items() if own != theirs]:
            yield f"the checkpoint of {other.name!r} was trained with another {key}; give the same."
    for first, second in combinations(trained, 2):
        if first.name != second.name and first.train_settings == second.train_settings:
            yield (
                f"{first.name!r} and {second.name!r} are the same training, and give the same weights; an ensemble "
                "needs different ones (train: {seed: …})."
            )


def _model(name, entry, config):
    view = {key: entry[key] for key in VIEW_KEYS if key in entry}
    if "predictions" in entry:
        return Model(name, {"outputs": entry["outputs"]}, predictions=entry["predictions"])
    network, checkpoint = entry.get("network"), entry.get("checkpoint")
    if "bundle" in entry:
        bundle = read_bundle(entry["bundle"])
        network = bundle["network"]
        said = {key: bundle[key] for key in VIEW_KEYS if bundle[key] is not None}
        view = {**view_defaults(), **said, **view}
        checkpoint = checkpoint or str(bundle["checkpoint"])
    stochastic = entry["stochastic"]
    if stochastic["masks"] == "per_window" and view["window"] is None:
        raise SegtrustError("masks: per_window needs a window.")
    settings = {
        "network": network,
        "stochastic": {"dropout": stochastic["dropout"], "inject": stochastic.get("inject")},
        "backend": config["sample"]["backend"],
        "precision": config["sample"]["precision"],
        "sample": {**view, "seed": config["seed"], "masks": stochastic["masks"]},
    }
    first = {"model": name} if "train" in entry else checkpoint
    return Model(
        name,
        settings,
        members=tuple(_weights(source) for source in [first, *stochastic.get("ensemble", [])]),
        axes=tuple(sorted(stochastic.get("flips", []))),
        passes=stochastic.get("passes"),
        train=entry.get("train"),
    )


def _weights(source):
    return Weights(trained_as=source["model"]) if isinstance(source, dict) else Weights(path=source)


def passes_of(model, patients, passes):
    """Return the number of passes that every patient has from each source of a model.

    patients : ids of the sampled patients
    passes : `config["sample"]["passes"]`, which holds for networks with dropout that do not say otherwise

    Raises Problems naming the patients without predictions, and those with another number of passes than most.
    """
    if model.is_network:
        return (model.passes or passes) if model.has_dropout else 1
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
