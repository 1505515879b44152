"""What an operator configures once and keeps secret: Prefect blocks, settings and nothing else."""

from blocks.esxi import ESXiHost
from blocks.nbd import NbdSource
from blocks.vcenter import VCenter
from blocks.vddk import VddkToolkit
from blocks.wave import MigrationWave

__all__ = ["ESXiHost", "MigrationWave", "NbdSource", "VCenter", "VddkToolkit"]
