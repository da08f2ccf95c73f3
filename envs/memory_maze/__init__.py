"""Memory Maze (Pasukonis, Lillicrap and Hafner 2022, arXiv 2210.13383) as Gymnasium environments; see env.py."""
