"""Physics of the rolling ball: one substep of 5 ms, by the equations that MuJoCo solves for this body.

The body has five degrees of freedom. Their velocities are (vx, vy, vz, w, r): the ball's linear velocity, the head's
angular velocity about the vertical, and the ball's angular velocity about the axis to the left of the head. The head
looks along f = (cos h, sin h), where h is the heading.

There are at most three contacts: the floor, the wall (or wall edge) beside the ball in x, and the wall beside it in y.
A contact has a normal, two tangents and a torsional direction. Friction is soft and elliptic, as in the constraint
model of MuJoCo's documentation (chapter "Computation"). Let J be a contact's Jacobian with its rows scaled by the
friction coefficients, aref its reference acceleration, U = J a - aref, and K the cone U0 >= |U1..3|. The accelerations
a minimise

    1/2 (a - a0)' M (a - a0)  +  sum over contacts of 1/2 D dist(U, K)^2

where M is the mass matrix and a0 the acceleration without contacts. Newton's method with a line search solves this.
Five sweeps of MuJoCo's no-slip solver then solve each contact's friction again without softness, at fixed normal
forces. The velocity is integrated by Euler's method with implicit damping.

The functions take scalars or blocks of many copies: see dialect.py.
"""

# ruff: noqa: F821  -- where, sqrt, ... are the primitives that dialect.py defines
# pyright: reportUndefinedVariable=false

STEP = 0.005  # s, of a substep
GRAVITY = 9.81  # m/s^2
RADIUS = 0.2  # m, of the ball
MASS = 22.00001  # kg: head 20, ball 1, camera 1, root 1e-5
LEVER = 0.15  # kg m: mass of the camera times its distance from the steering axis
TURN_INERTIA = 1.18533229  # kg m^2, of the whole body about the steering axis
ROLL_INERTIA = 0.016  # kg m^2
TURN_DAMPING = 20.0  # N m s
ROLL_DAMPING = 5.0  # N m s
ROLL_GEAR = 50.0  # N m at full control
TURN_GEAR = 30.0  # N m at full control
INVERSE_WEIGHT = (
    0.04546760908669668  # 1/kg, MuJoCo's body_invweight0 of the ball: approximates the diagonal of J M^-1 J'
)
STIFFNESS = 2770.0831024930748  # 1/s^2: 1 / (solimp_max^2 solref_time^2)
DAMPING = 105.26315789473685  # 1/s: 2 / (solimp_max solref_time)
TORSION = 0.02  # torsional friction coefficient; the tangential coefficients are 1


@inner
def floor_contact(height, fx, fy):
    """Contact with the floor of a ball whose centre is at this height: (distance, Jacobian).

    The distance is negative in contact. `jacobian_times` says which entries of the Jacobian are kept."""
    distance = height - RADIUS
    arm = RADIUS + 0.5 * distance
    one = distance * 0.0 + 1.0
    zero = distance * 0.0
    return distance, (zero, zero, one, one, zero, zero, -arm * fx, zero, one, zero, -arm * fy, TORSION * one, zero)


@inner
def wall_contact(gap, nx, ny, fx, fy):
    """Contact with a wall whose surface is `gap` away from the ball's centre: (distance, Jacobian).

    (nx, ny) is the wall's normal, which points to the ball."""
    distance = gap - RADIUS
    arm = RADIUS + 0.5 * distance
    one = distance * 0.0 + 1.0
    zero = distance * 0.0
    facing = fx * nx + fy * ny
    left = fx * ny - fy * nx
    return distance, (nx, ny, zero, -ny, nx, -arm, zero, zero, zero, one, arm * facing, zero, TORSION * left)


@inner
def jacobian_times(c, x, y, z, w, r):
    """J times a vector of the five degrees of freedom: (normal, first tangent, second tangent, torsion).

    c holds the 13 entries of J that are not always zero, row by row."""
    return (
        c[0] * x + c[1] * y + c[2] * z,
        c[3] * x + c[4] * y + c[5] * w + c[6] * r,
        c[7] * x + c[8] * y + c[9] * z + c[10] * r,
        c[11] * w + c[12] * r,
    )


