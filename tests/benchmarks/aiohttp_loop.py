"""The old tool's way, as a process: aiohttp and aiofiles, chunks of 1 MiB. `aiohttp_loop <CA file> <folder> <url>…`"""

from __future__ import annotations

import asyncio
import ssl
import sys
from pathlib import Path

import aiofiles
import aiohttp

from tests.benchmarks.child import measured
from tests.benchmarks.measure import MIB, make_durable

AT_ONCE = 4


async def fetch_all(ca_file: str, folder: Path, urls: list[str]) -> None:
    context, few = ssl.create_default_context(cafile=ca_file), asyncio.Semaphore(AT_ONCE)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context), raise_for_status=True) as session:

        async def fetch(url: str, target: Path) -> None:
            async with few, session.get(url) as response, aiofiles.open(target, "wb") as file:
                async for chunk in response.content.iter_chunked(MIB):
                    await file.write(chunk)

        await asyncio.gather(*(fetch(url, folder / f"{number}.raw") for number, url in enumerate(urls)))


def main(ca_file: str, folder: str, *urls: str) -> None:
    def work() -> None:
        asyncio.run(fetch_all(ca_file, Path(folder), list(urls)))
        make_durable(Path(folder))

    measured(work)


if __name__ == "__main__":
    main(*sys.argv[1:])
