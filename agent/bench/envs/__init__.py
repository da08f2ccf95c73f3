"""Benchmarks of environments."""
