"""What the camera sees along a ray, and in which colour: the picture that MuJoCo's renderer draws of such a maze.

Lengths are in cells (2 m), x and y from the grid's bottom left corner, z from the floor. A grid cell holds the index
of its texture, and WALL more if it is a wall. The only light is the headlight, which shines along the camera's view
without regard to distance, so that a flat face has one brightness; no shadows, no gloss. Every cell and wall face
carries its texture exactly once, as the original's blocks repeat it once per cell; walls show its upper part, as much
as fits their height.

Everything here is written in functions of numbers that hold for many pixels at once: see dialect.py.
"""

# ruff: noqa: F821  -- where, sqrt, ... are given by the dialect
# pyright: reportUndefinedVariable=false

from longdream.envs.fast_memory_maze.scene import SPHERE_NUMBERS, WALL

AMBIENT = 0.3
DIFFUSE = 0.6
TEXELS = 1024  # along a texture's edge, at level 0
LAST = 10  # level of one texel
TEXTURE = (4 * TEXELS * TEXELS - 1) // 3  # texels of all its levels
SKY_RED, SKY_GREEN, SKY_BLUE = 102.0, 153.0, 204.0
FAR = 1e9


@inner
def hit(cells, at, size, x, y, z, dx, dy, dz, wall_height, targets, first, count):
    """Follow rays (dx, dy, dz) from (x, y, z) to the first surface.

    cells: grids of `size` by `size` cells, the ray's from index `at` on. targets: the spheres, as scene.py
    lists their numbers, the ray's `count` from index `first` on.

    Returns (distance in units of the direction, face, texture): face 0 and 1 are walls across x and y, 2 is level
    (floor, or top of a wall), 3 is a sphere, whose index is the texture then, 4 is the sky."""
    column, row = floor(x), floor(y)
    cell = at + row * size + column
    per_x, per_y = where(absolute(dx) < 1e-9, 1e-9, dx), where(absolute(dy) < 1e-9, 1e-9, dy)
    right, up = where(per_x > 0.0, 1, 0), where(per_y > 0.0, 1, 0)
    per_x, per_y = 1.0 / per_x, 1.0 / per_y
    next_x, next_y = (column + right - x) * per_x, (row + up - y) * per_y
    # a little early, so that rounding never lets a ray step out of the grid
    leaving = 0.9999 * minimum((size * right - x) * per_x, (size * up - y) * per_y)
    wide_x, wide_y = absolute(per_x), absolute(per_y)
    step_x, step_y = 2 * right - 1, (2 * up - 1) * size
    # a ray ends at the floor, at the grid's border, or where it rises above the walls
    slope = 1.0 / where(absolute(dz) < 1e-9, 1e-9, dz)
    top = (wall_height - z) * slope
    ground = where(dz < 0.0, -z * slope, FAR)
    end = minimum(leaving, where(dz < 0.0, ground, maximum(top, 0.0)))
    top = where(dz < 0.0, top, 0.0)
    reached, passed = 0.0 * dx, 0.0 * dx
    value = where(dx > FAR, 1, 0)
    across = dx > FAR
    going = dx < FAR
    while some(going):
        across = where(going, next_x < next_y, across)
        reached = where(going, minimum(next_x, next_y), reached)
        inside = going & (reached < end)
        cell = where(inside, cell + where(across, step_x, step_y), cell)
        next_x, next_y = where(across, next_x + wide_x, next_x), where(across, next_y, next_y + wide_y)
        value = where(inside, fetch(cells, cell), value)
        passed = minimum(next_x, next_y)
        going = inside & ((value < WALL) | (passed < top))
    # what stopped it: the end, the side of a wall, or a wall's top that it comes down on
    value = fetch(cells, cell)
    ended = reached >= end
    face = where(ended, where(ground <= leaving, 2, 4), where(reached < top, 2, where(across, 0, 1)))
    distance = where(ended, where(ground <= leaving, ground, FAR), maximum(reached, top))
    texture = where(value >= WALL, value - WALL, value)
    square = dx * dx + dy * dy + dz * dz
    for k in range(count):
        cx = fetch(targets, first + SPHERE_NUMBERS * k) - x
        cy = fetch(targets, first + SPHERE_NUMBERS * k + 1) - y
        cz = fetch(targets, first + SPHERE_NUMBERS * k + 2) - z
        radius = fetch(targets, first + SPHERE_NUMBERS * k + 6)
        b = cx * dx + cy * dy + cz * dz
        room = b * b - square * (cx * cx + cy * cy + cz * cz - radius * radius)
        if some(room > 0.0):
            near = (b - sqrt(maximum(room, 0.0))) / square
            seen = (room > 0.0) & (near > 0.0) & (near < distance)
            distance = where(seen, near, distance)
            face = where(seen, 3, face)
            texture = where(seen, k, texture)
    return distance, face, texture


