"""Renderer of the fast Memory Maze: the surface that a camera ray hits, and its colour, as in MuJoCo's renderer.

Lengths are in cells (2 m). x and y are measured from the grid's bottom left corner, z from the floor. A grid cell holds
the index of its texture, plus WALL if it is a wall.

The only light is the headlight. It shines along the camera's view and does not fall off with distance, so a flat face
has one brightness. There are no shadows and no specular light. Every floor cell and every wall face carries its texture
exactly once, as in the original. A wall shows the upper part of its texture, cut off at the wall's height.

The functions take scalars or blocks of many pixels: see dialect.py.
"""

# ruff: noqa: F821  -- where, sqrt, ... are the primitives that dialect.py defines
# pyright: reportUndefinedVariable=false

from longdream.envs.fast_memory_maze.scene import SPHERE_NUMBERS, WALL

AMBIENT = 0.3  # of the headlight
DIFFUSE = 0.6  # of the headlight
TEXELS = 1024  # along a texture's side, at mipmap level 0
LAST = 10  # the mipmap level that has a single texel
TEXTURE = (4 * TEXELS * TEXELS - 1) // 3  # number of texels of a texture, over all levels
SKY_RED = 102.0
SKY_GREEN = 153.0
SKY_BLUE = 204.0
FAR = 1e9  # cells, beyond any surface


@inner
def hit(cells, offset, size, x, y, z, dx, dy, dz, wall_height, targets, first, count):
    """Follow a ray from (x, y, z) in the direction (dx, dy, dz) to the first surface.

    cells holds grids of `size` by `size` cells; the ray's grid begins at cells[offset]. targets holds spheres in the
    format of scene.SPHERE_NUMBERS; the ray's `count` spheres begin at targets[first].

    Returns (distance in units of the direction's length, face, texture). Faces 0 and 1 are walls perpendicular to x and
    y, 2 is horizontal (the floor, or the top of a wall), 3 is a sphere (its index is returned as the texture), and 4 is
    the sky."""
    column = floor(x)
    row = floor(y)
    cell = offset + row * size + column
    safe_dx = where(absolute(dx) < 1e-9, 1e-9, dx)
    safe_dy = where(absolute(dy) < 1e-9, 1e-9, dy)
    right = where(safe_dx > 0.0, 1, 0)
    up = where(safe_dy > 0.0, 1, 0)
    per_x = 1.0 / safe_dx
    per_y = 1.0 / safe_dy
    next_x = (column + right - x) * per_x
    next_y = (row + up - y) * per_y
    # slightly too short, so that rounding errors never let a ray leave the grid
    exit_distance = 0.9999 * minimum((size * right - x) * per_x, (size * up - y) * per_y)
    cell_x = absolute(per_x)
    cell_y = absolute(per_y)
    step_x = 2 * right - 1
    step_y = (2 * up - 1) * size
    # the ray ends at the floor, at the grid's border, or where it rises above the walls
    per_z = 1.0 / where(absolute(dz) < 1e-9, 1e-9, dz)
    top = (wall_height - z) * per_z
    floor_distance = where(dz < 0.0, -z * per_z, FAR)
    end = minimum(exit_distance, where(dz < 0.0, floor_distance, maximum(top, 0.0)))
    top = where(dz < 0.0, top, 0.0)
    reached = 0.0 * dx
    passed = 0.0 * dx
    value = where(dx > FAR, 1, 0)
    across = dx > FAR
    moving = dx < FAR
    while any_lane(moving):
        across = where(moving, next_x < next_y, across)
        reached = where(moving, minimum(next_x, next_y), reached)
        inside = moving & (reached < end)
        cell = where(inside, cell + where(across, step_x, step_y), cell)
        next_x = where(across, next_x + cell_x, next_x)
        next_y = where(across, next_y, next_y + cell_y)
        value = where(inside, fetch(cells, cell), value)
        passed = minimum(next_x, next_y)
        moving = inside & ((value < WALL) | (passed < top))
    # what the ray hit: its end, the side of a wall, or the top of a wall from above
    value = fetch(cells, cell)
    at_end = reached >= end
    face = where(at_end, where(floor_distance <= exit_distance, 2, 4), where(reached < top, 2, where(across, 0, 1)))
    distance = where(at_end, where(floor_distance <= exit_distance, floor_distance, FAR), maximum(reached, top))
    texture = where(value >= WALL, value - WALL, value)
    norm_square = dx * dx + dy * dy + dz * dz
    for k in range(count):
        cx = fetch(targets, first + SPHERE_NUMBERS * k) - x
        cy = fetch(targets, first + SPHERE_NUMBERS * k + 1) - y
        cz = fetch(targets, first + SPHERE_NUMBERS * k + 2) - z
        radius = fetch(targets, first + SPHERE_NUMBERS * k + 6)
        b = cx * dx + cy * dy + cz * dz
        discriminant = b * b - norm_square * (cx * cx + cy * cy + cz * cz - radius * radius)
        if any_lane(discriminant > 0.0):
            near = (b - sqrt(maximum(discriminant, 0.0))) / norm_square
            nearer = (discriminant > 0.0) & (near > 0.0) & (near < distance)
            distance = where(nearer, near, distance)
            face = where(nearer, 3, face)
            texture = where(nearer, k, texture)
    return distance, face, texture


