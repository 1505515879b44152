"""Which files are chosen, and that no name leads out of a folder or onto another file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import FileUnfit, InvalidInput
from tasks.models import DatastoreFile
from tasks.selection import RUNNING, check_count, check_names, select

NAMES = st.text(st.sampled_from("aAéE\u0301ß./\\ \n\x00\u202e\ud800\ufffdmanifest.jsonhyper2kvm~-"), max_size=12)


def files(*paths: str) -> tuple[DatastoreFile, ...]:
    return tuple(DatastoreFile(datastore_path=f"[ds] web/{path}", path=path, size_bytes=1) for path in paths)


def chosen(*paths: str, include=(), exclude=(), running=False) -> list[str]:
    found, left_out = select(files(*paths), include=include, exclude=exclude, running=running)
    assert {file.path for file in found} | {each.path for each in left_out} == set(paths)
    return [file.path for file in found]


def test_without_globs_everything_is_chosen():
    assert chosen("web.vmx", "sub/web.log") == ["web.vmx", "sub/web.log"]


def test_include_and_exclude_globs_match_the_path_with_case():
    assert chosen("web.vmx", "WEB.VMX", "sub/web.vmx", include=["*.vmx"]) == ["web.vmx", "sub/web.vmx"]
    assert chosen("web.vmx", "sub/web.vmx", include=["*.vmx"], exclude=["sub/*"]) == ["web.vmx"]


def test_what_a_running_vm_writes_is_left_out_whatever_the_globs_say():
    paths = ["web.vmx", "web.vmx.lck", "web.vmx.lck/x", "web-1.vswp", "vmware-3.log", "web-ctk.vmdk", "web.vmx~"]
    assert chosen(*paths, include=["*"], running=True) == ["web.vmx"]
    assert chosen(*paths) == paths


@given(st.lists(NAMES.filter(bool), unique=True), st.lists(st.sampled_from([*RUNNING, "*a*", "*.vmx"])), st.booleans())
def test_every_file_is_chosen_or_left_out_with_a_reason(paths, globs, running):
    found, left_out = select(files(*paths), include=globs, exclude=globs[:1], running=running)
    assert len(found) + len(left_out) == len(paths)
    assert all(each.why for each in left_out)


@pytest.mark.parametrize(
    "path",
    [
        *("../x", "a/../x", "/etc/passwd", "", ".", "a//b", "a/"),
        *("a\nb", "a\x1bb", "a\u202eb", "a\ufffdb", "x" * 256),
        *("manifest.json", "Manifest.JSON", ".hyper2kvm.lock", ".hyper2kvm.parts/x", "manifest.json.part"),
    ],
)
def test_a_name_that_cannot_stand_in_the_folder_is_refused(path):
    with pytest.raises(FileUnfit):
        check_names(files("web.vmx", path))


@pytest.mark.parametrize(
    "paths", [("web.vmx", "WEB.vmx"), ("é", "e\u0301"), ("ß", "SS"), ("a", "a/b"), ("A/b", "a"), ("x", "x")]
)
def test_names_that_collide_are_refused(paths):
    with pytest.raises(FileUnfit, match="collides"):
        check_names(files(*paths))


@given(st.lists(NAMES, max_size=6))
def test_names_that_pass_lie_below_the_folder_each_at_its_own_place(paths):
    try:
        check_names(files(*paths))
    except FileUnfit:
        return
    top = Path("/data/web")
    places = [Path(f"{top}/{path}") for path in paths]
    assert all(top in place.parents and ".." not in place.parts for place in places)
    assert len({str(place).casefold() for place in places}) == len(paths)
    assert not any(one in other.parents for one in places for other in places)


def test_too_many_files_are_counted_and_none_is_refused():
    check_count(files("a", "b"), max_files=2)
    with pytest.raises(InvalidInput, match="there are 3 to download, and at most 2"):
        check_count(files("a", "b", "c"), max_files=2)
    with pytest.raises(InvalidInput, match="none is left"):
        check_count((), max_files=2)
