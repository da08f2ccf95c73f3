"""Evaluation of agents and world models: returns, open-loop errors, pictures."""
