"""`make bench` runs every benchmark, `make bench BENCH=<name>` one; each leaves build/bench/<name>.json."""

from __future__ import annotations

import sys

from tests.benchmarks import cbt, download, fleet, onepass, readers, verify

BENCHMARKS = {
    "cbt": cbt.main,
    "download": download.main,
    "fleet": fleet.main,
    "onepass": onepass.main,
    "readers": readers.main,
    "verify": verify.main,
}


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}: there is {', '.join(BENCHMARKS)}")
    for name in names or BENCHMARKS:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
