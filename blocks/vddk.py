"""Where VMware's VDDK lies, and how it is to read."""

from __future__ import annotations

from pathlib import Path

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field

from blocks.closed import closed
from tasks.models import VDDK_TRANSPORT_MODES, OptionalText, VddkCompression, VddkSettings


class VddkToolkit(Block):
    """VMware's Virtual Disk Development Kit as it lies on the workers' machines. It is VMware's, and not shipped here.

    Example:
        Save one, and read disks with it:

        ```python
        from blocks import VddkToolkit

        VddkToolkit(libdir="/usr/lib/vmware-vix-disklib").save("vddk-8")
        ```
    """

    model_config = ConfigDict(json_schema_extra=closed)

    _block_type_name = "VDDK Toolkit"
    _block_type_slug = "vddk-toolkit"
    _description = "Where VMware's VDDK (vmware-vix-disklib-distrib) lies on the worker's machine."

    libdir: OptionalText = Field(
        default="",
        title="Folder",
        description="VMware's unpacked vmware-vix-disklib-distrib, or its lib64. Empty: where it usually is.",
        examples=["/usr/lib/vmware-vix-disklib"],
    )
    transport_modes: str = Field(
        default=VDDK_TRANSPORT_MODES,
        title="Transport modes",
        description="What the library may read by, the first that works; nbd is nbdssl without encryption.",
        examples=[VDDK_TRANSPORT_MODES],
        pattern=r"^\w+(:\w+)*$",
    )
    compression: VddkCompression = Field(
        default="none",
        title="Compression on the network",
        description="skipz leaves out zeros, fastlz and zlib compress: where the network is the slowest part.",
        examples=["none"],
    )
    large_buffers: bool = Field(
        default=False,
        title="Large buffers",
        description="1 MiB buffers, four of them, for each session. May help many VMs of one host at once; helps no "
        "single one.",
        examples=[False],
    )

    def settings(self) -> VddkSettings:
        """Return the plain value that the rooms below understand."""
        return VddkSettings(
            libdir=Path(self.libdir) if self.libdir else None,
            transport_modes=self.transport_modes,
            compression=self.compression,
            large_buffers=self.large_buffers,
        )
