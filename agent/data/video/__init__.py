"""Recorded video as clips of rows: a reader per layout, the order in which clips are drawn, loading beside training."""
