"""Where a run's output goes: a folder that stays."""

from __future__ import annotations

from pathlib import Path

from prefect.runtime import deployment

from tasks.errors import InvalidInput


def place_that_stays(folder: Path) -> Path:
    """Return `folder` made absolute. A worker runs flows in a temporary folder, and deletes that with all in it.

    Raises InvalidInput for a relative one there.
    """
    if deployment.get_id() and not folder.expanduser().is_absolute():
        raise InvalidInput(
            what="output folder",
            why=f"{str(folder)!r} is relative, and the worker deletes the folder that it runs in",
            remedy="Give the whole path, such as /data/exports",
        )
    return folder.expanduser().absolute()