@inner
def jacobian_transpose_times(c, g0, g1, g2, g3):
    """J' times contact forces: the generalized forces on the five degrees of freedom."""
    return (
        c[0] * g0 + c[3] * g1 + c[7] * g2,
        c[1] * g0 + c[4] * g1 + c[8] * g2,
        c[2] * g0 + c[9] * g2,
        c[5] * g1 + c[11] * g3,
        c[6] * g1 + c[10] * g2 + c[12] * g3,
    )


@inner
def inverse_mass_times(sx, sy, turn_inertia, roll_inertia, x, y, z, w, r):
    """M^-1 times (x, y, z, w, r). sx and sy are the entries of M that couple turning with x and y."""
    w = (w - (sx * x + sy * y) / MASS) / (turn_inertia - LEVER * LEVER / MASS)
    return (x - sx * w) / MASS, (y - sy * w) / MASS, z / MASS, w, r / roll_inertia


@inner
def impedance(distance):
    """MuJoCo's solimp: from 0.9 at the surface to 0.95 at a depth of 1 mm, by a quadratic spline."""
    depth = minimum(-distance / 0.001, 1.0)
    rest = 1.0 - depth
    return 0.9 + 0.05 * where(depth < 0.5, 2.0 * depth * depth, 1.0 - 2.0 * rest * rest)


@inner
def contact_weight(distance):
    """D = 1 / R, the weight of a contact in the cost; 0 where nothing touches."""
    imp = impedance(distance)
    return where(distance < 0.0, imp / ((1.0 - imp) * INVERSE_WEIGHT), 0.0)


@inner
def reference_acceleration(c, distance, x, y, z, w, r):
    """aref of a contact, from the velocities (x, y, z, w, r)."""
    a, b, e, d = jacobian_times(c, x, y, z, w, r)
    a = -DAMPING * a - STIFFNESS * impedance(distance) * distance
    return a, -DAMPING * b, -DAMPING * e, -DAMPING * d


@inner
def residual(c, aref, x, y, z, w, r):
    """U = J a - aref of a contact, at the accelerations a = (x, y, z, w, r)."""
    a, b, e, d = jacobian_times(c, x, y, z, w, r)
    return a - aref[0], b - aref[1], e - aref[2], d - aref[3]


@inner
def contact_force(weight, u0, u1, u2, u3):
    """A contact's forces -D (U - P(U)), where P projects onto the cone K."""
    slip = sqrt(u1 * u1 + u2 * u2 + u3 * u3)
    open_ = u0 >= slip
    stuck = u0 + slip <= 0.0
    half = 0.5 * weight * (u0 - slip)
    normal = where(open_, 0.0, where(stuck, -weight * u0, -half))
    friction = where(open_, 0.0, where(stuck, -weight, half / maximum(slip, 1e-30)))
    return normal, friction * u1, friction * u2, friction * u3


@inner
def curvature(c, weight, u0, u1, u2, u3):
    """Hessian of a contact's cost: k0 r0 r0' + ks (r1 r1' + r2 r2' + r3 r3') + kq q q' + ke e e', ri the rows of J.

    Returns (k0, ks, kq, ke) and the vectors q and e of length 5."""
    slip = sqrt(u1 * u1 + u2 * u2 + u3 * u3)
    open_ = u0 >= slip
    stuck = u0 + slip <= 0.0
    scale = 1.0 / maximum(slip, 1e-30)
    bend = 0.5 * weight * (slip - u0) * scale
    k0 = where(stuck, weight, 0.0)
    ks = where(open_, 0.0, where(stuck, weight, bend))
    kq = where(open_, 0.0, where(stuck, 0.0, 0.5 * weight))
    ke = where(open_, 0.0, where(stuck, 0.0, -bend))
    e = jacobian_transpose_times(c, 0.0, u1 * scale, u2 * scale, u3 * scale)
    return (k0, ks, kq, ke), (c[0] - e[0], c[1] - e[1], c[2] - e[2], -e[3], -e[4]), e


