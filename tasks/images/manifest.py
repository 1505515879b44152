"""`manifest.json`: the last thing written for one VM at one point in time, and all that a later run needs."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from tasks.errors import InvalidInput
from tasks.images.files import write_atomically
from tasks.images.job import LOCK, OURS
from tasks.images.layout import left_overs
from tasks.models import FORMAT_VERSION, DownloadManifest, Manifest

MANIFEST = "manifest.json"
FINISHED = "Name a folder that a finished run has written"
NAMES_TOLD = 10


def write_manifest(folder: Path, manifest: Manifest, domain_xml: str = "") -> Path:
    """Commit `manifest` in `folder`, by rename, the domain that it names before it; return its path."""
    path = folder / MANIFEST
    if manifest.domain:
        write_atomically(folder / manifest.domain.path, domain_xml)
    write_atomically(path, manifest.model_dump_json(indent=2) + "\n")
    return path


def read_manifest(folder: Path) -> Manifest | DownloadManifest:
    """Return the manifest of `folder`. Raises InvalidInput where there is none, or none that this version reads."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        content = json.loads(text)
        version = content.get("version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            remedy = "Use the hyper2kvm that wrote it, or a newer one"
            raise _unusable(path, f"it has format version {version}, and this program reads {FORMAT_VERSION}", remedy)
        if version != FORMAT_VERSION:
            raise _unusable(path, f"it has format version {version}, and this program reads {FORMAT_VERSION}")
        kind = DownloadManifest if content.get("mode") == "download_only" else Manifest
        return kind.model_validate_json(text)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _none(folder, path) from error
    except OSError as error:
        raise _unusable(path, error.strerror or str(error), "See that this account can read it") from error
    except (ValueError, ValidationError) as error:
        raise _unusable(path, "it is damaged, or not a manifest of ours") from error


def _none(folder: Path, path: Path) -> InvalidInput:
    """Return what is wrong with a folder without a manifest, as far as can be seen."""
    if not folder.is_dir():
        return _unusable(path, "there is no such folder" if not folder.exists() else "that is no folder")
    if any(left_overs(folder)) or any(path.name != LOCK for path in folder.glob(f"{OURS}*")):
        remedy = "Run the same command again, which goes on with it to its end"
        return _unusable(path, "there is none: the run that wrote here did not come to its end", remedy)
    below = sorted(each.parent.name for each in folder.glob(f"*/{MANIFEST}"))
    if below:
        return _unusable(path, "there is none", f"Name one of the folders in it: {', '.join(below[:NAMES_TOLD])}")
    return _unusable(path, "there is none")


def _unusable(path: Path, why: str, remedy: str = FINISHED) -> InvalidInput:
    return InvalidInput(what=f"manifest {path}", why=why, remedy=remedy)
