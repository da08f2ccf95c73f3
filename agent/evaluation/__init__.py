"""What an agent or a world model is worth: returns, open-loop errors, pictures."""
