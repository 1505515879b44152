"""What several files of these tests share, since its start takes long."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.wave_fleet import Fleet, fleet_up


@pytest.fixture(scope="session")
def wave_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One product for the tests of waves, which are the last: each leaves it without runs, faults and snapshots."""
    with fleet_up(tmp_path_factory.mktemp("wave")) as it:
        yield it
