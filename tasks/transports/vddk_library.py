"""Finding VMware's VDDK, or any library with its ABI, in the folder that an operator names. It is not loaded here."""

from __future__ import annotations

import os
from pathlib import Path

from tasks.errors import VddkUnavailable
from tasks.models import Value
from tasks.transports import vixdisklib_abi as abi

VARIABLE = "VDDK_LIBDIR"  # of the environment: where it is, if nobody says so
USUAL_FOLDERS = (Path("/usr/lib/vmware-vix-disklib"), Path("/opt/vmware-vix-disklib-distrib"))


class VddkLibrary(Value):
    """A library found. `folder` is what the worker's LD_LIBRARY_PATH begins with, `root` what InitEx is told."""

    file: Path
    folder: Path
    root: Path
    version: str

    @property
    def words(self) -> str:
        """Version, and the vSphere versions that it reads from."""
        return f"VDDK {self.version} (for vSphere {abi.SERVES[int(self.version.partition('.')[0])]} and newer)"


def find_library(libdir: Path | None) -> VddkLibrary:
    """Return the newest library in `libdir` or its `lib64`; None: in VDDK_LIBDIR, else where it usually is.

    Raises VddkUnavailable.
    """
    if libdir is None and os.environ.get(VARIABLE):
        libdir = Path(os.environ[VARIABLE])
    roots = (libdir.expanduser().absolute(),) if libdir else USUAL_FOLDERS
    folders = [folder for root in roots for folder in (root / "lib64", root)]
    for folder in folders:
        for version in abi.VERSIONS:
            if (file := folder / f"libvixDiskLib.so.{version}").is_file():
                whole = file.resolve().name.partition(".so.")[2] or str(version)
                root = folder.parent if folder.name == "lib64" else folder
                return VddkLibrary(file=file, folder=folder, root=root, version=whole)
    others = sorted({path.name for folder in folders for path in folder.glob("libvixDiskLib.so*")})
    has_only = f" (only {', '.join(others)})" if others else ""
    wanted = ", ".join(f".{version}" for version in reversed(abi.VERSIONS))
    looked_in = ", ".join(f"{folder}{'' if folder.is_dir() else ' (not there)'}" for folder in folders)
    raise VddkUnavailable(missing=f"there is no libvixDiskLib.so{wanted}{has_only}", looked_in=looked_in)
