"""A wave that is kept: which VMs of which vCenter, in which order, how and when."""

from __future__ import annotations

from prefect.blocks.core import Block
from pydantic import Field

from blocks.vcenter import VCenter
from tasks.wave.models import Wave


class MigrationWave(Block):
    """A migration wave, to be carried out once or on a schedule.

    Example:
        Save one, and run the deployment `saved-wave` with it:

        ```python
        from blocks import MigrationWave, VCenter
        from tasks.wave.models import Wave

        wave = Wave(name="finance-1", output_dir="/data/exports", select=["/DC/vm/finance/*"], canary=["web-1"])
        MigrationWave(vcenter=VCenter.load("production"), wave=wave).save("finance-1")
        ```
    """

    _block_type_name = "Migration Wave"
    _block_type_slug = "migration-wave"
    _description = "Which VMs of a vCenter are migrated together, in which order, how and when."

    vcenter: VCenter = Field(title="vCenter", description="Where the VMs are now: a saved vCenter.")
    wave: Wave = Field(title="Wave", description="Which VMs, in which order, how and when.")