@inner
def add_outer(h, k, p):
    """The symmetric matrix h + k p p'. h and the result are lower triangles, row by row."""
    a = k * p[0]
    b = k * p[1]
    c = k * p[2]
    d = k * p[3]
    e = k * p[4]
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
def add_curvature(h, c, weight, u0, u1, u2, u3):
    k, q, e = curvature(c, weight, u0, u1, u2, u3)
    h = add_outer(h, k[0], jacobian_transpose_times(c, 1.0, 0.0, 0.0, 0.0))
    h = add_outer(h, k[1], jacobian_transpose_times(c, 0.0, 1.0, 0.0, 0.0))
    h = add_outer(h, k[1], jacobian_transpose_times(c, 0.0, 0.0, 1.0, 0.0))
    h = add_outer(h, k[1], jacobian_transpose_times(c, 0.0, 0.0, 0.0, 1.0))
    h = add_outer(h, k[2], q)
    return add_outer(h, k[3], e)


@inner
def cholesky_solve(h, b0, b1, b2, b3, b4):
    """H^-1 b by Cholesky factorization (L D L'). H is positive definite; h is its lower triangle, row by row."""
    i0 = 1.0 / h[0]
    l10 = h[1] * i0
    l20 = h[3] * i0
    l30 = h[6] * i0
    l40 = h[10] * i0
    d1 = h[2] - l10 * h[1]
    i1 = 1.0 / d1
    m21 = h[4] - l20 * h[1]
    m31 = h[7] - l30 * h[1]
    m41 = h[11] - l40 * h[1]
    l21 = m21 * i1
    l31 = m31 * i1
    l41 = m41 * i1
    d2 = h[5] - l20 * h[3] - l21 * m21
    i2 = 1.0 / d2
    m32 = h[8] - l30 * h[3] - l31 * m21
    m42 = h[12] - l40 * h[3] - l41 * m21
    l32 = m32 * i2
    l42 = m42 * i2
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
def solve_friction(c, sx, sy, normal, g1, g2, g3, aref, x, y, z, w, r):
    """One step of the no-slip solver: the friction forces of one contact, without softness, at a fixed normal force.

    g1 to g3 are the contact's present friction forces, and (x, y, z, w, r) the accelerations under all present forces.
    Returns the new friction forces and accelerations. If the unconstrained forces lie outside the friction cone, the
    Lagrange multiplier of the cone's boundary is computed by Newton's method."""
    p = jacobian_transpose_times(c, 0.0, 1.0, 0.0, 0.0)
    q = jacobian_transpose_times(c, 0.0, 0.0, 1.0, 0.0)
    s = jacobian_transpose_times(c, 0.0, 0.0, 0.0, 1.0)
    p = inverse_mass_times(sx, sy, TURN_INERTIA, ROLL_INERTIA, p[0], p[1], p[2], p[3], p[4])
    q = inverse_mass_times(sx, sy, TURN_INERTIA, ROLL_INERTIA, q[0], q[1], q[2], q[3], q[4])
    s = inverse_mass_times(sx, sy, TURN_INERTIA, ROLL_INERTIA, s[0], s[1], s[2], s[3], s[4])
    _, a11, a12, a13 = jacobian_times(c, p[0], p[1], p[2], p[3], p[4])
    _, _, a22, a23 = jacobian_times(c, q[0], q[1], q[2], q[3], q[4])
    _, _, _, a33 = jacobian_times(c, s[0], s[1], s[2], s[3], s[4])
    _, b1, b2, b3 = jacobian_times(c, x, y, z, w, r)
    b1 = b1 - aref[1] - a11 * g1 - a12 * g2 - a13 * g3
    b2 = b2 - aref[2] - a12 * g1 - a22 * g2 - a23 * g3
    b3 = b3 - aref[3] - a13 * g1 - a23 * g2 - a33 * g3
    multiplier = normal * 0.0
    f1, f2, f3, square, slope = friction_at_multiplier(a11, a12, a13, a22, a23, a33, b1, b2, b3, multiplier)
    limit = normal * normal
    iterations = 0
    going = square - limit > 1e-10
    while any_lane(going) & (iterations < 20):
        multiplier = where(going, multiplier + (square - limit) / maximum(slope, 1e-30), multiplier)
        f1, f2, f3, square, slope = friction_at_multiplier(a11, a12, a13, a22, a23, a33, b1, b2, b3, multiplier)
        going = square - limit > 1e-10
        iterations += 1
    touching = normal > 1e-10
    f1 = where(touching, f1, 0.0)
    f2 = where(touching, f2, 0.0)
    f3 = where(touching, f3, 0.0)
    d1 = f1 - g1
    d2 = f2 - g2
    d3 = f3 - g3
    x = x + d1 * p[0] + d2 * q[0] + d3 * s[0]
    y = y + d1 * p[1] + d2 * q[1] + d3 * s[1]
    z = z + d1 * p[2] + d2 * q[2] + d3 * s[2]
    w = w + d1 * p[3] + d2 * q[3] + d3 * s[3]
    r = r + d1 * p[4] + d2 * q[4] + d3 * s[4]
    return f1, f2, f3, x, y, z, w, r


