"""Whether a guest has started, from what it says and shows. Pure: nothing is run or read here.

What each text means is its author's: SeaBIOS src/boot.c, GRUB kern/rescue_reader.c, Linux init/do_mounts.c and
kernel/panic.c, initramfs-tools scripts/functions, dracut's emergency shell, systemd units/emergency.service.in,
EDK II MdeModulePkg/Universal/BdsDxe.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import NamedTuple

from tasks.models import BootVerdict

BLUE_SHARE = 0.6  # of a stop code's screen that is its background
LINE_CHARACTERS = 200

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")  # ECMA-48
_TEXT_COLUMNS = 80

# A login prompt, systemd's word that everything is up, or Windows' console on the serial port.
_STARTED = re.compile(
    r"^\S.{0,64}\blogin: ?$|^.*Reached target .*(?:Multi-User|multi-user|Graphical Interface|Login Prompts).*|^SAC>",
    re.MULTILINE,
)
_FAILED_FOR_GOOD = re.compile(
    r"^.*(?:No bootable device|grub rescue>|Kernel panic - not syncing|Unable to mount root|Cannot open root device"
    r"|\(initramfs\)|ALERT!.*does not exist|dracut:/#|Entering emergency mode|You are in (?:emergency|rescue) mode"
    r"|No bootable option or device was found|UEFI Interactive Shell|(?:BOOTMGR|NTLDR) is (?:missing|compressed)"
    r"|Operating System not found|Missing operating system|Error loading operating system).*$",
    re.MULTILINE | re.IGNORECASE,
)
# What may be got over: another boot entry, a default that is there.
_FAILED_SO_FAR = re.compile(
    r"^.*(?:Boot failed: |BdsDxe: failed to |error: (?:no such (?:device|partition|disk)|unknown filesystem"
    r"|file .* not found|disk .* not found)).*$",
    re.MULTILINE,
)


class Finding(NamedTuple):
    """A verdict, and the line that it rests on."""

    verdict: BootVerdict
    recognised: str


def judge(text: str, *, expect: str = "", at_end: bool = False, picture: bytes = b"") -> Finding | None:
    """Return what `text` (serial port and screen, as of now) says of the guest; None where it says nothing yet.

    expect: a pattern that alone proves a start. at_end: nothing more will come. picture: the screen, a PPM.
    """
    if found := re.compile(expect, re.MULTILINE).search(text) if expect else _STARTED.search(text):
        return Finding("boots", _shown(found[0]))
    if found := _FAILED_FOR_GOOD.search(text):
        return Finding("fails", _shown(found[0]))
    if not at_end:
        return None
    if found := _FAILED_SO_FAR.search(text):
        return Finding("fails", _shown(found[0]))
    if is_stop_code(picture):
        return Finding("fails", "a screen of one blue: a stop code of Windows")
    return Finding("unknown", f"nothing like {expect!r} was seen" if expect else "nothing was recognised")


def plain(said: bytes) -> str:
    """Return what a serial port said as text: no escape sequence, no control character, lines end in a newline."""
    text = _ESCAPE.sub("", said.decode(errors="replace"))
    text = re.sub(r"\r+\n?", "\n", text)
    return "".join(each for each in text if each == "\n" or unicodedata.category(each)[0] != "C")


def text_screen(memory: bytes) -> str:
    """Return the lines that stand in the memory of a VGA in text mode: character and colour, 80 of them a line."""
    characters = memory[::2].decode("cp437")
    lines = (characters[start : start + _TEXT_COLUMNS] for start in range(0, len(characters), _TEXT_COLUMNS))
    return "\n".join(stripped for line in lines if (stripped := line.replace("\0", " ").rstrip()))


def picture_size(picture: bytes) -> tuple[int, int]:
    """Return width and height of a PPM as QEMU writes them; (0, 0) where it is none."""
    header = re.match(rb"P6\s+(\d+)\s+(\d+)\s+255\s", picture)
    return (int(header[1]), int(header[2])) if header else (0, 0)


def is_stop_code(picture: bytes) -> bool:
    """Tell whether a picture (a PPM) is mostly of one strong blue, as Windows' stop codes are."""
    width, height = picture_size(picture)
    body = picture[len(picture) - width * height * 3 :]
    pixels = Counter(zip(body[0::3], body[1::3], body[2::3], strict=True))
    ((red, green, blue), count), *_ = pixels.most_common(1) or [((0, 0, 0), 0)]
    return blue >= 100 and blue >= 1.5 * max(red, green) and count >= BLUE_SHARE * width * height


def _shown(line: str) -> str:
    return line.strip()[:LINE_CHARACTERS]
