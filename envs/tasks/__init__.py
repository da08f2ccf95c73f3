"""Small environments of the project: what agents should learn in minutes, and one that counts, for tests."""
