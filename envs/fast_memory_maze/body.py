"""The rolling ball, one 5 ms substep at a time: the equations that MuJoCo solves for this body, written out.

Five degrees of freedom u = (vx, vy, vz, turn, roll): the ball's velocity, the head's turning rate about the vertical
and the ball's rolling rate about the axis left of the head, f = (cos h, sin h) being the way it looks. At most three
contacts: the floor, the wall (or wall edge) beside the ball in x, the wall beside it in y. Each has a normal, two
tangents and a torsional direction; soft elliptic friction as in MuJoCo's documentation ("Computation", constraint
model): with U the contact's rows J a - aref, friction scaled in, and K the cone U0 >= |U1..3|, accelerations minimise

    1/2 (a - a0)' M (a - a0)  +  sum over contacts of 1/2 D dist(U, K)^2

which is solved by Newton steps with a line search. Five no-slip sweeps then solve each contact's friction again
without softness, at given normal forces, and the velocity is integrated with damping taken implicitly.

Everything here is written in functions of numbers that hold for many copies at once: see dialect.py.
"""

# ruff: noqa: F821  -- where, sqrt, ... are given by the dialect
# pyright: reportUndefinedVariable=false

STEP = 0.005  # s, of a substep
GRAVITY = 9.81
RADIUS = 0.2  # m, of the ball
MASS = 22.00001  # kg: head 20, ball 1, camera 1, root 1e-5
LEVER = 0.15  # kg m: camera's mass times its distance from the steering axis
TURN_INERTIA = 1.18533229  # kg m^2, of everything about the steering axis
ROLL_INERTIA = 0.016
TURN_DAMPING = 20.0
ROLL_DAMPING = 5.0
ROLL_GEAR = 50.0  # N m at full control
TURN_GEAR = 30.0
INVERSE_WEIGHT = 0.04546760908669668  # 1/kg, of the ball's body, MuJoCo's approximation of a contact's A
STIFFNESS = 2770.0831024930748  # 1 / (solimp_max^2 solref_time^2)
DAMPING = 105.26315789473685  # 2 / (solimp_max solref_time)
TORSION = 0.02  # friction coefficient of twisting; the tangential ones are 1


@inner
def floor_contact(height, vz, fx, fy):
    """Contact of a ball at this height with the floor: (distance, normal, three rows of friction), see `along`."""
    distance = height - RADIUS
    arm = RADIUS + 0.5 * distance
    one = distance * 0.0 + 1.0
    zero = distance * 0.0
    return distance, (zero, zero, one, one, zero, zero, -arm * fx, zero, one, zero, -arm * fy, TORSION * one, zero)


@inner
def wall_contact(gap, nx, ny, fx, fy):
    """Contact with a wall whose surface is `gap` away from the ball's centre, (nx, ny) pointing away from the wall."""
    distance = gap - RADIUS
    arm = RADIUS + 0.5 * distance
    one = distance * 0.0 + 1.0
    zero = distance * 0.0
    facing = fx * nx + fy * ny
    left = fx * ny - fy * nx
    return distance, (nx, ny, zero, -ny, nx, -arm, zero, zero, zero, one, arm * facing, zero, TORSION * left)


@inner
def along(c, x, y, z, w, r):
    """Rows of a contact times (x, y, z, w, r): along its normal, its two tangents, and twisting."""
    return (
        c[0] * x + c[1] * y + c[2] * z,
        c[3] * x + c[4] * y + c[5] * w + c[6] * r,
        c[7] * x + c[8] * y + c[9] * z + c[10] * r,
        c[11] * w + c[12] * r,
    )


@inner
def push(c, g0, g1, g2, g3):
    """The transpose of `along`: what forces along a contact's rows do to the five degrees of freedom."""
    return (
        c[0] * g0 + c[3] * g1 + c[7] * g2,
        c[1] * g0 + c[4] * g1 + c[8] * g2,
        c[2] * g0 + c[9] * g2,
        c[5] * g1 + c[11] * g3,
        c[6] * g1 + c[10] * g2 + c[12] * g3,
    )