@inner
def friction_at_multiplier(a11, a12, a13, a22, a23, a33, b1, b2, b3, multiplier):
    """f = -(A + multiplier I)^-1 b; returns f, |f|^2, and minus the derivative of |f|^2 by the multiplier.

    The torsional entries of A vanish where the lever arm is zero, so a little is added to the diagonal."""
    a11 = a11 + multiplier + 1e-15
    a22 = a22 + multiplier + 1e-15
    a33 = a33 + multiplier + 1e-15
    c11 = a22 * a33 - a23 * a23
    c12 = a13 * a23 - a12 * a33
    c13 = a12 * a23 - a13 * a22
    c22 = a11 * a33 - a13 * a13
    c23 = a12 * a13 - a11 * a23
    c33 = a11 * a22 - a12 * a12
    scale = 1.0 / (a11 * c11 + a12 * c12 + a13 * c13)
    f1 = -scale * (c11 * b1 + c12 * b2 + c13 * b3)
    f2 = -scale * (c12 * b1 + c22 * b2 + c23 * b3)
    f3 = -scale * (c13 * b1 + c23 * b2 + c33 * b3)
    slope = c11 * f1 * f1 + c22 * f2 * f2 + c33 * f3 * f3
    slope = 2.0 * scale * (slope + 2.0 * (c12 * f1 * f2 + c13 * f1 * f3 + c23 * f2 * f3))
    return f1, f2, f3, f1 * f1 + f2 * f2 + f3 * f3, slope


