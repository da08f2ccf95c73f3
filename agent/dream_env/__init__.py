"""``longdream/Dream-v0``: the dream of a trained world model as a Gymnasium vector environment."""
