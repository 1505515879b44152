"""What an operator configures once and keeps secret: Prefect blocks, settings and nothing else."""

from blocks.vcenter import VCenter
from blocks.vddk import VddkToolkit
from blocks.wave import MigrationWave

__all__ = ["MigrationWave", "VCenter", "VddkToolkit"]