@inner
def solve(sx, sy, turn_inertia, roll_inertia, x, y, z, w, r):
    """The inverse of the mass matrix, whose x-turn and y-turn entries are sx and sy, times (x, y, z, w, r)."""
    w = (w - (sx * x + sy * y) / MASS) / (turn_inertia - LEVER * LEVER / MASS)
    return (x - sx * w) / MASS, (y - sy * w) / MASS, z / MASS, w, r / roll_inertia


@inner
def impedance(distance):
    depth = minimum(-distance / 0.001, 1.0)
    rest = 1.0 - depth
    return 0.9 + 0.05 * where(depth < 0.5, 2.0 * depth * depth, 1.0 - 2.0 * rest * rest)


@inner
def softness(distance):
    """D = 1 / R of a contact; 0 where there is none."""
    imp = impedance(distance)
    return where(distance < 0.0, imp / ((1.0 - imp) * INVERSE_WEIGHT), 0.0)


@inner
def reference(c, distance, x, y, z, w, r):
    """aref of a contact at these velocities."""
    a, b, e, d = along(c, x, y, z, w, r)
    a = -DAMPING * a - STIFFNESS * impedance(distance) * distance
    return a, -DAMPING * b, -DAMPING * e, -DAMPING * d


@inner
def force(soft, u0, u1, u2, u3):
    """-D (U - P(U)), P the projection onto the cone: a contact's forces, friction scaled in."""
    slip = sqrt(u1 * u1 + u2 * u2 + u3 * u3)
    open_ = u0 >= slip
    stuck = u0 + slip <= 0.0
    half = 0.5 * soft * (u0 - slip)
    normal = where(open_, 0.0, where(stuck, -soft * u0, -half))
    friction = where(open_, 0.0, where(stuck, -soft, half / maximum(slip, 1e-30)))
    return normal, friction * u1, friction * u2, friction * u3


@inner
def curvature(c, soft, u0, u1, u2, u3):
    """Second derivative of a contact's cost: k0 r0 r0' + ks (r1 r1' + r2 r2' + r3 r3') + kq q q' + ke e e'.

    Returns (k0, ks, kq, ke) and the vectors q, e of five."""
    slip = sqrt(u1 * u1 + u2 * u2 + u3 * u3)
    open_ = u0 >= slip
    stuck = u0 + slip <= 0.0
    scale = 1.0 / maximum(slip, 1e-30)
    bend = 0.5 * soft * (slip - u0) * scale
    k0 = where(stuck, soft, 0.0)
    ks = where(open_, 0.0, where(stuck, soft, bend))
    kq = where(open_, 0.0, where(stuck, 0.0, 0.5 * soft))
    ke = where(open_, 0.0, where(stuck, 0.0, -bend))
    e = push(c, 0.0, u1 * scale, u2 * scale, u3 * scale)
    return (k0, ks, kq, ke), (c[0] - e[0], c[1] - e[1], c[2] - e[2], -e[3], -e[4]), e


@inner
def add_outer(h, k, p):
    """Lower triangle h, row by row, plus k p p'."""
    a, b, c, d, e = k * p[0], k * p[1], k * p[2], k * p[3], k * p[4]
    return (
        h[0] + a * p[0],
        h[1] + b * p[0],
        h[2] + b * p[1],
        h[3] + c * p[0],
        h[4] + c * p[1],
        h[5] + c * p[2],
        h[6] + d * p[0],
        h[7] + d * p[1],
        h[8] + d * p[2],
        h[9] + d * p[3],
        h[10] + e * p[0],
        h[11] + e * p[1],
        h[12] + e * p[2],
        h[13] + e * p[3],
        h[14] + e * p[4],
    )


