"""The folder of a run: configuration, checkpoints, the record."""
