"""Pipelines as text: for a command line, a file, and the manifest of an artefact.

A pipeline's text lists its passes, options that differ from the default in braces. It is read
back to the same pipeline. What is read may also start from the default one and change it:

    default,-drop-idle-maps,my-pass{bits=2}@before:allot-bits
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fhe_fx.errors import PassError, did_you_mean
from fhe_fx.passes import Pass, Pipeline, default_pipeline, get_pass

__all__ = ["make_pass", "parse_pipeline", "read_pipeline"]

_ITEM = re.compile(r"(?P<name>[\w.-]+)(\{(?P<options>[^{}]*)\})?(@(?P<where>.+))?")


def parse_pipeline(text: str) -> Pipeline:
    """Read a pipeline.

    Args:
        text: items with commas in between, applied from left to right: `default` for all of the
            default pipeline; `name` or `name{option=value,...}` for one pass at the end;
            `...@before:other`, `...@after:other` or `...@for:other` to put it there, or in
            place of another; `-name` to drop one. Values are JSON.

    Raises:
        PassError: names the item at fault; close names are suggested.
    """
    pipeline = Pipeline()
    items = [item.strip() for item in re.split(r",(?![^{]*\})", text) if item.strip()]
    if not items:
        raise PassError("The pipeline is empty. Write 'default', or names of passes.")
    for item in items:
        if item == "default":
            pipeline = Pipeline((*pipeline.passes, *default_pipeline().passes))
        elif item.startswith("-"):
            pipeline = pipeline.drop(item[1:])
        else:
            pipeline = _with_item(pipeline, item)
    return pipeline


def _with_item(pipeline: Pipeline, item: str) -> Pipeline:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise PassError(
            f"{item!r} is not an item of a pipeline. Write name, name{{option=value}}, -name, or "
            f"name@before:other."
        )
    options: dict[str, Any] = {}
    for setting in filter(None, (match["options"] or "").split(",")):
        key, _, value = setting.partition("=")
        try:
            options[key.strip()] = json.loads(value)
        except ValueError:
            options[key.strip()] = value.strip()
    new = make_pass(match["name"], options)
    if match["where"] is None:
        return Pipeline((*pipeline.passes, new))
    return _put(pipeline, new, match["where"], item)


def _put(pipeline: Pipeline, new: Pass, where: str, item: str) -> Pipeline:
    how, _, other = where.partition(":")
    edits: dict[str, Callable[[str, Pass], Pipeline]] = {
        "before": pipeline.insert_before,
        "after": pipeline.insert_after,
        "for": pipeline.replace,
    }
    if how not in edits:
        raise PassError(f"{item!r}: write @before:other, @after:other or @for:other.")
    return edits[how](other, new)


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Make a registered pass with some of its options set.

    Raises:
        PassError: if there is no such pass or option, or a value is of another type.
    """
    cls = get_pass(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in options.items():
        if key not in fields:
            has = f"It has {', '.join(fields)}." if fields else "It has none."
            near = did_you_mean(key, list(fields))
            raise PassError(f"Pass {name} has no option {key!r}. {has}{near}")
        default = fields[key].default
        if not _fits(value, default):
            raise PassError(
                f"Pass {name}: {key}={value!r} is a {type(value).__name__}; "
                f"{key} is a {type(default).__name__}, as in {key}={json.dumps(default)}."
            )
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise PassError(f"Pass {name} cannot be made: {error}.") from error


def _fits(value: Any, default: Any) -> bool:
    """Say whether a value may stand where a default of an option stands."""
    if default is dataclasses.MISSING or default is None:
        return True
    if isinstance(default, tuple):
        return isinstance(value, list)
    is_number = isinstance(default, float) and type(value) is int
    return is_number or type(value) is type(default)


def read_pipeline(path: Path) -> Pipeline:
    """Read a pipeline from a TOML file.

    The file has either `passes`, a list of items as `parse_pipeline` reads them, or tables

        [[pass]]
        name = "widen-exponentials"
        before = "allot-bits"      # or after, or for; without it, at the end
        options = { extra_bits = 2 }

    which change the default pipeline, and `drop`, a list of names, besides.

    Raises:
        PassError: names the file and the entry at fault.
    """
    written = _toml(path)
    if unknown := sorted(set(written) - {"passes", "pass", "drop"}):
        raise PassError(
            f"{path}: {unknown[0]!r} is not an entry of a pipeline file."
            f"{did_you_mean(unknown[0], ['passes', 'pass', 'drop'])}"
        )
    try:
        if "passes" in written:
            pipeline = parse_pipeline(",".join(_strings(written["passes"], "passes")))
        else:
            pipeline = default_pipeline()
        for name in _strings(written.get("drop", []), "drop"):
            pipeline = pipeline.drop(name)
        for entry in written.get("pass", []):
            pipeline = _with_entry(pipeline, entry)
    except PassError as error:
        raise PassError(f"{path}: {error}") from error
    return pipeline


def _strings(value: Any, key: str) -> Sequence[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise PassError(f"{key} is not a list of strings.")
    return value


def _with_entry(pipeline: Pipeline, entry: Mapping[str, Any]) -> Pipeline:
    places = [k for k in ("before", "after", "for") if k in entry]
    unknown = sorted(set(entry) - {"name", "options", "before", "after", "for"})
    if unknown or "name" not in entry or len(places) > 1:
        raise PassError(
            f"[[pass]] {dict(entry)} needs a name, may have options, and one of before, after, for."
        )
    new = make_pass(entry["name"], entry.get("options", {}))
    if not places:
        return Pipeline((*pipeline.passes, new))
    return _put(pipeline, new, f"{places[0]}:{entry[places[0]]}", str(entry["name"]))


def _toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PassError(f"{path} cannot be read: {error}.") from error
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PassError(f"{path} is not TOML: {error}.") from error