@inner
def add_curvature(h, c, soft, u0, u1, u2, u3):
    k, q, e = curvature(c, soft, u0, u1, u2, u3)
    h = add_outer(h, k[0], push(c, 1.0, 0.0, 0.0, 0.0))
    h = add_outer(h, k[1], push(c, 0.0, 1.0, 0.0, 0.0))
    h = add_outer(h, k[1], push(c, 0.0, 0.0, 1.0, 0.0))
    h = add_outer(h, k[1], push(c, 0.0, 0.0, 0.0, 1.0))
    h = add_outer(h, k[2], q)
    return add_outer(h, k[3], e)


@inner
def cholesky_solve(h, b0, b1, b2, b3, b4):
    """H^-1 b for a positive definite H given by its lower triangle, row by row."""
    i0 = 1.0 / h[0]
    l10, l20, l30, l40 = h[1] * i0, h[3] * i0, h[6] * i0, h[10] * i0
    d1 = h[2] - l10 * h[1]
    i1 = 1.0 / d1
    m21, m31, m41 = h[4] - l20 * h[1], h[7] - l30 * h[1], h[11] - l40 * h[1]
    l21, l31, l41 = m21 * i1, m31 * i1, m41 * i1
    d2 = h[5] - l20 * h[3] - l21 * m21
    i2 = 1.0 / d2
    m32, m42 = h[8] - l30 * h[3] - l31 * m21, h[12] - l40 * h[3] - l41 * m21
    l32, l42 = m32 * i2, m42 * i2
    d3 = h[9] - l30 * h[6] - l31 * m31 - l32 * m32
    i3 = 1.0 / d3
    m43 = h[13] - l40 * h[6] - l41 * m31 - l42 * m32
    l43 = m43 * i3
    d4 = h[14] - l40 * h[10] - l41 * m41 - l42 * m42 - l43 * m43
    b1 = b1 - l10 * b0
    b2 = b2 - l20 * b0 - l21 * b1
    b3 = b3 - l30 * b0 - l31 * b1 - l32 * b2
    b4 = (b4 - l40 * b0 - l41 * b1 - l42 * b2 - l43 * b3) / d4
    b3 = b3 * i3 - l43 * b4
    b2 = b2 * i2 - l32 * b3 - l42 * b4
    b1 = b1 * i1 - l21 * b2 - l31 * b3 - l41 * b4
    b0 = b0 * i0 - l10 * b1 - l20 * b2 - l30 * b3 - l40 * b4
    return b0, b1, b2, b3, b4


@inner
def rub(c, sx, sy, normal, g1, g2, g3, want, x, y, z, w, r):
    """Friction of one contact without softness, at a given normal force: the forces that leave least slip.

    g1..g3 are the contact's friction forces so far, (x..r) accelerations under all forces so far, `want` aref.
    Returns the new forces and accelerations. Outside the cone its boundary's multiplier is found by Newton's method."""
    p = push(c, 0.0, 1.0, 0.0, 0.0)
    q = push(c, 0.0, 0.0, 1.0, 0.0)
    s = push(c, 0.0, 0.0, 0.0, 1.0)
    p = solve(sx, sy, TURN_INERTIA, ROLL_INERTIA, p[0], p[1], p[2], p[3], p[4])
    q = solve(sx, sy, TURN_INERTIA, ROLL_INERTIA, q[0], q[1], q[2], q[3], q[4])
    s = solve(sx, sy, TURN_INERTIA, ROLL_INERTIA, s[0], s[1], s[2], s[3], s[4])
    _, a11, a12, a13 = along(c, p[0], p[1], p[2], p[3], p[4])
    _, _, a22, a23 = along(c, q[0], q[1], q[2], q[3], q[4])
    _, _, _, a33 = along(c, s[0], s[1], s[2], s[3], s[4])
    _, b1, b2, b3 = along(c, x, y, z, w, r)
    b1 = b1 - want[1] - a11 * g1 - a12 * g2 - a13 * g3
    b2 = b2 - want[2] - a12 * g1 - a22 * g2 - a23 * g3
    b3 = b3 - want[3] - a13 * g1 - a23 * g2 - a33 * g3
    multiplier = normal * 0.0
    f1, f2, f3, square, slope = on_cone(a11, a12, a13, a22, a23, a33, b1, b2, b3, multiplier)
    limit = normal * normal
    tries = 0
    going = square - limit > 1e-10
    while some(going) & (tries < 20):
        multiplier = where(going, multiplier + (square - limit) / maximum(slope, 1e-30), multiplier)
        f1, f2, f3, square, slope = on_cone(a11, a12, a13, a22, a23, a33, b1, b2, b3, multiplier)
        going = square - limit > 1e-10
        tries += 1
    touching = normal > 1e-10
    f1, f2, f3 = where(touching, f1, 0.0), where(touching, f2, 0.0), where(touching, f3, 0.0)
    d1, d2, d3 = f1 - g1, f2 - g2, f3 - g3
    x = x + d1 * p[0] + d2 * q[0] + d3 * s[0]
    y = y + d1 * p[1] + d2 * q[1] + d3 * s[1]
    z = z + d1 * p[2] + d2 * q[2] + d3 * s[2]
    w = w + d1 * p[3] + d2 * q[3] + d3 * s[3]
    r = r + d1 * p[4] + d2 * q[4] + d3 * s[4]
    return f1, f2, f3, x, y, z, w, r


