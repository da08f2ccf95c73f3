"""Baselines to compare agents with: model-free algorithms, scripted policies."""
