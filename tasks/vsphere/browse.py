"""What files a VM has: its folder, by the datastore browser, and those of its disks that lie elsewhere. No bytes.

Only folders of the VM are searched, never a datastore: what lies at a datastore's root is looked for by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC
from typing import Any

from pyVmomi import vim

from tasks.errors import FileUnfit, VsphereFault
from tasks.models import DatastoreFile, VirtualDisk, VirtualMachine
from tasks.vsphere.properties import retrieve
from tasks.vsphere.session import Session
from tasks.vsphere.tasks import run_task

BROWSE_TIMEOUT_S = 10 * 60.0

_Browser = vim.host.DatastoreBrowser
_PATH = re.compile(r"\[(?P<datastore>.+?)\] ?(?P<path>.+)", re.DOTALL)


def vm_files(session: Session, vm: VirtualMachine, disks: tuple[VirtualDisk, ...]) -> tuple[DatastoreFile, ...]:
    """Return the files of a VM's folder with its subfolders, and the files of `disks` that lie outside of it.

    Those outside go below `<datastore>/<folder>/`; of their folders, which other VMs may use too, only the files of
    the disk itself are taken. Source: HostDatastoreBrowser.SearchDatastoreSubFolders_Task, SearchDatastore_Task.
    Raises PermissionMissing, VsphereFault; FileUnfit for a VM that has no folder of its own.
    """
    browsers = _browsers(session, vm)
    datastore, home = _home(vm)
    found = {file.datastore_path: file for file in _below(session, browsers, datastore, home)}
    for path in _backings(disks):
        if not path.startswith(f"[{datastore}] {home}/"):
            found |= {file.datastore_path: file for file in _beside(session, browsers, path)}
    sizes = dict(_flat_sizes(disks))
    sized = (file.model_copy(update=sizes.get(file.datastore_path, {})) for file in found.values())
    return tuple(sorted(sized, key=lambda file: file.path))


def extents_of(descriptor: str) -> re.Pattern[str]:
    """Return the pattern of the datastore paths of a disk's files: its descriptor `x.vmdk`, its extents, its CBT map.

    Other disks are not among them: `x-000001.vmdk` is a disk of its own.
    """
    stem = re.escape(descriptor.removesuffix(".vmdk"))
    return re.compile(rf"{stem}(-(flat|delta|sesparse|rdmp?|ctk|[fs]\d{{3}}))?\.vmdk")


def _browsers(session: Session, vm: VirtualMachine) -> dict[str, Any]:
    """Return the browser of each datastore of a VM by the datastore's name. Two round trips."""
    entity = session.entity(vim.VirtualMachine, vm.moref)
    datastores = retrieve(session, [entity], ("datastore",)).get(entity, {}).get("datastore", ())
    return {each["name"]: each["browser"] for each in retrieve(session, list(datastores), ("name", "browser")).values()}


def _home(vm: VirtualMachine) -> tuple[str, str]:
    match = _PATH.fullmatch(vm.vmx_path)
    if not match or "/" not in match["path"]:
        raise FileUnfit(
            path=vm.vmx_path,
            reason="the VM lies at a datastore's root, among files that may be another's",
            remedy="Move the VM to a folder of its own in vSphere (Storage vMotion), or export it (export-vm)",
        )
    return match["datastore"], match["path"].rpartition("/")[0]


def _backings(disks: tuple[VirtualDisk, ...]) -> Iterator[str]:
    for disk in disks:
        yield from (path for path in (disk.datastore_path, *disk.parents) if path)


def _flat_sizes(disks: tuple[VirtualDisk, ...]) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield how long flat files are: of a thin one the browser may tell what it takes of the datastore."""
    for disk in disks:
        for path in _backings((disk,)):
            yield f"{path.removesuffix('.vmdk')}-flat.vmdk", {"size_bytes": disk.capacity_bytes}


def _below(session: Session, browsers: dict[str, Any], datastore: str, home: str) -> Iterator[DatastoreFile]:
    """Yield the files of a folder and its subfolders; their paths are relative to it."""
    browser = _browser(browsers, datastore)
    top = f"[{datastore}] {home}"
    spec = _spec("*")
    found = run_task(
        session,
        f"a look into {top}",
        lambda: browser.SearchDatastoreSubFolders_Task(top, spec),
        timeout_s=BROWSE_TIMEOUT_S,
    )
    for folder in found or ():
        yield from _files(folder, datastore, inside=home)


def _beside(session: Session, browsers: dict[str, Any], disk: str) -> Iterator[DatastoreFile]:
    """Yield the files of one disk, wherever it lies."""
    match = _PATH.fullmatch(disk)
    if not match:
        return
    datastore, (folder, _, name) = match["datastore"], match["path"].rpartition("/")
    browser, where, mine = _browser(browsers, datastore), f"[{datastore}] {folder}".rstrip(), extents_of(disk)
    spec = _spec(f"{name.removesuffix('.vmdk')}*")
    found = run_task(
        session,
        f"a look into {where}",
        lambda: browser.SearchDatastore_Task(where, spec),
        timeout_s=BROWSE_TIMEOUT_S,
    )
    for file in _files(found, datastore, inside=None) if found else ():
        if mine.fullmatch(file.datastore_path):
            yield file


def _browser(browsers: dict[str, Any], datastore: str) -> Any:
    if datastore not in browsers:
        raise VsphereFault(
            action=f"a look into datastore {datastore}",
            fault="the VM does not name it among its datastores",
            remedy="Look whether the datastore is accessible from the VM's host",
        )
    return browsers[datastore]


def _spec(pattern: str) -> Any:
    details = _Browser.FileInfo.Details(fileType=True, fileSize=True, modification=True, fileOwner=False)
    return _Browser.SearchSpec(matchPattern=[pattern], details=details)


def _files(result: Any, datastore: str, *, inside: str | None) -> Iterator[DatastoreFile]:
    """Yield the files of one folder: relative to the folder `inside`, or (None) below the datastore's name."""
    folder = result.folderPath.partition("]")[2].strip().strip("/")
    for info in result.file or ():
        if isinstance(info, _Browser.FolderInfo):
            continue
        path = f"{folder}/{info.path}" if folder else info.path
        local = f"{datastore}/{path}" if inside is None else path.removeprefix(f"{inside}/")
        yield DatastoreFile(
            datastore_path=f"[{datastore}] {path}",
            path=local,
            size_bytes=info.fileSize or 0,
            modified=info.modification.astimezone(UTC).isoformat() if info.modification else "",
        )
