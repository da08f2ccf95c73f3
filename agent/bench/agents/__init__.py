"""Measurements of whole agents."""
