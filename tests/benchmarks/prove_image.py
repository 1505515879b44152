"""One image proved again, as a process: `prove_image <image> <format> <sidecar>`; the sidecar is the manifest too."""

from __future__ import annotations

import sys
from pathlib import Path

from tasks.images.digests import Digests
from tasks.images.prove import Claim, prove
from tasks.models import ImageFormat
from tests.benchmarks.child import measured


def main(image: str, format: ImageFormat, sidecar: str) -> None:
    with Digests.open(Path(sidecar)) as digests:
        size, digest = digests.size, digests.image_digest()
    claim = Claim(name=image, path=Path(image), format=format, size_bytes=size, digest=digest, sidecar=Path(sidecar))

    def check() -> None:
        verdict = prove(claim).verdict
        assert verdict == "equal", verdict

    measured(check)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
