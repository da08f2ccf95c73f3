"""Real worlds and the contract they are seen through. Importing it registers the project's own environments."""

from longdream.envs.make import World, register

__all__ = ["World", "register"]

register()
