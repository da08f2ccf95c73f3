"""V, M and C composed into one agent, and its updates."""
