"""What is learned from: replay, episodes on disk, recorded video."""
