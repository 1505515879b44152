"""Waves of many VMs as values: who, when, in which order, what came of it. No Prefect, no vSphere, no clock."""
