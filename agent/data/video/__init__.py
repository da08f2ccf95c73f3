"""Recorded video as clips of rows: a reader per layout, the order of clips, loading in the background."""
