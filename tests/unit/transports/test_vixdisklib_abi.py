"""The layouts that ctypes is told are the ones that a C compiler makes of the public API."""

import ctypes
import subprocess
from ctypes import Structure

import pytest

from tasks.transports import vixdisklib_abi as abi
from tests.labs import VDDK

STRUCTURES = {"ConnectParams": abi.ConnectParams, "Info": abi.Info, "Block": abi.Block, "BlockList": abi.BlockList}


@pytest.fixture(scope="module")
def layout() -> dict[str, int]:
    judge = VDDK / "judge"
    assert judge.exists(), "build/vixdisklib is missing: run `make setup`"
    lines = subprocess.run([str(judge), "layout"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: int(number) for name, number in (line.split() for line in lines)}


def test_every_size_and_offset_is_that_of_a_c_program(layout: dict[str, int]) -> None:
    assert layout["VixDiskLibConnectParams"] == 128
    for name, number in layout.items():
        structure, _, field = name.removeprefix("VixDiskLib").partition(".")
        if name == "VixError":
            assert ctypes.sizeof(abi.VixError) == number
        elif field:
            assert getattr(STRUCTURES[structure], field).offset == number, name
        else:
            assert ctypes.sizeof(STRUCTURES[structure]) == number, name


def test_info_before_7_ends_where_the_two_later_fields_begin() -> None:
    assert abi.Info.logicalSectorSize.offset == 56
    assert issubclass(abi.Info, Structure)


def test_a_library_without_a_needed_symbol_is_told_by_its_name() -> None:
    assert "VixDiskLib_ConnectEx" in abi.declare(ctypes.CDLL(None))


def test_the_code_is_in_the_low_16_bits() -> None:
    assert abi.code_of(0x0000_0011_0000_36B9) == 14009


@pytest.mark.parametrize(
    ("code", "text", "words"),
    [
        (14009, "", "vc:443, or port 902 of the ESXi host behind it, refuses the connection, VIX error 14009"),
        (16064, "No licence", r"backup API that VDDK uses \(No licence\), VIX error 16064"),
        (7, "A file error", "^A file error, VIX error 7$"),
        (7, "", "^no words for it, VIX error 7$"),
    ],
)
def test_a_code_has_words(code: int, text: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(abi.in_words(code, host="vc:443", text=text))
