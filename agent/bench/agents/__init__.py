"""Benchmarks of whole agents."""
