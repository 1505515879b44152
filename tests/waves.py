"""A lab with many small VMs, for waves: hosts and datastores that they are spread over, some that preflight refuses."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

HOSTS = ("esx-a.lab", "esx-b.lab", "esx-c.lab")
STORES = ("fast", "slow")


def fleet(
    *,
    vms: int,
    size: str = "1MiB",
    refused: int = 0,
    sizes: dict[str, str] | None = None,
    hosts: Sequence[str] = HOSTS,
) -> dict[str, Any]:
    """Return a scenario: `app-0`, `app-1`, … and, the last of them, so many that cannot be copied (`bad-0`, …).

    sizes: of the disks of some VMs, by name. Every fifth VM is in the folder prod/db, the others in prod/web.
    """
    names = [f"app-{number:02}" for number in range(vms - refused)] + [f"bad-{number}" for number in range(refused)]
    return {
        "datacenters": [
            {
                "name": "DC",
                "clusters": [{"name": "c", "hosts": list(hosts)}],
                "datastores": list(STORES),
                "vms": [_vm(number, name, (sizes or {}).get(name, size), hosts) for number, name in enumerate(names)],
            }
        ]
    }


def _vm(number: int, name: str, size: str, hosts: Sequence[str]) -> dict[str, Any]:
    disk: dict[str, Any] = {"size": size, "thin": True}
    if name.startswith("bad"):
        disk["mode"] = "independent_persistent"
    return {
        "name": name,
        "folder": "prod/db" if number % 5 == 0 else "prod/web",
        "host": hosts[number % len(hosts)],
        "datastore": STORES[number % len(STORES)],
        "disks": [disk],
    }


@contextmanager
def nfc_port() -> Iterator[None]:
    """Have this machine, as the ESXi host `localhost`, answer on 902, without which no VDDK may run. Needs root."""
    with socket.create_server(("127.0.0.1", 902)):
        yield
