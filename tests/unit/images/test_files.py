import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import DiskFull, OutputExists
from tasks.images.files import allocated_bytes, free_bytes, need_space, part_of, publish, safe_name, write_atomically


def test_publishing_gives_the_final_name(tmp_path: Path) -> None:
    final = tmp_path / "disk-0.qcow2"
    part_of(final).write_text("image")
    publish(part_of(final), final)
    assert [path.name for path in tmp_path.iterdir()] == ["disk-0.qcow2"]


def test_publishing_never_replaces_anything(tmp_path: Path) -> None:
    part, final = tmp_path / "x.part", tmp_path / "x"
    part.write_text("new")
    final.write_text("old")
    with pytest.raises(OutputExists, match="/x exists already"):
        publish(part, final)
    assert (part.read_text(), final.read_text()) == ("new", "old")


def test_publishing_works_where_rename_knows_no_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.images.files.RENAME_NOREPLACE", 1 << 10)  # the kernel answers EINVAL, as for NFS
    part, final = tmp_path / "x.part", tmp_path / "x"
    part.write_text("new")
    publish(part, final)
    assert (part.exists(), final.read_text()) == (False, "new")
    part.write_text("newer")
    with pytest.raises(OutputExists):
        publish(part, final)
    assert (part.read_text(), final.read_text()) == ("newer", "new")


def test_a_missing_part_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "x.part", tmp_path / "x")


def test_writing_atomically_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for number in (1, 2):
        write_atomically(path, json.dumps({"number": number}))
    assert json.loads(path.read_text()) == {"number": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_too_little_room_is_known_beforehand(tmp_path: Path) -> None:
    need_space(tmp_path, 1)
    with pytest.raises(DiskFull) as raised:
        need_space(tmp_path, free_bytes(tmp_path) + 2**40)
    assert raised.value.need > raised.value.have > 0


@given(st.text())
def test_a_safe_name_is_one_visible_folder(name: str) -> None:
    safe = safe_name(name)
    assert safe
    assert "/" not in safe
    assert safe[0] not in ".-"
    assert not any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in safe)
    assert len(safe.encode()) <= 200
    assert Path("/base", safe).resolve().parent == Path("/base")


@given(st.lists(st.text("ab/._-\x00\n0", max_size=6), unique=True, max_size=50))
def test_two_names_never_share_a_folder(names: list[str]) -> None:
    assert len({safe_name(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["web-01", "Web server (old)", "läuft größer", "数据库", "100% #1 + more", "a\\b"])
def test_a_harmless_name_stays_as_it_is(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../../etc", ".ssh", "-rf", "a\nb", "a\u202eb", "x" * 300, "ü" * 150]
)
def test_a_harmful_name_is_changed_and_marked(name: str) -> None:
    assert safe_name(name) != name
    assert safe_name(name)[-13] == "-"


def test_a_name_that_looks_like_a_changed_one_is_changed_as_well() -> None:
    assert safe_name(safe_name("a/b")) != safe_name("a/b")


def test_a_sparse_file_takes_what_is_written_in_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert allocated_bytes(path) == 0
    with path.open("wb") as file:
        file.truncate(1 << 30)
        file.write(bytes([1]) * 4096)
    assert 4096 <= allocated_bytes(path) <= 1 << 20
