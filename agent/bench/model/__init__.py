"""Benchmarks of V and M."""