@inner
def on_cone(a11, a12, a13, a22, a23, a33, b1, b2, b3, multiplier):
    """f = -(A + multiplier)^-1 b, its square, and twice how fast that falls with the multiplier: f'(A + ..)^-1 f.

    Torsional entries of A may vanish (no arm): a little is added to the diagonal then."""
    a11, a22, a33 = a11 + multiplier + 1e-15, a22 + multiplier + 1e-15, a33 + multiplier + 1e-15
    c11, c12, c13 = a22 * a33 - a23 * a23, a13 * a23 - a12 * a33, a12 * a23 - a13 * a22
    c22, c23, c33 = a11 * a33 - a13 * a13, a12 * a13 - a11 * a23, a11 * a22 - a12 * a12
    scale = 1.0 / (a11 * c11 + a12 * c12 + a13 * c13)
    f1 = -scale * (c11 * b1 + c12 * b2 + c13 * b3)
    f2 = -scale * (c12 * b1 + c22 * b2 + c23 * b3)
    f3 = -scale * (c13 * b1 + c23 * b2 + c33 * b3)
    slope = c11 * f1 * f1 + c22 * f2 * f2 + c33 * f3 * f3
    slope = 2.0 * scale * (slope + 2.0 * (c12 * f1 * f2 + c13 * f1 * f3 + c23 * f2 * f3))
    return f1, f2, f3, f1 * f1 + f2 * f2 + f3 * f3, slope