@inner
def name_of(distance, face, texture, x, y, dx, dy):
    """A number for the surface: equal in two pixels that see the same plane in the same texture."""
    plane = where(face == 0, x + distance * dx + 0.5, where(face == 1, y + distance * dy + 0.5, 0.0 * x))
    turned = where(face == 0, where(dx > 0.0, 1, 0), where(face == 1, where(dy > 0.0, 1, 0), 0))
    return ((floor(plane) * 2 + turned) * 5 + face) * WALL + texture


@inner
def texel(texels, start, level, u, v):
    """Bilinear colour of a texture at (u, v) in repetitions, which wrap round, at this level.

    Its levels lie one after another from `start` on, rows from the top. A texel is r + 2^20 g + 2^40 b, so that the
    weighted sum of four, by weights of 64ths times 64ths, is taken of all three at once: r, g and b times 4096."""
    edge = TEXELS >> level
    mask = edge - 1
    # level l begins after the sum of 4^(10 - i) for i < l
    begin = start + ((TEXELS * TEXELS - edge * edge) * 4) // 3
    s, t = floor(u * (64 * edge)) - 32, floor(v * (64 * edge)) - 32
    column, row = s >> 6, t >> 6
    s, t = s & 63, t & 63
    left, right = column & mask, (column + 1) & mask
    low, high = begin + (row & mask) * edge, begin + ((row + 1) & mask) * edge
    upper = fetch(texels, low + left) * (64 - s) + fetch(texels, low + right) * s
    lower = fetch(texels, high + left) * (64 - s) + fetch(texels, high + right) * s
    return upper * (64 - t) + lower * t


@inner
def sky(dx, dy, dz):
    """The colour of the sky, a gradient over elevation as MuJoCo builds it, cut to whole numbers on average."""
    sine = dz / sqrt(dx * dx + dy * dy + dz * dz)
    s = absolute(sine)
    # arc sine, within 5e-5: Abramowitz and Stegun, Handbook of Mathematical Functions, 4.4.45
    arc = 1.5707963 - sqrt(maximum(1.0 - s, 0.0)) * (1.5707288 + s * (-0.2121144 + s * (0.0742610 - 0.0187293 * s)))
    where_up = where(sine > 0.0, arc, -arc) / 1.5707963
    alpha = 0.5 + 0.70710678 * where_up / sqrt(1.0 + where_up * where_up)
    return (
        maximum(alpha * SKY_RED - 0.5, 0.0),
        maximum(alpha * SKY_GREEN - 0.5, 0.0),
        maximum(alpha * SKY_BLUE - 0.5, 0.0),
    )


