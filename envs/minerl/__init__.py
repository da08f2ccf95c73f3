"""Minecraft through MineRL, which lives in an interpreter of its own; nothing here imports it."""
