"""A wave from a file: YAML with the form's fields, or CSV with a VM a row. What is wrong is said with its place."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tasks.errors import InvalidInput
from tasks.wave.models import Wave

OF_A_ROW = ("vm", "group", "after", "canary", "mode", "output_dir", "exclude")  # others are options of the mode
YES = ("1", "yes", "true", "x", "y")
NO = ("", "0", "no", "false", "n")


def load_wave(path: Path, *, defaults: Mapping[str, Any] | None = None) -> Wave:
    """Read a wave from a `.yaml`, `.yml` or `.csv` file. `defaults`: fields that the file may leave out.

    Raises InvalidInput, naming the file, the place and what is wrong there.
    """
    readers = {".yaml": _from_yaml, ".yml": _from_yaml, ".csv": _from_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _unfit(path, f"its name ends in {path.suffix!r}", "Give a .yaml, .yml or .csv file")
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unfit(path, str(error), "Give a text file (UTF-8) that can be read here") from error
    found = reader(path, text)
    try:
        return Wave.model_validate({"name": _name_of(path), **(defaults or {}), **found})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise _unfit(path, f"{place}: {first['msg'].removeprefix('Value error, ')}", "Mend it there") from error


def loaded(wave: Wave) -> Wave:
    """Return the wave that a form means: itself, or what is in the file that it names."""
    if not wave.file:
        return wave
    given = wave.model_dump(exclude={"file"}, exclude_defaults=True)
    return load_wave(Path(wave.file), defaults=given)


def _name_of(path: Path) -> str:
    return "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "-" for sign in path.stem)[:60]


def _from_yaml(path: Path, text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        why = getattr(error, "problem", None) or str(error)
        raise _unfit(path, f"{place}{why}", "It must be YAML") from error
    if not isinstance(found, dict):
        raise _unfit(path, f"it is a {type(found).__name__}, not a mapping", "Begin with, say, select: [web-1]")
    return {str(key): value for key, value in found.items()}


def _from_csv(path: Path, text: str) -> dict[str, Any]:
    """Return groups and exceptions of rows. The first row names the columns; `vm` must be one."""
    rows = list(csv.DictReader(text.splitlines(), skipinitialspace=True))
    columns = {str(name).strip() for row in rows for name in row}
    if "vm" not in columns:
        raise _unfit(path, "no column is named vm", f"Name the columns in its first row: {', '.join(OF_A_ROW)}, …")
    wave: dict[str, Any] = {"select": [], "canary": [], "exclude": [], "overrides": {}}
    groups: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=2):
        if None in row:
            raise _unfit(path, f"line {number}: more cells than columns", "Quote cells that hold a comma")
        cells = {str(key).strip(): (value or "").strip() for key, value in row.items()}
        _add_row(wave, groups, cells, f"line {number}", path)
    return wave | {"groups": list(groups.values())}


def _add_row(
    wave: dict[str, Any], groups: dict[str, dict[str, Any]], cells: dict[str, str], place: str, path: Path
) -> None:
    vm, group = cells["vm"], cells.get("group", "")
    if not vm:
        raise _unfit(path, f"{place}: its cell vm is empty", "Name a VM there, or take the line out")
    if _said(cells, "exclude", place, path):
        wave["exclude"].append(vm)
        return
    if group:
        entry = groups.setdefault(group, {"name": group, "select": [], "after": []})
        entry["select"].append(vm)
        after = [each.strip() for each in cells.get("after", "").split(";") if each.strip()]
        entry["after"] += [each for each in after if each not in entry["after"]]
    elif cells.get("after"):
        raise _unfit(path, f"{place}: it is after {cells['after']!r}, and in no group", "Give it a group")
    else:
        wave["select"].append(vm)
    if _said(cells, "canary", place, path):
        wave["canary"].append(vm)
    own = {key: _typed(cells[key]) for key in _options(cells)}
    if own:
        wave["overrides"][vm] = own


def _options(cells: Mapping[str, str]) -> Iterable[str]:
    columns = ("mode", "output_dir", *sorted(set(cells) - set(OF_A_ROW)))
    return (key for key in columns if cells.get(key))


def _typed(text: str) -> Any:
    """Return a cell as YAML reads it: true, 3, a word."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _said(cells: Mapping[str, str], column: str, place: str, path: Path) -> bool:
    word = cells.get(column, "").lower()
    if word not in (*YES, *NO):
        raise _unfit(path, f"{place}: {column} is {word!r}", "Write yes or no there")
    return word in YES


def _unfit(path: Path, why: str, remedy: str) -> InvalidInput:
    return InvalidInput(what=f"wave file {path}", why=why, remedy=remedy)
