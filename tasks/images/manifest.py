"""`manifest.json`: the last thing written for one VM at one point in time, and all that a later run needs."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from tasks.errors import InvalidInput
from tasks.images.files import write_atomically
from tasks.models import FORMAT_VERSION, Manifest

MANIFEST = "manifest.json"


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Commit `manifest` in `folder`, by rename; return its path."""
    path = folder / MANIFEST
    write_atomically(path, manifest.model_dump_json(indent=2) + "\n")
    return path


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of `folder`. Raises InvalidInput where there is none, or none that this version reads."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        version = content.get("version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise _unusable(path, f"it has format version {version}, and this program reads {FORMAT_VERSION}")
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise _unusable(path, "there is none") from error
    except (ValueError, ValidationError) as error:
        raise _unusable(path, "it is damaged, or not a manifest of ours") from error


def _unusable(path: Path, why: str) -> InvalidInput:
    return InvalidInput(what=f"manifest {path}", why=why, remedy="Name a folder that a finished run has written")
