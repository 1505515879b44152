"""`tasks.images.slots`: a place for every drive, its own where QEMU has that, and no two in one."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.images.slots import IDE, SATA, TWINS, Slot, slots_of
from tasks.models import Controller, Device
from tests.unit.images.test_manifest import VM

KEYS = {"ParaVirtualSCSIController": 1000, "VirtualAHCIController": 15000, "VirtualIDEController": 200}
KEYS |= {"VirtualLsiLogicSASController": 1000, "VirtualLsiLogicController": 1000, "VirtualNVMEController": 31000}


def vm_with(*controllers: tuple[str, int]):
    return VM.model_copy(
        update={
            "controllers": tuple(Controller(key=KEYS[model] + bus, model=model, bus=bus) for model, bus in controllers)
        }
    )


def drive(key: int, controller: int | None, unit: int | None) -> Device:
    return Device(key=key, label=f"{key}", model="VirtualDisk", controller_key=controller, unit_number=unit)


def test_a_drive_keeps_its_unit_where_the_controller_has_it():
    vm = vm_with(("ParaVirtualSCSIController", 0), ("VirtualAHCIController", 1), ("VirtualIDEController", 1))
    slots = slots_of(vm, [drive(1, 1000, 15), drive(2, 15001, 4), drive(3, 201, 1)], ide=True)
    assert slots == {1: Slot(TWINS["ParaVirtualSCSIController"], 0, 15), 2: Slot(SATA, 0, 4), 3: Slot(IDE, 0, 3)}


def test_controllers_of_the_source_stay_apart_in_the_order_of_their_disks():
    vm = vm_with(("ParaVirtualSCSIController", 3), ("VirtualLsiLogicSASController", 1))
    slots = slots_of(vm, [drive(2048, 1003, 0), drive(2016, 1001, 0)], ide=True)
    assert [(key, slot.kind.model, slot.controller) for key, slot in slots.items()] == [
        (2016, "lsisas1068", 0), (2048, "vmpvscsi", 1),
    ]  # fmt: skip


def test_more_drives_than_a_controller_of_qemu_takes_have_another_one_of_the_same_model():
    vm = vm_with(("VirtualLsiLogicSASController", 0))
    slots = slots_of(vm, [drive(2000 + unit, 1000, unit) for unit in range(16) if unit != 7], ide=True)
    places = [(slot.kind.model, slot.controller, slot.unit) for slot in slots.values()]
    assert Counter(place[:2] for place in places) == {("lsisas1068", 0): 8, ("lsisas1068", 1): 7}
    assert {slots[2000 + unit].unit for unit in range(7)} == set(range(7))


@pytest.mark.parametrize("model", ["VirtualLsiLogicController", "VirtualNVMEController"])
def test_a_controller_without_a_twin_gives_way_to_sata_and_is_named(model):
    slots = slots_of(vm_with((model, 0)), [drive(1, KEYS[model], 3), drive(2, KEYS[model], 9)], ide=True)
    assert slots == {1: Slot(SATA, 0, 0, model), 2: Slot(SATA, 0, 1, model)}


def test_a_drive_whose_controller_is_not_known_is_on_sata():
    assert slots_of(VM, [drive(1, 4711, 0)], ide=True)[1].stands_in_for == "an unknown controller"
    assert slots_of(VM, [drive(1, None, None)], ide=True)[1].kind == SATA


def test_without_ide_its_drives_are_on_sata():
    slots = slots_of(vm_with(("VirtualIDEController", 0)), [drive(1, 200, 0)], ide=False)
    assert slots == {1: Slot(SATA, 0, 0, "VirtualIDEController")}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(KEYS)), st.integers(0, 3)), unique_by=lambda c: KEYS[c[0]] + c[1]),
    st.data(),
)
def test_no_two_drives_share_a_place_and_none_is_beyond_its_controller(controllers, data):
    vm = vm_with(*controllers)
    homes = st.sampled_from([*(each.key for each in vm.controllers), 9])
    places = data.draw(st.lists(st.tuples(homes, st.integers(0, 63)), unique=True))
    drives = [drive(key, home, unit % 2 if 200 <= home < 204 else unit) for key, (home, unit) in enumerate(places)]
    drives = list({(each.controller_key, each.unit_number): each for each in drives}.values())
    ide = data.draw(st.booleans()) and all(each.bus < 2 for each in vm.controllers if each.key < 204)
    slots = slots_of(vm, drives, ide=ide)
    assert slots.keys() == {each.key for each in drives}
    assert len({(slot.kind.bus, slot.controller, slot.unit) for slot in slots.values()}) == len(drives)
    assert all(slot.unit in range(slot.kind.units) for slot in slots.values())
    models = {(slot.kind.bus, slot.controller): slot.kind.model for slot in slots.values()}
    assert all(models[slot.kind.bus, slot.controller] == slot.kind.model for slot in slots.values())