@inner
def surface_id(distance, face, texture, x, y, dx, dy):
    """An integer that identifies the surface: equal for two pixels that see the same plane with the same texture."""
    plane = where(face == 0, x + distance * dx + 0.5, where(face == 1, y + distance * dy + 0.5, 0.0 * x))
    facing = where(face == 0, where(dx > 0.0, 1, 0), where(face == 1, where(dy > 0.0, 1, 0), 0))
    return ((floor(plane) * 2 + facing) * 5 + face) * WALL + texture


@inner
def texel(texels, start, level, u, v):
    """Bilinear interpolation of a texture at this mipmap level. (u, v) is in texture widths and wraps around.

    The levels lie one after another from texels[start] on, each with its rows from the top. A texel is r + 2^20 g +
    2^40 b, so that one weighted sum of four texels interpolates all three colours. The weights are multiples of
    1/4096; the result is in the same format, times 4096."""
    edge = TEXELS >> level
    mask = edge - 1
    # level l begins after sum over i < l of 4^(10 - i) texels
    begin = start + ((TEXELS * TEXELS - edge * edge) * 4) // 3
    s, t = floor(u * (64 * edge)) - 32, floor(v * (64 * edge)) - 32
    column = s >> 6
    row = t >> 6
    s = s & 63
    t = t & 63
    left = column & mask
    right = (column + 1) & mask
    low = begin + (row & mask) * edge
    high = begin + ((row + 1) & mask) * edge
    upper = fetch(texels, low + left) * (64 - s) + fetch(texels, low + right) * s
    lower = fetch(texels, high + left) * (64 - s) + fetch(texels, high + right) * s
    return upper * (64 - t) + lower * t


