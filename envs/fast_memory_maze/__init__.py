"""``longdream/FastMemoryMaze-{9x9,11x11,13x13,15x15}-v0``: Memory Maze, thousands of copies at once, on CPU or CUDA."""
