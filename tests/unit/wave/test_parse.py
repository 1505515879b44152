"""Waves from files: what is in them, and clear words for what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.errors import AmbiguousVmName, InvalidInput, VmNotFound
from tasks.wave.choose import Listed, members, waits
from tasks.wave.models import Wave
from tasks.wave.parse import load_wave, loaded

INVENTORY = tuple(
    Listed(moref=f"vm-{number}", name=path.rpartition("/")[2], path=path, tags=("gold",) if number == 1 else ())
    for number, path in enumerate(
        ("/DC/vm/prod/db-1", "/DC/vm/prod/db-2", "/DC/vm/prod/web-1", "/DC/vm/prod/web-2", "/DC/vm/test/web-1")
    )
)
YAML = """
name: finance
output_dir: /data
select: ["*"]
exclude: [{folder: /DC/vm/test}]
groups:
  - {name: db, select: [{tag: gold}, db-1]}
  - {name: web, select: ["regex:^/DC/vm/prod/web"], after: [db], mode: cbt_sync, options: {enable_cbt: true}}
canary: [web-2]
overrides: {web-2: {format: qcow2}}
"""
CSV = """vm,group,after,canary,format,exclude
db-1,db,,,raw,
/DC/vm/prod/web-1,web,db,yes,,
web-2,web,db,no,,
/DC/vm/test/web-1,,,,,yes
"""


def written(folder: Path, text: str, name: str = "wave.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_yaml_says_it_all(tmp_path: Path) -> None:
    wave = load_wave(written(tmp_path, YAML))
    found = members(wave, INVENTORY)
    assert [(each.vm.path, each.group, each.mode, each.canary) for each in found] == [
        ("/DC/vm/prod/db-1", "db", "export", False),
        ("/DC/vm/prod/db-2", "db", "export", False),
        ("/DC/vm/prod/web-1", "web", "cbt_sync", False),
        ("/DC/vm/prod/web-2", "web", "cbt_sync", True),
    ]
    assert found[3].options == {"enable_cbt": True, "format": "qcow2"}
    assert waits(wave, found) == {
        "": ("canary of web",),
        "db": ("canary of web",),
        "canary of web": (),
        "web": ("canary of web", "db"),
    }


def test_csv_has_a_vm_a_row(tmp_path: Path) -> None:
    wave = load_wave(written(tmp_path, CSV, "two words.csv"), defaults={"output_dir": "/data"})
    assert (wave.name, wave.output_dir, wave.canary) == ("two-words", "/data", ("/DC/vm/prod/web-1",))
    found = {each.vm.name: each for each in members(wave, INVENTORY)}
    assert {name: each.group for name, each in found.items()} == {"db-1": "db", "web-1": "web", "web-2": "web"}
    assert found["db-1"].options == {"format": "raw"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("w.yaml", "a: [", "line 1"),
        ("w.yaml", "- x", "not a mapping"),
        ("w.yaml", "selct: [x]", "selct: Extra inputs"),
        ("w.yaml", "groups: [{name: a, after: [b]}]", "'a' is after 'b', and there is no such group"),
        ("w.yaml", "groups: [{name: a, after: [b]}, {name: b, after: [a]}]", "in a circle: 'a' after 'b' after 'a'"),
        ("w.yaml", "groups: [{name: a}, {name: a}]", "two groups 'a'"),
        ("w.yaml", "select: [{colour: red}]", "not 'colour'"),
        ("w.yaml", "window: {stop: noon}", "window: 'noon'"),
        ("w.yaml", "mode: teleport", "mode: "),
        ("w.csv", "name\nx\n", "no column is named vm"),
        ("w.csv", "vm,group\n,db\n", "line 2: its cell vm is empty"),
        ("w.csv", "vm,canary\nweb,perhaps\n", "line 2: canary is 'perhaps'"),
        ("w.csv", "vm\na,b\n", "line 2: more cells"),
        ("w.csv", "vm,after\na,db\n", "line 2: it is after 'db', and in no group"),
        ("w.txt", "x", "ends in '.txt'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as error:
        load_wave(written(tmp_path, text, name))
    assert words in str(error.value) and name in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        load_wave(tmp_path / "none.yaml")


def test_a_form_may_name_a_file(tmp_path: Path) -> None:
    wave = loaded(Wave(file=str(written(tmp_path, YAML)), dry_run=True))
    assert (wave.name, wave.dry_run, wave.file) == ("finance", True, "")


def test_unknown_doubtful_and_doubled_vms_are_refused() -> None:
    with pytest.raises(VmNotFound) as missing:
        members(Wave(output_dir="/d", select=["db"]), INVENTORY)
    assert missing.value.near == ("db-1", "db-2")
    with pytest.raises(AmbiguousVmName):
        members(Wave(output_dir="/d", select=["web-1"]), INVENTORY)
    with pytest.raises(VmNotFound):
        members(Wave(output_dir="/d", select=["db-1"], overrides={"db-9": {}}), INVENTORY)
    twice = [{"name": "a", "select": ["db-1"]}, {"name": "b", "select": ["db-*"]}]
    with pytest.raises(InvalidInput, match="is in group 'b' too"):
        members(Wave(output_dir="/d", groups=twice), INVENTORY)
    with pytest.raises(InvalidInput, match="it means no VM"):
        members(Wave(output_dir="/d", select=["nothing*"]), INVENTORY)
    with pytest.raises(InvalidInput, match="output_dir"):
        members(Wave(select=["db-1"]), INVENTORY)
