"""Measurements of V and M."""
