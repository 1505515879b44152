import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import InvalidInput
from tasks.images.digests import (
    HEADER_BYTES,
    LEAF_BYTES,
    ZERO_RECORD,
    Digests,
    algorithm_of,
    is_zero,
    leaf_count,
    record_of,
)
from tasks.models import DigestName
from tests.unit.images.fakes import leaves

TIB = 1024**4


def naive_digest(content: bytes) -> str:
    """The image digest as its definition reads, without a sidecar."""
    header = (
        b"H2KVMDIG" + (1).to_bytes(4, "little") + LEAF_BYTES.to_bytes(4, "little") + len(content).to_bytes(8, "little")
    )
    records = b"".join(
        bytes(32) if not any(leaf) else blake3(leaf).digest()
        for leaf in (content[at : at + LEAF_BYTES] for at in range(0, len(content), LEAF_BYTES))
    )
    return "blake3:" + blake3(header + records, derive_key_context="hyper2kvm image digest v1").hexdigest()


def filled(path: Path, content: bytes) -> Digests:
    digests = Digests.create(path, size=len(content))
    for leaf in range(leaf_count(len(content))):
        digests.put(leaf, record_of(content[leaf * LEAF_BYTES : (leaf + 1) * LEAF_BYTES]))
    return digests


@given(kinds=st.text("0ab", max_size=3), tail=st.integers(0, LEAF_BYTES - 1))
def test_the_tree_equals_the_naive_one(tmp_path_factory: pytest.TempPathFactory, kinds: str, tail: int) -> None:
    content = leaves(kinds, tail=tail)
    with filled(tmp_path_factory.mktemp("d") / "x.digests", content) as digests:
        assert digests.image_digest() == naive_digest(content)


def test_size_is_part_of_the_digest(tmp_path: Path) -> None:
    with Digests.create(tmp_path / "a", size=512) as small, Digests.create(tmp_path / "b", size=1024) as large:
        assert small.image_digest() != large.image_digest()


@given(st.integers(0, LEAF_BYTES), st.integers(0, LEAF_BYTES - 1))
def test_one_byte_anywhere_is_not_zero(length: int, place: int) -> None:
    buffer = bytearray(length)
    assert is_zero(memoryview(buffer))
    if place < length:
        buffer[place] = 1
        assert not is_zero(memoryview(buffer))
        assert record_of(buffer) != ZERO_RECORD


def test_it_survives_closing_and_zero_may_replace_something(tmp_path: Path) -> None:
    path = tmp_path / "x.digests"
    with filled(path, leaves("a0b")) as digests:
        digests.flush()
    with Digests.open(path, writable=True) as digests:
        assert digests.get(0) == record_of(leaves("a"))
        digests.put(0, ZERO_RECORD)
    with Digests.open(path) as digests:
        assert digests.image_digest() == naive_digest(leaves("00b"))
        assert digests.size == 3 * LEAF_BYTES


def test_three_tebibytes_of_zeros_take_no_room(tmp_path: Path) -> None:
    with Digests.create(tmp_path / "x.digests", size=3 * TIB) as digests:
        digests.put(leaf_count(3 * TIB) - 1, b"r" * 32)
        for leaf in range(0, 5_000_000, 50_000):
            digests.put(leaf, ZERO_RECORD)
        assert digests.get(leaf_count(3 * TIB) - 1) == b"r" * 32
        assert digests.image_digest().startswith("blake3:")
    assert (tmp_path / "x.digests").stat().st_blocks * 512 <= 16 * 1024


def test_threads_may_put_at_once(tmp_path: Path) -> None:
    with Digests.create(tmp_path / "x", size=1000 * LEAF_BYTES) as digests:
        records = [blake3(leaf.to_bytes(8, "big")).digest() for leaf in range(1000)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(digests.put, range(1000), records))
        assert digests.records(0, 1000) == b"".join(records)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no digest sidecar"),
        (b"QFI\xfb" + bytes(HEADER_BYTES), "no digest sidecar"),
        (b"H2KVMDIG" + bytes(HEADER_BYTES), "version 0"),
        (b"H2KVMDIG" + (9).to_bytes(4, "little") + bytes(HEADER_BYTES), "version 9"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "x.digests").write_bytes(content)
    with pytest.raises(InvalidInput, match=why) as raised:
        Digests.open(tmp_path / "x.digests")
    assert "x.digests" in str(raised.value)


def test_a_sidecar_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.digests"
    filled(path, leaves("ab")).__exit__()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="cut short"):
        Digests.open(path)


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_the_hash_is_the_sidecars_own(tmp_path: Path, algorithm: DigestName) -> None:
    leaf, path = b"x" * LEAF_BYTES, tmp_path / "d"
    with Digests.create(path, size=2 * LEAF_BYTES, algorithm=algorithm) as digests:
        digests.put(0, digests.record_of(leaf))
        assert digests.record_of(bytes(LEAF_BYTES)) == ZERO_RECORD
        told = digests.image_digest()
    with Digests.open(path) as again:
        assert (again.algorithm, again.image_digest()) == (algorithm, told)
        wanted = hashlib.sha256(leaf).digest() if algorithm == "sha256" else blake3(leaf).digest()
        assert again.get(0) == again.record_of(leaf) == wanted
    assert told.startswith(f"{algorithm}:")
    assert algorithm_of(told) == algorithm


def test_a_hash_that_this_version_does_not_know_is_refused(tmp_path: Path) -> None:
    with Digests.create(tmp_path / "d", size=LEAF_BYTES):
        pass
    with (tmp_path / "d").open("r+b") as file:
        file.seek(24)
        file.write(b"\x07")
    with pytest.raises(InvalidInput, match="hash number 7"):
        Digests.open(tmp_path / "d")