@inner
def substep(x, y, z, h, vx, vy, vz, w, r, turn, roll, gap_1, n1x, n1y, gap_2, n2x, n2y):
    """Advance the body by 5 ms. Returns the new (x, y, z, h, vx, vy, vz, w, r).

    (x, y, z) is the ball's centre in m, h the heading, and (vx, vy, vz, w, r) are the velocities. turn and roll are the
    motors' torques. gap_1 is the distance of the ball's centre to a wall with the normal (n1x, n1y), and gap_2 that to
    a second wall; a gap larger than the ball's radius means no contact."""
    fx = cos(h)
    fy = sin(h)
    sx = -LEVER * fy
    sy = LEVER * fx
    dist_0, c0 = floor_contact(z, fx, fy)
    dist_1, c1 = wall_contact(gap_1, n1x, n1y, fx, fy)
    dist_2, c2 = wall_contact(gap_2, n2x, n2y, fx, fy)
    weight_0 = contact_weight(dist_0)
    weight_1 = contact_weight(dist_1)
    weight_2 = contact_weight(dist_2)
    aref_0 = reference_acceleration(c0, dist_0, vx, vy, vz, w, r)
    aref_1 = reference_acceleration(c1, dist_1, vx, vy, vz, w, r)
    aref_2 = reference_acceleration(c2, dist_2, vx, vy, vz, w, r)
    # generalized forces without contacts, and the accelerations a0 that follow from them
    qx = LEVER * w * w * fx
    qy = LEVER * w * w * fy
    qz = -MASS * GRAVITY
    qw = turn - TURN_DAMPING * w
    qr = roll - ROLL_DAMPING * r
    a0x, a0y, a0z, a0w, a0r = inverse_mass_times(sx, sy, TURN_INERTIA, ROLL_INERTIA, qx, qy, qz, qw, qr)

    # Newton's method for the accelerations (a, b, e, d, g) along (x, y, z, w, r); it starts from a0. Other names than
    # these letters change the last bits on the CPU: numba orders loop variables by name, which fastmath sums follow.
    a = a0x
    b = a0y
    e = a0z + 0.0 * x
    d = a0w
    g = a0r
    decrement = 1.0 + 0.0 * x
    beside_wall = any_lane((dist_1 < 0.0) | (dist_2 < 0.0))
    zero = 0.0 * x
    iterations = 0
    while any_lane(decrement > 1e-14) & (iterations < 30):
        u0, u1, u2, u3 = residual(c0, aref_0, a, b, e, d, g)
        f0, f1, f2, f3 = contact_force(weight_0, u0, u1, u2, u3)
        px, py, pz, pw, pr = jacobian_transpose_times(c0, f0, f1, f2, f3)
        # (gx, gy, gz, gw, gr): minus the gradient of the cost
        dx = a - a0x
        dy = b - a0y
        dz = e - a0z
        dw = d - a0w
        dr = g - a0r
        gx = px - MASS * dx - sx * dw
        gy = py - MASS * dy - sy * dw
        gz = pz - MASS * dz
        gw = pw - sx * dx - sy * dy - TURN_INERTIA * dw
        gr = pr - ROLL_INERTIA * dr
        hessian = (
            MASS + zero,
            zero, MASS + zero,
            zero, zero, MASS + zero,
            sx, sy, zero, TURN_INERTIA + zero,
            zero, zero, zero, zero, ROLL_INERTIA + zero,
        )  # fmt: skip
        hessian = add_curvature(hessian, c0, weight_0, u0, u1, u2, u3)
        v0 = zero
        v1 = zero
        v2 = zero
        v3 = zero
        t0 = zero
        t1 = zero
        t2 = zero
        t3 = zero
        if beside_wall:
            v0, v1, v2, v3 = residual(c1, aref_1, a, b, e, d, g)
            t0, t1, t2, t3 = residual(c2, aref_2, a, b, e, d, g)
            f0, f1, f2, f3 = contact_force(weight_1, v0, v1, v2, v3)
            px, py, pz, pw, pr = jacobian_transpose_times(c1, f0, f1, f2, f3)
            gx = gx + px
            gy = gy + py
            gz = gz + pz
            gw = gw + pw
            gr = gr + pr
            f0, f1, f2, f3 = contact_force(weight_2, t0, t1, t2, t3)
            px, py, pz, pw, pr = jacobian_transpose_times(c2, f0, f1, f2, f3)
            gx = gx + px
            gy = gy + py
            gz = gz + pz
            gw = gw + pw
            gr = gr + pr
            hessian = add_curvature(hessian, c1, weight_1, v0, v1, v2, v3)
            hessian = add_curvature(hessian, c2, weight_2, t0, t1, t2, t3)
        kx, ky, kz, kw, kr = cholesky_solve(hessian, gx, gy, gz, gw, gr)
        decrement = gx * kx + gy * ky + gz * kz + gw * kw + gr * kr
        # line search along k: a root of the derivative of the cost, by the secant method, bracketed by low and high
        r0, r1, r2, r3 = jacobian_times(c0, kx, ky, kz, kw, kr)
        s0, s1, s2, s3 = jacobian_times(c1, kx, ky, kz, kw, kr)
        q0, q1, q2, q3 = jacobian_times(c2, kx, ky, kz, kw, kr)
        mass_k = MASS * (kx * kx + ky * ky + kz * kz) + 2.0 * kw * (sx * kx + sy * ky)
        mass_k = mass_k + TURN_INERTIA * kw * kw + ROLL_INERTIA * kr * kr
        mass_d = MASS * (kx * dx + ky * dy + kz * dz) + kw * (sx * dx + sy * dy) + dw * (sx * kx + sy * ky)
        mass_d = mass_d + TURN_INERTIA * kw * dw + ROLL_INERTIA * kr * dr
        low = 0.0 * x
        low_slope = -decrement
        high = 1.0 + 0.0 * x
        high_slope = 0.0 * x
        step = 1.0 + 0.0 * x
        evaluations = 0
        searching = decrement > 1e-14
        while any_lane(searching) & (evaluations < 10):
            f0, f1, f2, f3 = contact_force(weight_0, u0 + step * r0, u1 + step * r1, u2 + step * r2, u3 + step * r3)
            slope = mass_d + step * mass_k - f0 * r0 - f1 * r1 - f2 * r2 - f3 * r3
            if beside_wall:
                f0, f1, f2, f3 = contact_force(weight_1, v0 + step * s0, v1 + step * s1, v2 + step * s2, v3 + step * s3)
                slope = slope - f0 * s0 - f1 * s1 - f2 * s2 - f3 * s3
                f0, f1, f2, f3 = contact_force(weight_2, t0 + step * q0, t1 + step * q1, t2 + step * q2, t3 + step * q3)
                slope = slope - f0 * q0 - f1 * q1 - f2 * q2 - f3 * q3
            descending = slope < 0.0
            # a full Newton step is accepted if the cost still descends there
            searching = searching & (absolute(slope) > 0.05 * decrement) & ((evaluations > 0) | (slope > 0.0))
            low = where(searching & descending, step, low)
            low_slope = where(searching & descending, slope, low_slope)
            high = where(searching & descending, high, step)
            high_slope = where(searching & descending, high_slope, slope)
            secant = low - low_slope * (high - low) / maximum(high_slope - low_slope, 1e-30)
            middle = 0.5 * (low + high)
            secant = where(evaluations % 3 == 2, middle, secant)
            step = where(searching, secant, step)
            evaluations += 1
        step = where(decrement > 1e-14, step, 0.0)
        a = a + step * kx
        b = b + step * ky
        e = e + step * kz
        d = d + step * kw
        g = g + step * kr
        iterations += 1

    u0, u1, u2, u3 = residual(c0, aref_0, a, b, e, d, g)
    n0, f01, f02, f03 = contact_force(weight_0, u0, u1, u2, u3)
    u0, u1, u2, u3 = residual(c1, aref_1, a, b, e, d, g)
    n1, f11, f12, f13 = contact_force(weight_1, u0, u1, u2, u3)
    u0, u1, u2, u3 = residual(c2, aref_2, a, b, e, d, g)
    n2, f21, f22, f23 = contact_force(weight_2, u0, u1, u2, u3)
    sweeps = 0
    while sweeps < 5:
        f01, f02, f03, a, b, e, d, g = solve_friction(c0, sx, sy, n0, f01, f02, f03, aref_0, a, b, e, d, g)
        if beside_wall:
            f11, f12, f13, a, b, e, d, g = solve_friction(c1, sx, sy, n1, f11, f12, f13, aref_1, a, b, e, d, g)
            f21, f22, f23, a, b, e, d, g = solve_friction(c2, sx, sy, n2, f21, f22, f23, aref_2, a, b, e, d, g)
            sweeps += 1
        else:
            sweeps += 5  # with a single contact, the first sweep is exact

    # from accelerations back to generalized forces, then an Euler step with implicit damping
    qx = MASS * a + sx * d
    qy = MASS * b + sy * d
    qz = MASS * e
    qw = sx * a + sy * b + TURN_INERTIA * d
    qr = ROLL_INERTIA * g
    a, b, e, d, g = inverse_mass_times(
        sx, sy, TURN_INERTIA + STEP * TURN_DAMPING, ROLL_INERTIA + STEP * ROLL_DAMPING, qx, qy, qz, qw, qr
    )
    vx = vx + STEP * a
    vy = vy + STEP * b
    vz = vz + STEP * e
    w = w + STEP * d
    r = r + STEP * g
    return x + STEP * vx, y + STEP * vy, z + STEP * vz, h + STEP * w, vx, vy, vz, w, r
