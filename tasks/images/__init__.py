"""This side: the copy loop, writers, digests, verification, the manifest. No vSphere and no Prefect."""
