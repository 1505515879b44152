"""`tasks.images.boot_verdict`: what guests are known to say, and what of it counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.images.boot_verdict import is_stop_code, judge, picture_size, plain, text_screen

STOP_CODE_BLUE, BLACK, WHITE = (0, 120, 215), (0, 0, 0), (255, 255, 255)


def picture(*runs: tuple[tuple[int, int, int], int], width: int = 100) -> bytes:
    """Return a PPM of pixels in runs of (colour, count)."""
    body = b"".join(bytes(colour) * count for colour, count in runs)
    return b"P6\n%d %d\n255\n" % (width, len(body) // 3 // width) + body


@pytest.mark.parametrize(
    "line",
    [
        "web login: ",
        "Debian GNU/Linux 12 web ttyS0\n\nweb login:",
        "[  OK  ] Reached target multi-user.target - Multi-User System.",
        "[  OK  ] Reached target Graphical Interface.",
        "SAC>",
    ],
)
def test_it_boots_where_somebody_could_log_in(line):
    assert judge(f"Booting\n{line}\n").verdict == "boots"


@pytest.mark.parametrize(
    "line",
    [
        "No bootable device.",
        "grub rescue> ",
        "[    1.9] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
        "(initramfs) ",
        "ALERT!  UUID=2b0a does not exist.  Dropping to a shell!",
        "dracut:/# ",
        "You are in emergency mode. After logging in, type \"journalctl -xb\"",
        "BdsDxe: No bootable option or device was found.",
        "UEFI Interactive Shell v2.2",
        "BOOTMGR is missing",
        "Missing operating system",
    ],
)  # fmt: skip
def test_what_cannot_be_got_over_ends_it_at_once_and_is_named(line):
    assert judge(f"SeaBIOS\n{line}\nmore") == ("fails", line.strip())


@pytest.mark.parametrize(
    "line",
    [
        'BdsDxe: failed to load Boot0001 "UEFI HARDDISK" from PciRoot(0x0): Not Found',
        "Boot failed: not a bootable disk",
        "error: no such device: 2b0a-77.",
        "error: file `/boot/grub/i386-pc/normal.mod' not found.",
    ],
)
def test_what_may_be_got_over_counts_at_the_end_only(line):
    assert judge(line) is None
    assert judge(line, at_end=True) == ("fails", line)
    assert judge(f"{line}\nweb login: ").verdict == "boots"


def test_only_the_expected_text_proves_a_start_where_one_is_given():
    assert judge("web login: ", expect="ready$") is None
    assert judge("web login: \napp ready\n", expect="^app.*ready$") == ("boots", "app ready")
    assert judge("Kernel panic - not syncing", expect="ready").verdict == "fails"
    assert "'ready'" in judge("web login: ", expect="ready", at_end=True).recognised


def test_silence_is_unknown_at_the_end_and_nothing_before():
    assert judge("") is None
    assert judge("", at_end=True).verdict == "unknown"


@pytest.mark.parametrize(
    ("shown", "stopped"),
    [
        (picture((STOP_CODE_BLUE, 9000), (WHITE, 1000)), True),
        (picture(((0, 0, 128), 9900), (WHITE, 100)), True),  # of Windows XP and 7
        (picture((STOP_CODE_BLUE, 5000), (WHITE, 5000)), False),
        (picture((BLACK, 9900), (WHITE, 100)), False),
        (picture(((200, 200, 255), 10000)), False),
        (b"", False),
        (b"\x89PNG", False),
    ],
)
def test_a_screen_of_one_blue_is_a_stop_code(shown, stopped):
    assert is_stop_code(shown) == stopped
    assert judge("", at_end=True, picture=shown).verdict == ("fails" if stopped else "unknown")


def test_the_size_of_a_picture_is_in_its_header():
    assert picture_size(picture((BLACK, 720 * 400), width=720)) == (720, 400)


def test_a_serial_port_is_read_without_what_moves_the_cursor():
    said = b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS\r\n\x1b[01;01HNo bootable\x1b[7m device.\x1b]0;title\x07\r\nx\x08\x00y"
    assert plain(said) == "SeaBIOS\nNo bootable device.\nxy"


@given(st.binary())
def test_whatever_a_serial_port_says_is_text_without_control_characters(said):
    assert all(each == "\n" or each.isprintable() or each.isspace() for each in plain(said) if each != "\ufffd")


def test_text_mode_is_read_from_the_memory_of_the_screen():
    lines = [b"GRUB loading...", b"", b"grub rescue> _"]
    memory = b"".join(bytes((each, 7)) for line in lines for each in line.ljust(80, b" "))
    assert text_screen(memory + bytes(160)) == "GRUB loading...\ngrub rescue> _"
