"""Constants of the scene, equal to those of the original's compiled model; tests compare the two."""

from __future__ import annotations

import math

CELL = 2.0  # m, side of a grid cell
WALL = 32  # a grid cell holds the index of its texture, plus WALL if the cell is a wall
SPHERE_NUMBERS = (
    7  # numbers that describe a sphere: centre x, y, z (cells), red, green, blue (0 to 255), radius (cells)
)

WALL_HEIGHT = 1.5  # m
WALL_HEIGHT_LOW = 0.4  # m, with good visibility
TARGET_RADIUS = 0.6  # m
BALL_RADIUS = 0.2  # m
TARGET_HEIGHT = 0.0  # m, of a target's centre
TARGET_HEIGHT_HIGH = 1.1  # m, of a target's centre with good visibility

CAMERA_AHEAD = 0.15  # m, ahead of the ball's centre
CAMERA_ABOVE = 0.7  # m, above the ball's centre
CAMERA_COS, CAMERA_SIN = (c / math.hypot(0.99503719021, 0.09950371902) for c in (0.99503719021, 0.09950371902))
"""Cosine and sine of the camera's downward pitch."""
CAMERA_TAN = math.tan(math.radians(80.0 / 2))  # tangent of half the field of view
MAP_HEIGHT = 100.0  # m, of the camera above the maze
MAP_PADDING = 1.1  # side of the map's field of view, relative to the maze

# The two ears, drawn only on the map (m, from the ball's centre).
EARS_ASIDE = 0.22
EARS_ABOVE = 0.4
EARS_RADIUS = 0.26
EARS = ((178.5, 0.0, 0.0), (0.0, 0.0, 178.5))  # colours: red on the right, blue on the left

SAMPLES = ((-0.125, 0.375), (0.375, 0.125), (-0.375, -0.125), (0.125, -0.375))
"""Sample positions (column, row) within a pixel on an edge: OpenGL's standard pattern for four samples."""
