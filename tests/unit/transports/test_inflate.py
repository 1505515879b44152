"""Blocks out of a stream: in order, holes as such, a bounded number ahead, the last only once the end is sound."""

from __future__ import annotations

import io
import random
import threading
import time

import pytest

from tasks.reader import Hole
from tasks.transports.inflate import AHEAD, BLOCK_BYTES, Blocks
from tasks.transports.streamvmdk import RECEIVE_BYTES, BadStream
from tests.unit.transports.test_streamvmdk import GRAIN, Host, disk_of


def told(blocks: Blocks) -> bytes:
    return b"".join(bytes(len(part)) if isinstance(part, Hole) else bytes(part) for _, part in blocks)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("start", [0, 3 * BLOCK_BYTES, 5 * BLOCK_BYTES + GRAIN])
def test_blocks_come_in_order_from_the_one_that_is_begun_at(threads: int, start: int) -> None:
    raw = disk_of(random.Random(2), size=9 * BLOCK_BYTES + 512, share=0.1)
    with Blocks(io.BytesIO(Host(raw).stream()).readinto, size=len(raw), start=start, threads=threads) as blocks:
        assert told(blocks) == raw[start // BLOCK_BYTES * BLOCK_BYTES :]


def test_what_is_not_stored_is_a_hole_whatever_its_size() -> None:
    raw = bytes(3 * BLOCK_BYTES) + b"x" * 512 + bytes(90 * BLOCK_BYTES)
    with Blocks(io.BytesIO(Host(raw).stream()).readinto, size=len(raw), threads=1) as blocks:
        parts = [(offset, len(part), isinstance(part, Hole)) for offset, part in blocks]
    assert parts == [
        (0, 3 * BLOCK_BYTES, True),
        (3 * BLOCK_BYTES, BLOCK_BYTES, False),
        (4 * BLOCK_BYTES, len(raw) - 4 * BLOCK_BYTES, True),
    ]


def test_no_more_is_read_ahead_than_a_few_blocks() -> None:
    raw = random.Random(3).randbytes(40 * BLOCK_BYTES)
    file = io.BytesIO(Host(raw).stream())
    with Blocks(file.readinto, size=len(raw), threads=2) as blocks:
        content, seen = iter(blocks), -1
        next(content)
        while seen != file.tell():  # until it waits for us
            seen = file.tell()
            time.sleep(0.3)
        assert seen <= (AHEAD + 5) * BLOCK_BYTES + 2 * RECEIVE_BYTES
        assert sum(len(part) for _, part in content) == len(raw) - BLOCK_BYTES


def test_the_last_block_waits_for_a_sound_end() -> None:
    raw = random.Random(4).randbytes(4 * BLOCK_BYTES)
    host = Host(raw)
    host.parts["footer"] = False
    came = 0
    with pytest.raises(BadStream), Blocks(io.BytesIO(host.stream()).readinto, size=len(raw), threads=2) as blocks:
        for _, part in blocks:
            came += len(part)
    assert came == 3 * BLOCK_BYTES


def test_who_leaves_early_leaves_no_thread() -> None:
    raw = random.Random(5).randbytes(30 * BLOCK_BYTES)
    with Blocks(io.BytesIO(Host(raw).stream()).readinto, size=len(raw), threads=2) as blocks:
        next(iter(blocks))
    assert not [each for each in threading.enumerate() if each.name.startswith("inflate")]
