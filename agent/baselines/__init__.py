"""What agents are compared with: model-free algorithms, scripted policies."""
