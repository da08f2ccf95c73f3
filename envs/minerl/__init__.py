"""Minecraft through MineRL, which runs in an interpreter of its own; nothing here imports it."""
