"""Fast Memory Maze: ``longdream/FastMemoryMaze-{9x9,11x11,13x13,15x15}-v0``, batched on the CPU or on CUDA."""

from longdream.envs.extras import require

require("maze", "Fast Memory Maze")
