"""`tasks.vsphere.disks`: disks as a device list describes them, and why one cannot be copied."""

import pytest
from pyVmomi import vim

from tasks.vsphere.disks import disks_among

Disk = vim.vm.device.VirtualDisk
SCSI, SHARED_SCSI = 1000, 1001


def device(key=2000, *, backing=Disk.FlatVer2BackingInfo, controller=SCSI, **fields):
    backing = backing(**({"fileName": "[ds] web/web.vmdk", "diskMode": "persistent"} | fields))
    label = vim.Description(label=f"Hard disk {key - 1999}", summary="")
    return Disk(
        key=key, controllerKey=controller, unitNumber=0, capacityInBytes=1 << 20, capacityInKB=1 << 10,
        backing=backing, deviceInfo=label,
    )  # fmt: skip


def controllers():
    free, shared = (vim.vm.device.ParaVirtualSCSIController(key=key, busNumber=key - SCSI) for key in (1000, 1001))
    free.sharedBus, shared.sharedBus = "noSharing", "physicalSharing"
    return [free, shared]


def described(*devices):
    return disks_among([*controllers(), *devices])


def test_disks_keep_the_order_of_the_device_list_whatever_their_keys():
    assert [(disk.index, disk.key) for disk in described(device(2017), device(2000), device(2016))] == [
        (0, 2017), (1, 2000), (2, 2016),
    ]  # fmt: skip


def test_a_plain_disk_has_no_problem_and_a_title_that_says_which_it_is():
    (disk,) = described(device())
    assert (disk.problem, disk.remedy, disk.parents, disk.object_id) == (None, None, (), None)
    assert disk.title == "Hard disk 1 ([ds] web/web.vmdk)"


@pytest.mark.parametrize(("given", "known"), [("", None), (None, None), ("rfc4122.0a", "rfc4122.0a")])
def test_an_object_is_told_from_a_file_by_an_id_that_is_not_empty(given, known):
    (disk,) = described(device(backingObjectId=given))
    assert disk.object_id == known


@pytest.mark.parametrize(
    "mode", ["independent_persistent", "independent_nonpersistent", "nonpersistent", "append", "undoable"]
)
def test_a_mode_that_is_not_persistent_is_named(mode):
    (disk,) = described(device(diskMode=mode))
    assert mode in disk.problem
    assert disk.remedy


@pytest.mark.parametrize("compatibility", ["virtualMode", "physicalMode"])
def test_a_raw_device_mapping_is_one_in_either_mode(compatibility):
    backing = Disk.RawDiskMappingVer1BackingInfo
    (disk,) = described(device(backing=backing, compatibilityMode=compatibility))
    assert "raw device mapping" in disk.problem


def test_a_key_means_encrypted():
    (disk,) = described(device(keyId=vim.encryption.CryptoKeyId(keyId="k")))
    assert "encrypted" in disk.problem


def test_a_disk_is_shared_by_itself_or_by_the_bus_of_its_controller():
    by_itself, by_bus, not_at_all = described(
        device(2000, sharing="sharingMultiWriter"), device(2001, controller=SHARED_SCSI), device(2002)
    )
    assert "shared" in by_itself.problem
    assert "shared" in by_bus.problem
    assert not_at_all.problem is None


def test_the_backings_below_are_listed_nearest_first():
    base = Disk.FlatVer2BackingInfo(fileName="[ds] web/web.vmdk", diskMode="persistent")
    middle = Disk.FlatVer2BackingInfo(fileName="[ds] web/web-000001.vmdk", diskMode="persistent", parent=base)
    (disk,) = described(device(fileName="[ds] web/web-000002.vmdk", parent=middle))
    assert disk.parents == ("[ds] web/web-000001.vmdk", "[ds] web/web.vmdk")