@inner
def textured(face, texture, distance, x, y, z, dx, dy, dz, wall_height, rx, ry, ux, uy, uz, pixel, texels):
    """Colour (r, g, b), 0 to 255, of a floor, wall or wall top under full light: trilinear, as the texture's footprint
    at the pixel asks for. (rx, ry, 0), (ux, uy, uz): the camera's right and up; pixel: a pixel's width along them."""
    hx, hy, hz = x + distance * dx, y + distance * dy, z + distance * dz
    # walls run along their faces' own axis; a texture begins at its top row, a wall at its top
    u = where(face == 0, where(dx > 0.0, -hy, hy), where((face == 1) & (dy < 0.0), -hx, hx))
    v = where(face == 2, -hy, wall_height - hz)
    # how far the point on the surface moves from pixel to pixel, along rows and columns: a, b in the plane, n across
    dn = where(face == 0, dx, where(face == 1, dy, dz))
    da, db = where(face == 0, dy, dx), where(face == 2, dy, dz)
    rn, un = where(face == 0, rx, where(face == 1, ry, 0.0)), where(face == 0, ux, where(face == 1, uy, uz))
    ra, ua = where(face == 0, ry, rx), where(face == 0, uy, ux)
    rb, ub = where(face == 2, ry, 0.0), where(face == 2, uy, uz)
    across, along_ = rn / dn, un / dn
    a, b = ra - da * across, rb - db * across
    c, d = ua - da * along_, ub - db * along_
    reach = distance * pixel * TEXELS
    square = reach * reach * maximum(a * a + b * b, c * c + d * d)
    level = minimum(maximum(0.5 * log2(maximum(square, 1e-12)), 0.0), 1.0 * LAST)
    lower = floor(level)
    upper = where(lower < LAST, lower + 1, lower)
    part = level - lower
    start = texture * TEXTURE
    fine, coarse = texel(texels, start, lower, u, v), texel(texels, start, upper, u, v)
    part, rest = part / 4096.0, (1.0 - part) / 4096.0
    return (
        rest * (fine & 1048575) + part * (coarse & 1048575),
        rest * ((fine >> 20) & 1048575) + part * ((coarse >> 20) & 1048575),
        rest * (fine >> 40) + part * (coarse >> 40),
    )


@inner
def paint(cells, at, size, x, y, z, ch, sh, cp, sp, a, b, pixel, wall_height, targets, first, count, texels):
    """Shoot the ray through (a, b), in units of the camera's right and up, and say what it sees.

    The camera is at (x, y, z), heading (ch, sh) as cosine and sine, pitched down by (cp, sp) likewise. cells to count:
    as of `hit`. Returns (red, green, blue, name of the surface), colours 0 to 255."""
    fx, fy, fz = cp * ch, cp * sh, -sp
    ux, uy, uz = sp * ch, sp * sh, cp
    dx, dy, dz = fx + a * sh + b * ux, fy - a * ch + b * uy, fz + b * uz
    distance, face, texture = hit(cells, at, size, x, y, z, dx, dy, dz, wall_height, targets, first, count)
    facing = -fz + 0.0 * dx
    facing = where(face == 0, where(dx > 0.0, fx, -fx), where(face == 1, where(dy > 0.0, fy, -fy), facing))
    red, green, blue = 0.0 * dx, 0.0 * dx, 0.0 * dx
    flat = face < 3
    if some(flat):
        far = where(flat, distance, 1.0)
        ez = where((face < 2) | (dz < 0.0), dz, -1.0)
        picture = where(flat, texture, 0)
        red, green, blue = textured(
            face, picture, far, x, y, z, dx, dy, ez, wall_height, sh, -ch, ux, uy, uz, pixel, texels
        )
    if some(face == 3):
        ball = first + SPHERE_NUMBERS * where(face == 3, texture, 0)
        nx = x + distance * dx - fetch(targets, ball)
        ny = y + distance * dy - fetch(targets, ball + 1)
        nz = z + distance * dz - fetch(targets, ball + 2)
        facing = where(face == 3, -(fx * nx + fy * ny + fz * nz) / fetch(targets, ball + 6), facing)
        red = where(face == 3, fetch(targets, ball + 3), red)
        green = where(face == 3, fetch(targets, ball + 4), green)
        blue = where(face == 3, fetch(targets, ball + 5), blue)
    light = where(face == 4, 1.0, AMBIENT + DIFFUSE * maximum(facing, 0.0))
    if some(face == 4):
        r, g, o = sky(dx, dy, dz)
        red, green, blue = where(face == 4, r, red), where(face == 4, g, green), where(face == 4, o, blue)
    name = name_of(distance, face, texture, x, y, dx, dy)
    return light * red, light * green, light * blue, name
