"""The `boot_check` mode: a copy that lies here, started aside to see whether it boots."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from tasks.boot import check_boot, proven
from tasks.images.dirty import refuse_torn
from tasks.images.job import nobody_at_work
from tasks.job import place_that_stays
from tasks.models import BootCheck, BootJob


@flow(name="boot-check", flow_run_name="boot check {options.folder}")
async def boot_check(options: BootJob) -> BootCheck:
    """Start the domain of an exported VM aside, and see whether it boots.

    Its disks are overlays, so that the images are only read; its network leads nowhere; its controllers, cards and
    firmware are those of `domain.xml`. The last picture of its screen and the last lines of its serial port become an
    artifact of the run and `boot-check.png`, `.log` and `.json` beside the images. The run fails with BootFailed or
    BootUnproven unless the guest was seen to start.

    Args:
        options: Which copy to start, and what proves that it boots.
    """
    folder = place_that_stays(options.folder)
    scratch = place_that_stays(Path(options.scratch)) if options.scratch else None
    with nobody_at_work(folder):
        refuse_torn(folder)
        return proven(await check_boot(folder, options.boot, scratch=scratch), folder)
