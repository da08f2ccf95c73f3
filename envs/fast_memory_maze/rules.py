"""One action of one copy: motors, 50 substeps among walls, which targets were touched, what is rewarded and prompted.

Lengths in m, from the grid's bottom left corner. Written in functions of numbers that hold for many copies at once:
see dialect.py. The body's equations are body.py's.
"""

# ruff: noqa: F821  -- where, substep, ... are given by the dialect
# pyright: reportUndefinedVariable=false

from longdream.envs.fast_memory_maze.scene import CELL, SPHERE_NUMBERS, TARGET_RADIUS, WALL

TOUCH = 0.8  # m, of centres: ball 0.2 and target 0.6
HEAD_ABOVE, HEAD_RADIUS, HEAD_HALF = 0.33, 0.1, 0.06  # an upright cylinder, above the ball's centre
FACE_ABOVE, FACE_AHEAD, FACE_RADIUS, FACE_HALF = 0.33, 0.1, 0.05, 0.035  # a cylinder along the view
NO_WALL = 9.0


@inner
def walls(cells, at, size, x, y):
    """The walls beside a ball at (x, y): (gap, x, y of the direction away from it) of two at most; NO_WALL for none.

    The first is the one in x, or the edge of the cell across the corner if that stands alone; the second that in y."""
    column, row = floor(x / CELL), floor(y / CELL)
    column, row = minimum(maximum(column, 1), size - 2), minimum(maximum(row, 1), size - 2)
    u, v = x - CELL * column - 0.5 * CELL, y - CELL * row - 0.5 * CELL
    right, up = where(u > 0.0, 1, -1), where(v > 0.0, 1, -1)
    du, dv = 0.5 * CELL - absolute(u), 0.5 * CELL - absolute(v)
    beside = fetch(cells, at + row * size + column + right) >= WALL
    above = fetch(cells, at + (row + up) * size + column) >= WALL
    across = fetch(cells, at + (row + up) * size + column + right) >= WALL
    edge = (beside == 0) & (above == 0) & across
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
    ahead, aside = dx * cos(h) + dy * sin(h), dx * sin(h) - dy * cos(h)
    a = maximum(absolute(ahead - FACE_AHEAD) - FACE_HALF, 0.0)
    b = maximum(sqrt(aside * aside + (dz - FACE_ABOVE) * (dz - FACE_ABOVE)) - FACE_RADIUS, 0.0)
    return ball | head | (a * a + b * b < TARGET_RADIUS * TARGET_RADIUS)


@inner
def act(cells, at, size, targets, first, count, substeps, action, x, y, z, h, vx, vy, vz, w, r):
    """One action, 0 to 5: `substeps` substeps. Returns the body's new state and the bits of the targets touched."""
    forward = (action == 1) | (action >= 4)
    left, right = (action == 2) | (action == 4), (action == 3) | (action == 5)
    roll = where(forward, ROLL_GEAR, 0.0) + 0.0 * x
    turn = where(left, TURN_GEAR, where(right, -TURN_GEAR, 0.0)) + 0.0 * x
    touched = action * 0
    i = 0
    while i < substeps:
        gap_a, ax, ay, gap_b, bx, by = walls(cells, at, size, x, y)
        x, y, z, h, vx, vy, vz, w, r = substep(x, y, z, h, vx, vy, vz, w, r, turn, roll, gap_a, ax, ay, gap_b, bx, by)
        for k in range(count):
            ball = first + SPHERE_NUMBERS * k
            tx, ty = fetch(targets, ball) * CELL, fetch(targets, ball + 1) * CELL
            near = touches(x, y, z, h, tx, ty, fetch(targets, ball + 2) * CELL)
            touched = touched | where(near, 1 << k, 0)
        i += 1
    return x, y, z, h, vx, vy, vz, w, r, touched


@inner
def judge(touched, count, prompt, key, picks):
    """What touching these targets means: (reward, prompt, number of prompts drawn so far).

    Touching the prompted one is rewarded and another prompt drawn, uniformly from those that may come next. As in the
    original, touches are cleared one after another, so targets being touched may come next only if they stand before
    the one just reached. Draw number `picks` of a key is a hash of both, by two multiplications and shifts."""
    got = ((touched >> prompt) & 1) == 1
    number = (key + 1 + picks * 2654435769) & 4294967295
    number = number ^ (number >> 16)
    number = (number * 569420461) & 4294967295
    number = number ^ (number >> 15)
    number = (number * 1935289751) & 4294967295
    number = number ^ (number >> 15)
    free = prompt * 0
    for k in range(count):
        free = free + where((((touched >> k) & 1) == 0) | (k < prompt), 1, 0)
    place = number % maximum(free, 1)
    chosen = prompt * 1
    for k in range(count):
        may = (((touched >> k) & 1) == 0) | (k < prompt)
        chosen = where(may & (place == 0), k, chosen)
        place = place - where(may, 1, 0)
    return where(got, 1.0, 0.0), where(got, chosen, prompt), picks + where(got, 1, 0)
