from __future__ import annotations

import pytest

from tasks.reach import Server
from tasks.saved import needs_of

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("options", "server"),
    [
        ({"transport": "ssh", "esxi_host": "esx1"}, ("esx1", 22)),
        ({"transport": "ssh", "esxi_host": "[fd00::1]:2222"}, ("fd00::1", 2222)),
        ({"transport": "nbd", "nbd_uri": "nbds://backup/{moref}"}, ("backup", 10809)),
        ({"transport": "nbd", "nbd_uri": "nbd://[fd00::1]:10810/disk"}, ("fd00::1", 10810)),
        ({"transport": "nbd", "nbd_uri": "nbd://{host}/disk"}, None),
        ({"transport": "nbd", "nbd_uri": "nbd+unix:///disk?socket=/run/nbd"}, None),
        ({"transport": "nbd", "nbd_command": "nbdkit -s null"}, None),
        ({"transport": "folder", "esxi_host": "esx1"}, None),
        ({}, None),
    ],
)
async def test_what_a_run_reads_from_is_the_machine_that_its_options_name(options, server):
    (needs,) = await needs_of([options])
    assert needs.server == (Server(host=server[0], port=server[1]) if server else None)
