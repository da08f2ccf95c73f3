"""Measurements of environments."""
