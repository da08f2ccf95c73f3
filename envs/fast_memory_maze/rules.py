"""Rules of the fast Memory Maze: one action of one copy, the targets touched by it, its reward and the next prompt.

Lengths are in metres, from the grid's bottom left corner. The physics of the body is in body.py. The functions take
scalars or blocks of many copies: see dialect.py.
"""

# ruff: noqa: F821  -- where, ... are the primitives that dialect.py defines, substep, ... come from body.py
# pyright: reportUndefinedVariable=false

from longdream.envs.fast_memory_maze.scene import CELL, SPHERE_NUMBERS, TARGET_RADIUS, WALL

TOUCH = 0.8  # m, between the centres: radius 0.2 of the ball and 0.6 of the target
# The head is an upright cylinder above the ball's centre (m).
HEAD_ABOVE = 0.33
HEAD_RADIUS = 0.1
HEAD_HALF = 0.06
# The face is a cylinder along the direction of view (m).
FACE_ABOVE = 0.33
FACE_AHEAD = 0.1
FACE_RADIUS = 0.05
FACE_HALF = 0.035
NO_WALL = 9.0  # m, a gap too large for contact


@inner
def walls(cells, offset, size, x, y):
    """The walls beside a ball at (x, y): (gap, normal x, normal y) of up to two walls; the gap is NO_WALL for none.

    The first is the wall in x, or the edge of the diagonal cell if neither neighbour is a wall. The second is the wall
    in y. The grid of this copy begins at cells[offset]."""
    column = floor(x / CELL)
    row = floor(y / CELL)
    column = minimum(maximum(column, 1), size - 2)
    row = minimum(maximum(row, 1), size - 2)
    u = x - CELL * column - 0.5 * CELL
    v = y - CELL * row - 0.5 * CELL
    right = where(u > 0.0, 1, -1)
    up = where(v > 0.0, 1, -1)
    du = 0.5 * CELL - absolute(u)
    dv = 0.5 * CELL - absolute(v)
    beside = fetch(cells, offset + row * size + column + right) >= WALL
    above = fetch(cells, offset + (row + up) * size + column) >= WALL
    diagonal = fetch(cells, offset + (row + up) * size + column + right) >= WALL
    edge = (beside == 0) & (above == 0) & diagonal
    distance = sqrt(du * du + dv * dv)
    scale = 1.0 / maximum(distance, 1e-9)
    gap = where(beside, du, where(edge, distance, NO_WALL))
    nx = where(edge, -right * du * scale, -1.0 * right)
    ny = where(edge, -up * dv * scale, 0.0 * v)
    return gap, nx, ny, where(above, dv, NO_WALL), 0.0 * v, -1.0 * up


@inner
def touches(x, y, z, h, tx, ty, tz):
    """Whether the ball, or the head above it, overlaps a target at (tx, ty, tz)."""
    dx, dy, dz = tx - x, ty - y, tz - z
    level = dx * dx + dy * dy
    ball = level + dz * dz < TOUCH * TOUCH
    a = maximum(sqrt(level) - HEAD_RADIUS, 0.0)
    b = maximum(absolute(dz - HEAD_ABOVE) - HEAD_HALF, 0.0)
    head = a * a + b * b < TARGET_RADIUS * TARGET_RADIUS
    ahead = dx * cos(h) + dy * sin(h)
    aside = dx * sin(h) - dy * cos(h)
    a = maximum(absolute(ahead - FACE_AHEAD) - FACE_HALF, 0.0)
    b = maximum(sqrt(aside * aside + (dz - FACE_ABOVE) * (dz - FACE_ABOVE)) - FACE_RADIUS, 0.0)
    return ball | head | (a * a + b * b < TARGET_RADIUS * TARGET_RADIUS)


@inner
def act(cells, offset, size, targets, first, count, substeps, action, x, y, z, h, vx, vy, vz, w, r):
    """Apply one action, 0 to 5, for `substeps` substeps.

    Returns the body's new state, and an integer with bit k set if target k was touched. The copy's `count` targets
    begin at targets[first]."""
    forward = (action == 1) | (action >= 4)
    left = (action == 2) | (action == 4)
    right = (action == 3) | (action == 5)
    roll = where(forward, ROLL_GEAR, 0.0) + 0.0 * x
    turn = where(left, TURN_GEAR, where(right, -TURN_GEAR, 0.0)) + 0.0 * x
    touched = action * 0
    i = 0
    while i < substeps:
        gap_1, n1x, n1y, gap_2, n2x, n2y = walls(cells, offset, size, x, y)
        x, y, z, h, vx, vy, vz, w, r = substep(
            x, y, z, h, vx, vy, vz, w, r, turn, roll, gap_1, n1x, n1y, gap_2, n2x, n2y
        )
        for k in range(count):
            target = first + SPHERE_NUMBERS * k
            tx = fetch(targets, target) * CELL
            ty = fetch(targets, target + 1) * CELL
            touching = touches(x, y, z, h, tx, ty, fetch(targets, target + 2) * CELL)
            touched = touched | where(touching, 1 << k, 0)
        i += 1
    return x, y, z, h, vx, vy, vz, w, r, touched


@inner
def update_prompt(touched, count, prompt, key, picks):
    """The outcome of touching these targets: (reward, next prompt, number of prompts drawn so far).

    Touching the prompted target gives reward 1, and another prompt is drawn uniformly from the eligible targets. As in
    the original, touches are cleared one after another: a target that is being touched is eligible only if its index
    is below the prompted one's. Draw number `picks` of a copy is a hash of the copy's key and that number (a
    multiply-and-xorshift hash with two multiplications)."""
    rewarded = ((touched >> prompt) & 1) == 1
    number = (key + 1 + picks * 2654435769) & 4294967295
    number = number ^ (number >> 16)
    number = (number * 569420461) & 4294967295
    number = number ^ (number >> 15)
    number = (number * 1935289751) & 4294967295
    number = number ^ (number >> 15)
    eligible_count = prompt * 0
    for k in range(count):
        eligible_count = eligible_count + where((((touched >> k) & 1) == 0) | (k < prompt), 1, 0)
    rank = number % maximum(eligible_count, 1)
    chosen = prompt * 1
    for k in range(count):
        eligible = (((touched >> k) & 1) == 0) | (k < prompt)
        chosen = where(eligible & (rank == 0), k, chosen)
        rank = rank - where(eligible, 1, 0)
    return where(rewarded, 1.0, 0.0), where(rewarded, chosen, prompt), picks + where(rewarded, 1, 0)
