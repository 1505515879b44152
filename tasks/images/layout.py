"""The names of every file that belongs to one disk of an exported VM. What is in them is not known here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.images.files import part_of

_LEFT_OVER = re.compile(r"disk-\d+\.(journal|(raw|qcow2|converted|digests)\.part)")


@dataclass(frozen=True)
class DiskFiles:
    """The files of disk `index` in `folder`. A `part` is neither complete nor verified; a final name means both."""

    folder: Path
    index: int

    @property
    def raw_part(self) -> Path:
        """What arrives from the source byte for byte."""
        return self.part("raw")

    @property
    def converted(self) -> Path:
        """What a second pass makes of the part that arrived, if there is one."""
        return self._named("converted.part")

    @property
    def journal(self) -> Path:
        """Which extents of the part that arrives are durable."""
        return self._named("journal")

    @property
    def dirty(self) -> Path:
        """Which leaves of the image a sync is about to change."""
        return self._named("dirty")

    @property
    def digests(self) -> Path:
        return self._named("digests")

    @property
    def digests_part(self) -> Path:
        return part_of(self.digests)

    @property
    def sidecar(self) -> Path:
        """The digests where they lie now: `land_all` may have been killed between their name and the image's."""
        return self.digests if self.digests.exists() else self.digests_part

    def final(self, format: str) -> Path:
        return self._named(format)

    def unnamed(self, format: str, *, converted: bool) -> Path:
        """The image while it waits for its final name."""
        return self.converted if converted else self.part(format)

    def image(self, format: str, *, converted: bool) -> Path:
        """The image where it lies now, named or not."""
        return self.final(format) if self.final(format).exists() else self.unnamed(format, converted=converted)

    def part(self, format: str) -> Path:
        return part_of(self.final(format))

    def _named(self, ending: str) -> Path:
        return self.folder / f"disk-{self.index}.{ending}"


def left_overs(folder: Path) -> Iterator[Path]:
    """Yield the journals and parts in `folder`: what a run leaves that did not come to its end."""
    for path in sorted(folder.glob("disk-*")):
        if _LEFT_OVER.fullmatch(path.name):
            yield path
