"""The data-plane: readers of disk bytes. They know no inventory, no Prefect, and no file of ours."""
