"""The scene's constants, as the original's compiled model has them; tests compare them with it."""

from __future__ import annotations

import math

CELL = 2.0  # m, side of a grid cell
WALL = 32  # a grid cell holds the index of its texture, and this much more if it is a wall
SPHERE_NUMBERS = 7  # of a sphere in the scene: centre x, y, z, red, green, blue (0 to 255), radius; lengths in cells

WALL_HEIGHT, WALL_HEIGHT_LOW = 1.5, 0.4  # m; the second with good visibility
TARGET_RADIUS = 0.6  # m
BALL_RADIUS = 0.2  # m
TARGET_HEIGHT, TARGET_HEIGHT_HIGH = 0.0, 1.1  # m, of a target's centre

CAMERA_AHEAD, CAMERA_ABOVE = 0.15, 0.7  # m, of the ball's centre
CAMERA_COS, CAMERA_SIN = (c / math.hypot(0.99503719021, 0.09950371902) for c in (0.99503719021, 0.09950371902))
"""Of the angle by which the camera looks down."""
CAMERA_TAN = math.tan(math.radians(80.0 / 2))  # half of the field of view
MAP_HEIGHT = 100.0  # m, of the camera above
MAP_PADDING = 1.1  # how much more than the maze it sees

EARS_ASIDE, EARS_ABOVE, EARS_RADIUS = 0.22, 0.4, 0.26  # m, of the ball's centre; only on the map
EARS = ((178.5, 0.0, 0.0), (0.0, 0.0, 178.5))  # red to the right, blue to the left

SAMPLES = ((-0.125, 0.375), (0.375, 0.125), (-0.375, -0.125), (0.125, -0.375))
"""Where in a pixel on an edge colours are taken, columns and rows: OpenGL's usual four."""
