"""How M is trained to predict, and how it is sampled."""
