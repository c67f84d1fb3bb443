"""A study's configuration: validated against its schema, defaults filled in, problems told in the user's words."""

import difflib
from functools import cache
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator

from segtrust.errors import raise_if_any

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = ROOT / "workflow" / "schemas"
KINDS = ("bundle", "checkpoint", "train", "predictions")
LEAST_PASSES_FOR_A_RATE = 5
# how a model sees a scan, and what it returns
VIEW_KEYS = ("channels", "outputs", "crop", "orientation", "window", "overlap")


@cache
def schema(name):
    """Return the schema `config` or `patients`."""
    return yaml.safe_load((SCHEMAS / f"{name}.schema.yaml").read_text(encoding="utf-8"))


def checked_config(raw):
    """Return a study's configuration with all defaults filled in.

    raw : the configuration as read from YAML, a dict

    A bundle's entry holds of `VIEW_KEYS` only those that were given. Raises Problems naming every key that is unknown,
    missing, or has a value out of range.
    """
    found = sorted(
        Draft202012Validator(schema("config")).iter_errors(raw), key=lambda error: list(map(str, error.path))
    )
    problems = [message for error in found for message in _messages(error, "config.yaml")]
    raise_if_any(problems)
    config = with_defaults(raw, schema("config"), schema("config"))
    for name, model in config["models"].items():
        if "bundle" in model:  # what is not given, the bundle says, and only then the schema
            given = raw["models"][name]
            config["models"][name] = {key: model[key] for key in model if key in given or key not in VIEW_KEYS}
    raise_if_any(
        [
            message
            for name, model in config["models"].items()
            for message in _model_problems(name, model, raw["models"][name], config)
        ]
    )
    return config


def view_defaults():
    """Return the defaults of `VIEW_KEYS`, a dict."""
    keys = schema("config")["$defs"]["model"]["properties"]
    return {key: keys[key]["default"] for key in VIEW_KEYS}


def with_defaults(value, part, root):
    """Return a value with the defaults of a schema filled in, at every depth.

    part : the schema of the value; root : the whole schema, for references
    """
    part = _resolved(part, root)
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for key, child in part.get("properties", {}).items():
        child = _resolved(child, root)
        if key not in filled and "default" in child:
            filled[key] = child["default"]
        if key in filled:
            filled[key] = with_defaults(filled[key], child, root)
    extra = part.get("additionalProperties")
    if isinstance(extra, dict):
        named = part.get("properties", {})
        filled = {key: item if key in named else with_defaults(item, extra, root) for key, item in filled.items()}
    return filled


def _resolved(part, root):
    if "$ref" not in part:
        return part
    return {**root["$defs"][part["$ref"].removeprefix("#/$defs/")], **{k: v for k, v in part.items() if k != "$ref"}}


def _messages(error, file):
    """Say a schema violation in the user's words; one message per offending key."""
    place = ".".join(str(step) for step in error.absolute_path)
    where = f"{file}: {place}" if place else file
    value = error.instance
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for key in sorted(map(str, set(value) - set(known))):
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(known))}."
            yield f"{where}: unknown key {key!r}; {hint}"
    elif error.validator == "required":
        missing = [key for key in error.validator_value if key not in value]
        yield f"{where}: the key {', '.join(map(repr, missing))} is missing."
    elif error.validator == "enum":
        yield f"{where}: found {value!r}, expected one of {', '.join(map(str, error.validator_value))}."
    elif error.validator in ("pattern", "not") or "propertyNames" in error.schema_path:
        yield f"{where}: {_name_message(error, value)}"
    else:
        meaning = error.schema.get("description")
        yield f"{where}: {error.message}" + (f" ({meaning})" if meaning else "")


def _name_message(error, value):
    if error.validator == "type":
        return f"the name {value!r} is no text to YAML; write it in quotes."
    if error.validator == "not":
        return f"{value!r} is the name of a folder beside the models; choose another name."
    if "{patient}" in str(error.validator_value).replace("\\", ""):
        return f"found {value!r}, expected a path that contains {{patient}}."
    return (
        f"found {value!r}, expected letters, digits, '_', '.' and '-', beginning with a letter or digit "
        "(names become parts of paths)."
    )


def _model_problems(name, model, raw, config):
    where = f"config.yaml: models.{name}"
    kinds = [kind for kind in KINDS if kind in model and not (kind == "checkpoint" and "bundle" in model)]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        yield f"{where}: expected exactly one of bundle, checkpoint, train and predictions, found {found}."
        return
    if kinds[0] in ("checkpoint", "train") and "network" not in model:
        yield f"{where}: {kinds[0]} needs a network: {{name: SegResNet, …}} to go with it."
    if kinds[0] in ("bundle", "predictions") and "network" in model:
        yield f"{where}: network does not go with {kinds[0]}; remove one of them."
    if kinds[0] == "predictions" and "stochastic" in raw:
        yield f"{where}: stochastic does not go with predictions; each of their files is a pass."
    if kinds[0] != "predictions" and "labels" in model.get("outputs", ()):
        yield f"{where}: outputs {{labels: …}} are of predictions made elsewhere; a network gives regions or classes."
    stochastic = model["stochastic"]
    for source in [model.get("checkpoint"), *stochastic.get("ensemble", [])]:
        other = config["models"].get(source["model"]) if isinstance(source, dict) else None
        if isinstance(source, dict) and (other is None or "train" not in other):
            yield f"{where}: checkpoint names the model {source['model']!r}, which is not trained here."
    several = "flips" in stochastic or "ensemble" in stochastic
    if not stochastic["dropout"] and "inject" not in stochastic:
        if not several and stochastic.get("passes", config["sample"]["passes"]) > 1 and kinds[0] != "predictions":
            yield (
                f"{where}: nothing varies between passes: dropout is off, and there is one checkpoint and no flip; "
                "ask for one pass (stochastic: {passes: 1}), or say what varies."
            )
        if several and stochastic.get("passes", 1) > 1:
            yield f"{where}: without dropout each checkpoint and flip gives one pass; remove stochastic.passes."
    automatic = stochastic.get("inject", {}).get("rate") == "auto"
    if automatic and stochastic.get("passes", config["sample"]["passes"]) < LEAST_PASSES_FOR_A_RATE:
        yield f"{where}: inject.rate auto needs at least {LEAST_PASSES_FOR_A_RATE} passes, whose spread it judges."
