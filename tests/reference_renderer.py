"""A second renderer of scenes without unnamed details, one ray at a time in the mind of its reader: the reference.

Every solid is intersected in closed form: exact surfaces and normals at any resolution, soft shadows from an area
light, one mirror bounce for metal, procedural floors whose contrast fades with distance. All arrays are float32.
"""

import math

import numpy as np
from numpy.typing import NDArray

from lowmem_imagic.demo.attributes import COLORS, FLOORS
from lowmem_imagic.demo.scene import Scene
from lowmem_imagic.demo.solids import FIELD, LIGHT_DISC, Array, Solid, camera_frame, unit

_FAR = np.float32(1e4)


def hit(solid: Solid, origin: Array, direction: Array) -> tuple[Array, Array]:
    """Distance (P,) along each ray, `_FAR` where it misses, and outward normals (P, 3) in world coordinates."""
    o = (origin - solid.center) @ solid.axes.T
    d = direction @ solid.axes.T
    distance, normal = _INTERSECT[solid.shape](o, d, solid.radius, solid.half_height)
    return distance, normal @ solid.axes


def _quadratic(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """Both roots of ``a t^2 + 2 b t + c``, `_FAR` where there is none."""
    disc = b * b - a * c
    safe = np.where(np.abs(a) < 1e-9, np.float32(1e-9), a)
    root = np.sqrt(np.maximum(disc, 0))
    near, far = (-b - root) / safe, (-b + root) / safe
    return np.where(disc < 0, _FAR, np.minimum(near, far)), np.where(disc < 0, _FAR, np.maximum(near, far))


def _closest(candidates: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The nearest valid (distance, normal) of several surfaces; distances below zero count as misses."""
    best, normal = np.full_like(candidates[0][0], _FAR), np.zeros_like(candidates[0][1])
    for distance, n in candidates:
        nearer = (distance > 1e-4) & (distance < best)
        best = np.where(nearer, distance, best)
        normal = np.where(nearer[:, None], n, normal)
    return best, normal


def _sphere(o: Array, d: Array, r: float, _: float) -> tuple[Array, Array]:
    near, _far = _quadratic((d * d).sum(1), (o * d).sum(1), (o * o).sum(1) - r * r)
    return _closest([(near, (o + near[:, None] * d) / r)])


def _cube(o: Array, d: Array, r: float, _: float) -> tuple[Array, Array]:
    inverse = 1 / np.where(np.abs(d) < 1e-7, np.float32(1e-7), d)
    low, high = (-r - o) * inverse, (r - o) * inverse
    enter, leave = np.minimum(low, high), np.maximum(low, high)
    axis = enter.argmax(1)
    near = enter.max(1)
    near = np.where((near < leave.min(1)) & (near > 0), near, _FAR)
    normal = np.zeros_like(o)
    rows = np.arange(len(o))
    normal[rows, axis] = -np.sign(d[rows, axis])
    return near, normal


def _cap(o: Array, d: Array, r: float, y: float) -> tuple[Array, Array]:
    """The disc of radius r at height y."""
    distance = (y - o[:, 1]) / np.where(np.abs(d[:, 1]) < 1e-7, np.float32(1e-7), d[:, 1])
    p = o + distance[:, None] * d
    inside = p[:, 0] ** 2 + p[:, 2] ** 2 <= r * r
    normal = np.zeros_like(o)
    normal[:, 1] = math.copysign(1, y)
    return np.where(inside, distance, _FAR), normal


def _cylinder(o: Array, d: Array, r: float, h: float) -> tuple[Array, Array]:
    near, _far = _quadratic(
        d[:, 0] ** 2 + d[:, 2] ** 2,
        o[:, 0] * d[:, 0] + o[:, 2] * d[:, 2],
        o[:, 0] ** 2 + o[:, 2] ** 2 - r * r,
    )
    p = o + near[:, None] * d
    normal = p * np.array([1 / r, 0, 1 / r], np.float32)
    side = np.where(np.abs(p[:, 1]) <= h, near, _FAR)
    return _closest([(side, normal), _cap(o, d, r, h), _cap(o, d, r, -h)])


def _cone(o: Array, d: Array, r: float, h: float) -> tuple[Array, Array]:
    """Base radius r at height -h, tip at +h: ``x^2 + z^2 = k^2 (h - y)^2``."""
    k = r / (2 * h)
    k2 = k * k
    oy, dy = h - o[:, 1], -d[:, 1]
    roots = _quadratic(
        d[:, 0] ** 2 + d[:, 2] ** 2 - k2 * dy * dy,
        o[:, 0] * d[:, 0] + o[:, 2] * d[:, 2] - k2 * oy * dy,
        o[:, 0] ** 2 + o[:, 2] ** 2 - k2 * oy * oy,
    )
    surfaces = [_cap(o, d, r, -h)]
    for distance in roots:
        p = o + distance[:, None] * d
        on_cone = np.abs(p[:, 1]) <= h
        normal = p.copy()
        normal[:, 1] = k2 * (h - p[:, 1])
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
        surfaces.append((np.where(on_cone, distance, _FAR), normal))
    return _closest(surfaces)


_INTERSECT = {"sphere": _sphere, "cube": _cube, "cylinder": _cylinder, "cone": _cone}


def _noise(a: Array, b: Array, seed: float) -> Array:
    """Hash noise in [0, 1) of two integer-valued coordinates."""
    value = np.sin(a * 12.9898 + b * 78.233 + seed) * 43758.547
    return (value - np.floor(value)).astype(np.float32)


def _smooth_noise(x: Array, z: Array, seed: float) -> Array:
    """Value noise in [0, 1): hash noise on the integer grid, smoothly interpolated."""
    fx, fz = np.floor(x), np.floor(z)
    u, v = x - fx, z - fz
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    top = _noise(fx, fz, seed) * (1 - u) + _noise(fx + 1, fz, seed) * u
    bottom = _noise(fx, fz + 1, seed) * (1 - u) + _noise(fx + 1, fz + 1, seed) * u
    smooth: Array = top * (1 - v) + bottom * v
    return smooth


def _floor_color(scene: Scene, x: Array, z: Array, distance: Array) -> Array:
    """Floor colours (P, 3) at floor points; contrast fades with distance as pixels cover more of the floor."""
    phase = scene.texture_seed % 10007 / 97.0
    turn = phase % 1.2 - 0.6
    x, z = math.cos(turn) * x + math.sin(turn) * z, math.cos(turn) * z - math.sin(turn) * x
    fade = np.clip(1.25 - distance / 11.0, 0.0, 1.0)
    kind = FLOORS.index(scene.floor)
    if kind == 0:
        plank = np.floor(x * 1.7 + phase)
        across = x * 1.7 + phase - plank
        grain = np.sin(z * 4 + plank * 3 + 2.5 * _smooth_noise(x * 4, z * 0.8, phase))
        tone = 0.55 + fade * (0.26 * (_noise(plank, plank * 0, phase) - 0.5) + 0.07 * grain)
        tone = tone * (1 - 0.45 * fade * (across < 0.07))
        base = (0.92, 0.56, 0.28)
    elif kind == 1:
        grid = np.floor(z * 1.2)
        shift = x * 1.0 + 0.5 * (grid % 2) + phase
        joint = (np.abs(shift - np.floor(shift) - 0.5) > 0.455) | (np.abs(z * 1.2 - grid - 0.5) > 0.45)
        tone = 0.52 + fade * (
            0.20 * (_noise(np.floor(shift), grid, phase) - 0.5) + 0.16 * (_smooth_noise(x * 5, z * 5, phase) - 0.5)
        )
        tone = tone * (1 - 0.42 * fade * joint)
        base = (0.92, 0.94, 1.0)
    elif kind == 2:
        tone = 0.52 + fade * (
            0.34 * (_smooth_noise(x * 7, z * 5, phase) - 0.5) + 0.22 * (_smooth_noise(x * 1.5, z * 1.5, phase) - 0.5)
        )
        base = (0.40, 0.92, 0.20)
    else:
        check = (np.floor(x * 1.15 + phase) + np.floor(z * 1.15)) % 2
        tone = 0.58 + 0.54 * fade * (check - 0.5)
        base = (0.90, 0.94, 1.0)
    colors: Array = (tone[:, None] * np.array(base, np.float32)).astype(np.float32)
    return colors


def camera(scene: Scene, side: int) -> tuple[Array, Array]:
    """Camera position (3,) and ray directions (side * side, 3), row by row from the top left."""
    eye, forward, right, up = camera_frame(scene)
    steps = (np.arange(side) + 0.5) / side * 2 - 1
    px, py = np.meshgrid(steps * FIELD, -steps * FIELD)
    rays = forward + px.reshape(-1, 1) * right + py.reshape(-1, 1) * up
    return eye.astype(np.float32), unit(rays)


def _trace(solids: list[Solid], origin: Array, direction: Array) -> tuple[Array, Array, NDArray[np.int64]]:
    """Nearest distance (P,), normal (P, 3) and object number (P,) from 1 (0 where nothing is hit)."""
    best = np.full(len(direction), _FAR, np.float32)
    normal = np.zeros_like(direction)
    number = np.zeros(len(direction), np.int64)
    for index, solid in enumerate(solids, start=1):
        # Only rays near the bounding sphere need the exact test.
        to_center = solid.center - origin
        along = (to_center * direction).sum(1)
        gap = (to_center * to_center).sum(1) - along * along
        reach = 1.05 * math.hypot(solid.half_height, math.sqrt(2) * solid.radius)
        rows = np.flatnonzero((gap < reach * reach) & (along > -reach))
        if not len(rows):
            continue
        distance, n = hit(solid, origin[rows], direction[rows])
        nearer = distance < best[rows]
        rows = rows[nearer]
        best[rows], normal[rows], number[rows] = distance[nearer], n[nearer], index
    return best, normal, number


def _lit_share(solids: list[Solid], points: Array, light: Array) -> Array:
    """Share (P,) of the area light that each point sees."""
    side = unit(np.cross(light, np.array([0.3, 0.1, 1.0], np.float32)))
    up = np.cross(light, side)
    seen = np.zeros(len(points), np.float32)
    for a, b in LIGHT_DISC:
        ray = np.broadcast_to(unit(light + a * side + b * up), points.shape)
        seen += _trace(solids, points, ray)[2] == 0
    return seen / len(LIGHT_DISC)


def _backdrop(scene: Scene, origin: Array, direction: Array) -> tuple[Array, Array]:
    """Unshaded floor or sky colour (P, 3) a ray sees, and its distance (P,), `_FAR` for the sky."""
    sky = np.array(scene.sky, np.float32) * (0.82 + 0.5 * np.clip(direction[:, 1:2], 0, 1))
    down = np.minimum(direction[:, 1], np.float32(-1e-4))
    distance = np.where(direction[:, 1] < -1e-3, -origin[:, 1] / down, _FAR).astype(np.float32)
    color = sky.astype(np.float32)
    rows = np.flatnonzero(distance < 60)
    point = origin[rows] + distance[rows, None] * direction[rows]
    color[rows] = _floor_color(scene, point[:, 0], point[:, 2], distance[rows])
    return color, distance


def _shade(scene: Scene, side: int) -> tuple[Array, NDArray[np.int64]]:
    """Linear-light colours (side * side, 3) and object numbers (side * side,)."""
    solids = [Solid.of(solid) for solid in scene.objects]
    eye, rays = camera(scene, side)
    origin = np.broadcast_to(eye, rays.shape)
    light = unit(np.array(scene.light, np.float32))
    sky = np.array(scene.sky, np.float32)

    color, ground = _backdrop(scene, origin, rays)
    distance, normal, number = _trace(solids, origin, rays)
    number = np.where(distance < ground, number, 0)

    floor = np.flatnonzero((number == 0) & (ground < 60))
    point = origin[floor] + ground[floor, None] * rays[floor]
    lit = np.ones(len(floor), np.float32)
    near = np.flatnonzero((np.abs(point[:, 0]) < 5) & (np.abs(point[:, 2]) < 5))
    lit[near] = _lit_share(solids, point[near], light)
    for solid in solids:
        # Ambient light is blocked close to an object: the dark line where it touches the floor.
        gap = np.hypot(point[:, 0] - solid.center[0], point[:, 2] - solid.center[2]) / solid.radius
        lit = lit * (1 - 0.25 * np.exp(-1.5 * gap * gap))
    shaded = color[floor] * (0.42 + 0.68 * light[1] * lit[:, None])
    haze = (1 - np.exp(-0.07 * np.maximum(ground[floor] - 5, 0)))[:, None]
    color[floor] = shaded * (1 - haze) + sky * 0.9 * haze

    hit = np.flatnonzero(number)
    if len(hit):
        n, view = normal[hit], rays[hit]
        point = origin[hit] + distance[hit, None] * view + 2e-3 * n
        lit = _lit_share(solids, point, light)[:, None]
        facing = np.clip(n @ light, 0, 1)[:, None] * lit
        half = unit(light - view)
        shine = np.clip((n * half).sum(1), 0, 1)[:, None]
        base = np.array([COLORS[scene.objects[i - 1].color] for i in number[hit]], np.float32)
        metal = np.array([scene.objects[i - 1].material == "metal" for i in number[hit]])[:, None]
        ambient = 0.30 + 0.14 * n[:, 1:2]
        rubber = base * (ambient + 0.80 * facing) + 0.10 * shine**14 * lit
        mirror = view - 2 * (view * n).sum(1, keepdims=True) * n
        seen, far = _backdrop(scene, point, mirror)
        seen = np.where((far < 60)[:, None], seen * 0.85, seen)
        other = _trace(solids, point, mirror)[2]
        other_color = np.array([COLORS[o.color] for o in scene.objects], np.float32)[np.maximum(other, 1) - 1]
        seen = np.where((other > 0)[:, None], other_color * 0.5, seen)
        edge = (1 - np.clip(-(view * n).sum(1), 0, 1))[:, None] ** 4
        shiny = base * (0.08 + 0.25 * facing) + seen * (0.75 * base + 0.10 + 0.25 * edge) + 0.9 * shine**70 * lit
        color[hit] = np.where(metal, shiny, rubber)
    return color, number


def render(scene: Scene, size_px: int, *, supersampling: int = 3) -> NDArray[np.uint8]:
    """The picture (size_px, size_px, 3) of a scene without unnamed details, averaged over `supersampling`**2 rays."""
    side = size_px * supersampling
    color, _ = _shade(scene, side)
    linear = color.reshape(size_px, supersampling, size_px, supersampling, 3).mean((1, 3))
    # A gentle gamma, between linear and sRGB, keeps dark colours apart without washing out the floors.
    values: NDArray[np.uint8] = (np.clip(linear, 0, 1) ** (1 / 1.25) * 255).round().astype(np.uint8)
    return values


def object_mask(scene: Scene, size_px: int) -> NDArray[np.int64]:
    """Object number (size_px, size_px) at each pixel's centre, 0 for floor and sky."""
    _, number = _shade(scene, size_px)
    return number.reshape(size_px, size_px)