@inner
def substep(x, y, z, h, vx, vy, vz, w, r, turn, roll, gap_a, ax, ay, gap_b, bx, by):
    """Five milliseconds. x, y, z: the ball's centre in m; h: heading; (vx, vy, vz, w, r): velocities as above.

    turn, roll: torques of the motors. gap_a, (ax, ay): distance of the ball's centre to a wall and the direction away
    from it; gap_b, (bx, by): to a second one. Gaps beyond the ball's radius count as none."""
    fx, fy = cos(h), sin(h)
    sx, sy = -LEVER * fy, LEVER * fx
    dist_0, c0 = floor_contact(z, vz, fx, fy)
    dist_1, c1 = wall_contact(gap_a, ax, ay, fx, fy)
    dist_2, c2 = wall_contact(gap_b, bx, by, fx, fy)
    soft_0, soft_1, soft_2 = softness(dist_0), softness(dist_1), softness(dist_2)
    want_0 = reference(c0, dist_0, vx, vy, vz, w, r)
    want_1 = reference(c1, dist_1, vx, vy, vz, w, r)
    want_2 = reference(c2, dist_2, vx, vy, vz, w, r)
    # forces but for contacts, and the accelerations they alone would cause
    qx, qy, qz = LEVER * w * w * fx, LEVER * w * w * fy, -MASS * GRAVITY
    qw, qr = turn - TURN_DAMPING * w, roll - ROLL_DAMPING * r
    nx, ny, nz, nw, nr = solve(sx, sy, TURN_INERTIA, ROLL_INERTIA, qx, qy, qz, qw, qr)

    # Newton's method for the accelerations (a, b, e, d, g), from the free ones
    a, b, e, d, g = nx, ny, nz + 0.0 * x, nw, nr
    decrement = 1.0 + 0.0 * x
    walled = some((dist_1 < 0.0) | (dist_2 < 0.0))
    o = 0.0 * x
    tries = 0
    while some(decrement > 1e-14) & (tries < 30):
        u0, u1, u2, u3 = along(c0, a, b, e, d, g)
        u0, u1, u2, u3 = u0 - want_0[0], u1 - want_0[1], u2 - want_0[2], u3 - want_0[3]
        f0, f1, f2, f3 = force(soft_0, u0, u1, u2, u3)
        px, py, pz, pw, pr = push(c0, f0, f1, f2, f3)
        # minus the gradient
        dx, dy, dz, dw, dr = a - nx, b - ny, e - nz, d - nw, g - nr
        gx, gy, gz = px - MASS * dx - sx * dw, py - MASS * dy - sy * dw, pz - MASS * dz
        gw, gr = pw - sx * dx - sy * dy - TURN_INERTIA * dw, pr - ROLL_INERTIA * dr
        hessian = (MASS + o, o, MASS + o, o, o, MASS + o, sx, sy, o, TURN_INERTIA + o, o, o, o, o, ROLL_INERTIA + o)
        hessian = add_curvature(hessian, c0, soft_0, u0, u1, u2, u3)
        v0, v1, v2, v3, t0, t1, t2, t3 = o, o, o, o, o, o, o, o
        if walled:
            v0, v1, v2, v3 = along(c1, a, b, e, d, g)
            v0, v1, v2, v3 = v0 - want_1[0], v1 - want_1[1], v2 - want_1[2], v3 - want_1[3]
            t0, t1, t2, t3 = along(c2, a, b, e, d, g)
            t0, t1, t2, t3 = t0 - want_2[0], t1 - want_2[1], t2 - want_2[2], t3 - want_2[3]
            f0, f1, f2, f3 = force(soft_1, v0, v1, v2, v3)
            px, py, pz, pw, pr = push(c1, f0, f1, f2, f3)
            gx, gy, gz, gw, gr = gx + px, gy + py, gz + pz, gw + pw, gr + pr
            f0, f1, f2, f3 = force(soft_2, t0, t1, t2, t3)
            px, py, pz, pw, pr = push(c2, f0, f1, f2, f3)
            gx, gy, gz, gw, gr = gx + px, gy + py, gz + pz, gw + pw, gr + pr
            hessian = add_curvature(hessian, c1, soft_1, v0, v1, v2, v3)
            hessian = add_curvature(hessian, c2, soft_2, t0, t1, t2, t3)
        kx, ky, kz, kw, kr = cholesky_solve(hessian, gx, gy, gz, gw, gr)
        decrement = gx * kx + gy * ky + gz * kz + gw * kw + gr * kr
        # how far along k: where the derivative of the cost is zero, by safeguarded secants between low and high
        r0, r1, r2, r3 = along(c0, kx, ky, kz, kw, kr)
        s0, s1, s2, s3 = along(c1, kx, ky, kz, kw, kr)
        q0, q1, q2, q3 = along(c2, kx, ky, kz, kw, kr)
        mass_k = MASS * (kx * kx + ky * ky + kz * kz) + 2.0 * kw * (sx * kx + sy * ky)
        mass_k = mass_k + TURN_INERTIA * kw * kw + ROLL_INERTIA * kr * kr
        mass_d = MASS * (kx * dx + ky * dy + kz * dz) + kw * (sx * dx + sy * dy) + dw * (sx * kx + sy * ky)
        mass_d = mass_d + TURN_INERTIA * kw * dw + ROLL_INERTIA * kr * dr
        low, low_slope = 0.0 * x, -decrement
        high, high_slope = 1.0 + 0.0 * x, 0.0 * x
        step = 1.0 + 0.0 * x
        probes = 0
        looking = decrement > 1e-14
        while some(looking) & (probes < 10):
            f0, f1, f2, f3 = force(soft_0, u0 + step * r0, u1 + step * r1, u2 + step * r2, u3 + step * r3)
            slope = mass_d + step * mass_k - f0 * r0 - f1 * r1 - f2 * r2 - f3 * r3
            if walled:
                f0, f1, f2, f3 = force(soft_1, v0 + step * s0, v1 + step * s1, v2 + step * s2, v3 + step * s3)
                slope = slope - f0 * s0 - f1 * s1 - f2 * s2 - f3 * s3
                f0, f1, f2, f3 = force(soft_2, t0 + step * q0, t1 + step * q1, t2 + step * q2, t3 + step * q3)
                slope = slope - f0 * q0 - f1 * q1 - f2 * q2 - f3 * q3
            short = slope < 0.0
            # a full Newton step that still descends is taken as it is
            looking = looking & (absolute(slope) > 0.05 * decrement) & ((probes > 0) | (slope > 0.0))
            low, low_slope = where(looking & short, step, low), where(looking & short, slope, low_slope)
            high, high_slope = where(looking & short, high, step), where(looking & short, high_slope, slope)
            secant = low - low_slope * (high - low) / maximum(high_slope - low_slope, 1e-30)
            middle = 0.5 * (low + high)
            secant = where(probes % 3 == 2, middle, secant)
            step = where(looking, secant, step)
            probes += 1
        step = where(decrement > 1e-14, step, 0.0)
        a, b, e, d, g = a + step * kx, b + step * ky, e + step * kz, d + step * kw, g + step * kr
        tries += 1

    u0, u1, u2, u3 = along(c0, a, b, e, d, g)
    n0, f01, f02, f03 = force(soft_0, u0 - want_0[0], u1 - want_0[1], u2 - want_0[2], u3 - want_0[3])
    u0, u1, u2, u3 = along(c1, a, b, e, d, g)
    n1, f11, f12, f13 = force(soft_1, u0 - want_1[0], u1 - want_1[1], u2 - want_1[2], u3 - want_1[3])
    u0, u1, u2, u3 = along(c2, a, b, e, d, g)
    n2, f21, f22, f23 = force(soft_2, u0 - want_2[0], u1 - want_2[1], u2 - want_2[2], u3 - want_2[3])
    sweeps = 0
    while sweeps < 5:
        f01, f02, f03, a, b, e, d, g = rub(c0, sx, sy, n0, f01, f02, f03, want_0, a, b, e, d, g)
        if walled:
            f11, f12, f13, a, b, e, d, g = rub(c1, sx, sy, n1, f11, f12, f13, want_1, a, b, e, d, g)
            f21, f22, f23, a, b, e, d, g = rub(c2, sx, sy, n2, f21, f22, f23, want_2, a, b, e, d, g)
            sweeps += 1
        else:
            sweeps += 5  # one contact is solved by one sweep

    # from accelerations back to forces, then Euler's step with damping taken implicitly
    qx, qy, qz = MASS * a + sx * d, MASS * b + sy * d, MASS * e
    qw, qr = sx * a + sy * b + TURN_INERTIA * d, ROLL_INERTIA * g
    a, b, e, d, g = solve(
        sx, sy, TURN_INERTIA + STEP * TURN_DAMPING, ROLL_INERTIA + STEP * ROLL_DAMPING, qx, qy, qz, qw, qr
    )
    vx, vy, vz, w, r = vx + STEP * a, vy + STEP * b, vz + STEP * e, w + STEP * d, r + STEP * g
    return x + STEP * vx, y + STEP * vy, z + STEP * vz, h + STEP * w, vx, vy, vz, w, r
