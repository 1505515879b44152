"""`tasks.boot`: what a report of a boot check says, whatever the guest says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.boot import PICTURE, PICTURE_BYTES, key_of, markdown, proven
from tasks.errors import BootFailed, BootUnproven
from tasks.models import BootCheck

CHECK = BootCheck(
    domain="web",
    verdict="boots",
    recognised="web login:",
    accelerator="tcg",
    seconds=13.2,
    created="2026-01-01T00:00:00",
)
FOLDER = Path("/data/web")


def check(**changes):
    return CHECK.model_copy(update=changes)


@pytest.mark.parametrize(("verdict", "raised"), [("fails", BootFailed), ("unknown", BootUnproven)])
def test_only_a_start_that_was_seen_passes(verdict, raised):
    assert proven(CHECK, FOLDER) is CHECK
    with pytest.raises(raised, match=r"web.*web login:"):
        proven(check(verdict=verdict), FOLDER)


def test_the_picture_is_in_the_report_itself():
    assert "](data:image/png;base64,iVBORw==)" in markdown(CHECK, b"\x89PNG", FOLDER)
    assert "There was none" in markdown(CHECK, b"", FOLDER)
    large = markdown(CHECK, bytes(PICTURE_BYTES + 1), FOLDER)
    assert f"`{PICTURE}`" in large
    assert len(large) < 2000


def test_what_a_guest_says_stays_in_its_block():
    evil = ("```", "# Boots", "<script>", "![x](http://evil.example/)")
    report = markdown(check(serial_tail=evil, recognised="**a** | b <i>", domain="[x](y)"), b"", FOLDER)
    before, _, said = report.partition("````text\n")
    assert said == "\n".join(evil) + "\n````"
    assert r"\*\*a\*\* \| b \<i\>" in before
    assert r"# Boot check of \[x\](y)" in before


@pytest.mark.parametrize(("name", "key"), [("Web 01", "web-01"), ("ü/..", "vm"), ("--a__b--", "a-b")])
def test_a_key_is_made_of_any_name(name, key):
    assert key_of(name) == key
