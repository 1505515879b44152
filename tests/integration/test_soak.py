"""Long runs: many exports, each under faults drawn by chance; the seed is printed, so that one can be run again."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.labs import running_lab
from tests.runs import assert_equal_to_the_guests_disks, assert_nothing_left, chance_of_this_run, export

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.soak, pytest.mark.usefixtures("prefect_api")]

EXPORTS = 25


async def test_exports_under_random_faults_are_equal(tmp_path):
    seed = chance_of_this_run()
    chance = random.Random(seed)
    with running_lab("-disks", "3", "-disk-size", "48MiB", "-seed", str(seed)) as lab:
        vm = lab.vm("demo")
        for number in range(EXPORTS):
            for disk in range(3):
                lab.post("/guest-load", vm=vm["moref"], disk=disk, bytes_per_s=1 << 21, seed=chance.randrange(1 << 30))
            for fault in drawn(chance):
                lab.post("/faults", **fault)
            output = tmp_path / str(number)
            manifest = await export(lab, output, "demo", format=chance.choice(["raw", "qcow2"]))
            lab.post("/faults", clear=True)
            assert_equal_to_the_guests_disks(lab, manifest, output / "demo", tmp_path)
            assert_nothing_left(lab)
            shutil.rmtree(output)


def drawn(chance: random.Random) -> list[dict[str, int | bool]]:
    """Return one to three faults that an export must survive."""
    possible: list[dict[str, int | bool]] = [
        {"cut_after": chance.randrange(1, 1 << 22), "count": chance.randint(1, 6)},
        {"folder_503": chance.randint(1, 4)},
        {"stall_s": 2, "count": 1},
        {"throttle_bytes_per_s": 1 << 26},
    ]
    return chance.sample(possible, chance.randint(1, 3))
