"""Real environments and their common interface. Importing this package registers the project's own environments."""

from longdream.envs.make import World, register

__all__ = ["World", "register"]

register()
