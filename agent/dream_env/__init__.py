"""``longdream/Dream-v0``: the dreams of a trained world model as a Gymnasium vector environment."""
