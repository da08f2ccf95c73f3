"""Spaces of any kind, read as the flat ones that agents see: envs/contract.py says which these are."""
