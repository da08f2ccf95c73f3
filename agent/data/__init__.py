"""Data: the replay buffer, episodes on disk, recorded video."""