@inner
def sky(dx, dy, dz):
    """Colour of the sky: MuJoCo's gradient over the elevation. Subtracting 0.5 is the mean effect of its truncation."""
    sine = dz / sqrt(dx * dx + dy * dy + dz * dz)
    s = absolute(sine)
    # arc sine, with an error below 5e-5: Abramowitz and Stegun, Handbook of Mathematical Functions, 4.4.45
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
    """Colour (r, g, b), 0 to 255, of a floor, wall or wall top under full light, by trilinear interpolation.

    The mipmap level follows from the pixel's footprint on the texture. (rx, ry, 0) and (ux, uy, uz) are the camera's
    right and up, and `pixel` is a pixel's width in these units."""
    hx = x + distance * dx
    hy = y + distance * dy
    hz = z + distance * dz
    # u runs horizontally along a wall's face; v runs downwards from the top of the texture and of the wall
    u = where(face == 0, where(dx > 0.0, -hy, hy), where((face == 1) & (dy < 0.0), -hx, hx))
    v = where(face == 2, -hy, wall_height - hz)
    # how far the point on the surface moves from one pixel to the next: a and b are axes in the plane, n is its normal
    dn = where(face == 0, dx, where(face == 1, dy, dz))
    da = where(face == 0, dy, dx)
    db = where(face == 2, dy, dz)
    rn = where(face == 0, rx, where(face == 1, ry, 0.0))
    un = where(face == 0, ux, where(face == 1, uy, uz))
    ra = where(face == 0, ry, rx)
    ua = where(face == 0, uy, ux)
    rb = where(face == 2, ry, 0.0)
    ub = where(face == 2, uy, uz)
    normal_right = rn / dn
    normal_up = un / dn
    a = ra - da * normal_right
    b = rb - db * normal_right
    c = ua - da * normal_up
    d = ub - db * normal_up
    footprint = distance * pixel * TEXELS
    square = footprint * footprint * maximum(a * a + b * b, c * c + d * d)
    level = minimum(maximum(0.5 * log2(maximum(square, 1e-12)), 0.0), 1.0 * LAST)
    lower = floor(level)
    upper = where(lower < LAST, lower + 1, lower)
    part = level - lower
    start = texture * TEXTURE
    fine = texel(texels, start, lower, u, v)
    coarse = texel(texels, start, upper, u, v)
    rest = (1.0 - part) / 4096.0
    part = part / 4096.0
    return (
        rest * (fine & 1048575) + part * (coarse & 1048575),
        rest * ((fine >> 20) & 1048575) + part * ((coarse >> 20) & 1048575),
        rest * (fine >> 40) + part * (coarse >> 40),
    )


@inner
def paint(cells, offset, size, x, y, z, ch, sh, cp, sp, a, b, pixel, wall_height, targets, first, count, texels):
    """Cast the camera's ray through the point (a, b) of the image plane, in units of the camera's right and up.

    The camera is at (x, y, z). (ch, sh) are cosine and sine of its heading, (cp, sp) those of its downward pitch. The
    arguments from cells to count are those of `hit`. Returns (red, green, blue, surface id), colours from 0 to 255."""
    fx, fy, fz = cp * ch, cp * sh, -sp
    ux, uy, uz = sp * ch, sp * sh, cp
    dx, dy, dz = fx + a * sh + b * ux, fy - a * ch + b * uy, fz + b * uz
    distance, face, texture = hit(cells, offset, size, x, y, z, dx, dy, dz, wall_height, targets, first, count)
    facing = -fz + 0.0 * dx
    facing = where(face == 0, where(dx > 0.0, fx, -fx), where(face == 1, where(dy > 0.0, fy, -fy), facing))
    red = 0.0 * dx
    green = 0.0 * dx
    blue = 0.0 * dx
    flat = face < 3
    if any_lane(flat):
        far = where(flat, distance, 1.0)
        ez = where((face < 2) | (dz < 0.0), dz, -1.0)
        flat_texture = where(flat, texture, 0)
        red, green, blue = textured(
            face, flat_texture, far, x, y, z, dx, dy, ez, wall_height, sh, -ch, ux, uy, uz, pixel, texels
        )
    if any_lane(face == 3):
        ball = first + SPHERE_NUMBERS * where(face == 3, texture, 0)
        nx = x + distance * dx - fetch(targets, ball)
        ny = y + distance * dy - fetch(targets, ball + 1)
        nz = z + distance * dz - fetch(targets, ball + 2)
        facing = where(face == 3, -(fx * nx + fy * ny + fz * nz) / fetch(targets, ball + 6), facing)
        red = where(face == 3, fetch(targets, ball + 3), red)
        green = where(face == 3, fetch(targets, ball + 4), green)
        blue = where(face == 3, fetch(targets, ball + 5), blue)
    light = where(face == 4, 1.0, AMBIENT + DIFFUSE * maximum(facing, 0.0))
    if any_lane(face == 4):
        sky_red, sky_green, sky_blue = sky(dx, dy, dz)
        red = where(face == 4, sky_red, red)
        green = where(face == 4, sky_green, green)
        blue = where(face == 4, sky_blue, blue)
    surface = surface_id(distance, face, texture, x, y, dx, dy)
    return light * red, light * green, light * blue, surface
