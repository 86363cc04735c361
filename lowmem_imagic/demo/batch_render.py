"""Pictures of many scenes at once by ray casting, on any torch device, with every detail that a scene can have.

Every solid is intersected in closed form: exact surfaces and normals at any resolution, soft shadows from an area
light, one mirror bounce for metal, procedural floors whose contrast fades with distance (the average over a camera's
pixel). Every scene is packed into one row of numbers; then all rays of all scenes go through the same elementwise
operations, without a branch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .packed_scene import FAR, View, pack, solid_counts
from .scene import Scene
from .solids import FIELD, LIGHT_DISC
from .surfaces import floor_color, patterned, screen_seen
from .vectors import Vector, along, bounded, dot, mixed, normalized, scaled, where

_RAYS = {"cuda": 1 << 22, "cpu": 1 << 17}
"""Rays traced together: enough to fill the device, few enough for its memory or cache."""


def render_batch(
    scenes: Sequence[Scene] | NDArray[np.float32],
    size_px: int,
    *,
    supersampling: int = 3,
    device: torch.device | str = "cpu",
    plain: bool = False,
) -> Tensor:
    """Pictures (B, size, size, 3) uint8 of the scenes, on the device.

    Args:
        scenes: scenes, or rows of `pack`.
        size_px: side of the pictures.
        supersampling: rays a pixel, along each side.
        device: where to compute.
        plain: leave patterns away.
    """
    rows = scenes if isinstance(scenes, np.ndarray) else np.stack([pack(scene) for scene in scenes])
    pictures = torch.empty(len(rows), size_px, size_px, 3, dtype=torch.uint8, device=device)
    side = size_px * supersampling
    for numbers, slots in _parts(rows, side, pictures.device):
        part = torch.from_numpy(rows[numbers]).to(pictures.device)
        color, _ = _shade(View(part, slots, rows[numbers]), side, plain=plain)
        planes = []
        for plane in color:
            linear = plane.view(-1, size_px, supersampling, size_px, supersampling).mean((2, 4))
            planes.append((linear.clamp(0, 1) ** (1 / 1.25) * 255).round())
        pictures[torch.from_numpy(numbers).to(pictures.device)] = torch.stack(planes, -1).to(torch.uint8)
    return pictures


def object_masks(scenes: Sequence[Scene], size_px: int) -> NDArray[np.int64]:
    """Object number (B, size, size) at each pixel's centre, 0 for everything else, props too."""
    rows = np.stack([pack(scene) for scene in scenes])
    counts = np.array([[len(scene.objects)] for scene in scenes])
    masks = np.empty((len(rows), size_px * size_px), np.int64)
    for numbers, slots in _parts(rows, size_px, torch.device("cpu")):
        part = rows[numbers]
        number = _shade(View(torch.from_numpy(part), slots, part), size_px, plain=True)[1].numpy()
        masks[numbers] = np.where(number > counts[numbers], 0, number)
    return masks.reshape(-1, size_px, size_px)


def _parts(rows: NDArray[np.float32], side: int, device: torch.device) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Numbers of scenes that are rendered together, and how many solids each of them has."""
    together = max(1, _RAYS[device.type] // (side * side))
    counts = solid_counts(rows)
    for count in np.unique(counts).tolist():
        chosen = np.flatnonzero(counts == count)
        for start in range(0, len(chosen), together):
            yield chosen[start : start + together], count


def _own(view: View, slot: int, origin: Vector, direction: Vector) -> tuple[Vector, Vector]:
    """Origin and direction of rays in a solid's own frame."""
    center = view.vector("center", slot)
    axes = view.axes(slot)
    o = (origin[0] - center[0], origin[1] - center[1], origin[2] - center[2])
    return (
        (dot(axes[0], o), dot(axes[1], o), dot(axes[2], o)),
        (dot(axes[0], direction), dot(axes[1], direction), dot(axes[2], direction)),
    )


def _hit(view: View, slot: int, o: Vector, d: Vector) -> tuple[Tensor, Vector]:
    """Distance along rays in a solid's own frame, `FAR` where they miss, and outward normals."""
    # The curved surface.
    a2, b2, c2 = view.vector("quadric", slot)
    bound = view.number("bound", slot)
    a = d[0] * d[0] + d[2] * d[2] + a2 * d[1] * d[1]
    b = o[0] * d[0] + o[2] * d[2] + a2 * o[1] * d[1] + b2 * d[1]
    c = o[0] * o[0] + o[2] * o[2] + a2 * o[1] * o[1] + 2 * b2 * o[1] + c2
    disc = b * b - a * c
    root = disc.clamp_min(0).sqrt()
    inverse = 1 / bounded(a, 1e-9)
    first, second = (-b - root) * inverse, (-b + root) * inverse
    best = torch.full_like(first, FAR)
    for distance in (torch.minimum(first, second), torch.maximum(first, second)):
        inside = (disc >= 0) & ((o[1] + distance * d[1]).abs() <= bound) & (distance > 1e-4) & (distance < best)
        best = torch.where(inside, distance, best)
    p = along(o, best, d)
    normal = normalized((p[0], a2 * p[1] + b2, p[2]))
    # The caps.
    down = 1 / bounded(d[1], 1e-7)
    zero, one = torch.zeros_like(best), torch.ones_like(best)
    for radius, height, sign in (("bottom", -bound, -1), ("top", bound, 1)):
        size = view.number(radius, slot)
        distance = (height - o[1]) * down
        x, z = o[0] + distance * d[0], o[2] + distance * d[2]
        inside = (x * x + z * z <= size * size) & (size > 0) & (distance > 1e-4) & (distance < best)
        best = torch.where(inside, distance, best)
        normal = where(inside, (zero, sign * one, zero), normal)
    # The box.
    enter, leave, faces = None, None, []
    for extent, position, step in zip(view.vector("extent", slot), o, d, strict=True):
        inverse = 1 / bounded(step, 1e-7)
        low, high = (-extent - position) * inverse, (extent - position) * inverse
        faces.append(torch.minimum(low, high))
        far = torch.maximum(low, high)
        enter = faces[-1] if enter is None else torch.maximum(enter, faces[-1])
        leave = far if leave is None else torch.minimum(leave, far)
    assert enter is not None and leave is not None
    box = view.number("box", slot) > 0
    entered = torch.where((enter < leave) & (enter > 0), enter, torch.full_like(enter, FAR))
    x = enter == faces[0]
    y = ~x & (enter == faces[1])
    face: Vector = (
        torch.where(x, -d[0].sign(), zero),
        torch.where(y, -d[1].sign(), zero),
        torch.where(x | y, zero, -d[2].sign()),
    )
    return torch.where(box, entered, best), where(box, face, normal)


def _trace(view: View, origin: Vector, direction: Vector) -> tuple[Tensor, Vector, Tensor]:
    """Nearest distance, normal and solid number from 1 (0 where nothing is hit) of rays."""
    best, normal, number = None, None, None
    for slot in range(view.slots):
        distance, n = _hit(view, slot, *_own(view, slot, origin, direction))
        axes = view.axes(slot)
        world: Vector = (
            n[0] * axes[0][0] + n[1] * axes[1][0] + n[2] * axes[2][0],
            n[0] * axes[0][1] + n[1] * axes[1][1] + n[2] * axes[2][1],
            n[0] * axes[0][2] + n[1] * axes[1][2] + n[2] * axes[2][2],
        )
        if best is None or normal is None or number is None:
            best, normal, number = distance, world, (distance < FAR).long()
            continue
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        normal = where(nearer, world, normal)
        number = torch.where(nearer, slot + 1, number)
    assert best is not None and normal is not None and number is not None
    return best, normal, number


def _blocked(view: View, origin: Vector, direction: Vector) -> Tensor:
    """Whether any solid is hit by rays; a cheaper `_trace`."""
    blocked = None
    for slot in range(view.slots):
        o, d = _own(view, slot, origin, direction)
        a2, b2, c2 = view.vector("quadric", slot)
        bound = view.number("bound", slot)
        a = d[0] * d[0] + d[2] * d[2] + a2 * d[1] * d[1]
        b = o[0] * d[0] + o[2] * d[2] + a2 * o[1] * d[1] + b2 * d[1]
        c = o[0] * o[0] + o[2] * o[2] + a2 * o[1] * o[1] + 2 * b2 * o[1] + c2
        disc = b * b - a * c
        root = disc.clamp_min(0).sqrt()
        inverse = 1 / bounded(a, 1e-9)
        hit = torch.zeros_like(disc, dtype=torch.bool)
        for distance in ((-b - root) * inverse, (-b + root) * inverse):
            hit = hit | (((o[1] + distance * d[1]).abs() <= bound) & (distance > 1e-4))
        hit = hit & (disc >= 0)
        down = 1 / bounded(d[1], 1e-7)
        for radius, height in (("bottom", -bound), ("top", bound)):
            size = view.number(radius, slot)
            distance = (height - o[1]) * down
            x, z = o[0] + distance * d[0], o[2] + distance * d[2]
            hit = hit | ((x * x + z * z <= size * size) & (size > 0) & (distance > 1e-4))
        enter, leave = None, None
        for extent, position, step in zip(view.vector("extent", slot), o, d, strict=True):
            inverse = 1 / bounded(step, 1e-7)
            low, high = (-extent - position) * inverse, (extent - position) * inverse
            near, far = torch.minimum(low, high), torch.maximum(low, high)
            enter = near if enter is None else torch.maximum(enter, near)
            leave = far if leave is None else torch.minimum(leave, far)
        assert enter is not None and leave is not None
        hit = torch.where(view.number("box", slot) > 0, (enter < leave) & (enter > 0), hit)
        blocked = hit if blocked is None else blocked | hit
    assert blocked is not None
    return blocked


def _lit_share(view: View, points: Vector) -> Tensor:
    """Share of the area light that each point sees."""
    lx, ly, lz = view.vector("light")
    # The cross products of the light's direction with a fixed vector, and with the first of them.
    s = normalized((ly * 1.0 - lz * 0.1, lz * 0.3 - lx * 1.0, lx * 0.1 - ly * 0.3))
    u = (ly * s[2] - lz * s[1], lz * s[0] - lx * s[2], lx * s[1] - ly * s[0])
    seen = None
    for a, b in LIGHT_DISC:
        ray = normalized((lx + a * s[0] + b * u[0], ly + a * s[1] + b * u[1], lz + a * s[2] + b * u[2]))
        free = (~_blocked(view, points, ray)).float()
        seen = free if seen is None else seen + free
    assert seen is not None
    return seen / len(LIGHT_DISC)


def _backdrop(view: View, origin: Vector, direction: Vector) -> tuple[Vector, Tensor, Tensor]:
    """Unshaded floor, screen or sky colour that a ray sees, the floor's distance (`FAR` elsewhere), all's distance."""
    brightness = 0.82 + 0.5 * direction[1].clamp(0, 1)
    color = scaled(view.vector("sky"), brightness)
    down = direction[1].clamp_max(-1e-4)
    ground = torch.where(direction[1] < -1e-3, -origin[1] / down, torch.full_like(down, FAR))
    near = ground < 60
    x, _, z = along(origin, torch.where(near, ground, torch.zeros_like(ground)), direction)
    color = where(near, floor_color(view, x, z, ground), color)
    if view.present("screen") == {0}:
        return color, ground, ground
    picture, distance = screen_seen(view, origin, direction)
    front = distance < ground
    # What stands behind the screen is not floor any more.
    floor = torch.where(front, torch.full_like(ground, FAR), ground)
    return where(front, picture, color), floor, torch.minimum(ground, distance)


def _shade(view: View, side: int, *, plain: bool) -> tuple[Vector, Tensor]:
    """Linear-light colours (B, side * side), three planes, and the numbers of the solids seen."""
    device = view.rows.device
    steps = (torch.arange(side, device=device, dtype=torch.float64) + 0.5) / side * 2 - 1
    px = (steps * FIELD).float().repeat(side)[None]
    py = (-steps * FIELD).float().repeat_interleave(side)[None]
    f, r, u = view.vector("forward"), view.vector("right"), view.vector("up")
    rays = normalized((f[0] + px * r[0] + py * u[0], f[1] + px * r[1] + py * u[1], f[2] + px * r[2] + py * u[2]))
    eye = view.vector("eye")
    origin: Vector = (eye[0].expand_as(px * eye[0]), eye[1].expand_as(px * eye[0]), eye[2].expand_as(px * eye[0]))
    light, sky = view.vector("light"), view.vector("sky")

    color, ground, behind = _backdrop(view, origin, rays)
    distance, normal, number = _trace(view, origin, rays)
    hit = distance < behind
    number = torch.where(hit, number, 0)
    hit = number > 0
    on_floor = ~hit & (ground < 60)

    # One point for every ray, of an object or of the floor, so that the light is sought once.
    reach = torch.where(hit, distance, torch.where(on_floor, ground, torch.zeros_like(ground)))
    point = along(origin, reach, rays)
    lifted: Vector = (point[0] + 2e-3 * normal[0], point[1] + 2e-3 * normal[1], point[2] + 2e-3 * normal[2])
    point = where(hit, lifted, point)
    lit = _lit_share(view, point)

    near = (point[0].abs() < 5) & (point[2].abs() < 5)
    floor_lit = torch.where(near, lit, torch.ones_like(lit))
    for slot in range(view.slots):
        # Ambient light is blocked close to an object: the dark line where it touches the floor.
        cx, _, cz = view.vector("center", slot)
        gap2 = ((point[0] - cx) ** 2 + (point[2] - cz) ** 2) / view.number("radius", slot) ** 2
        floor_lit = floor_lit * (1 - 0.25 * torch.exp(-1.5 * gap2))
    shaded = scaled(color, 0.42 + 0.68 * light[1] * floor_lit)
    haze = 1 - torch.exp(-0.07 * (ground - 5).clamp_min(0))
    color = where(on_floor, mixed(shaded, scaled(sky, torch.full_like(sky[0], 0.9)), haze), color)

    # The object.
    base, metal = _surface(view, number, point, plain=plain)
    facing = dot(normal, light).clamp(0, 1) * lit
    half = normalized((light[0] - rays[0], light[1] - rays[1], light[2] - rays[2]))
    shine = dot(normal, half).clamp(0, 1)
    rubber_light, gloss = 0.30 + 0.14 * normal[1] + 0.80 * facing, 0.10 * shine**14 * lit
    if not any(1 in view.present("metal", slot) for slot in range(view.slots)):
        return where(hit, tuple(c * rubber_light + gloss for c in base), color), number  # type: ignore[arg-type]
    turned = dot(rays, normal)
    mirror: Vector = (
        rays[0] - 2 * turned * normal[0],
        rays[1] - 2 * turned * normal[1],
        rays[2] - 2 * turned * normal[2],
    )
    seen, far, _ = _backdrop(view, point, mirror)
    seen = scaled(seen, torch.where(far < 60, 0.85, 1.0))
    other = _trace(view, point, mirror)[2]
    for slot in range(view.slots):
        seen = where(other == slot + 1, tuple(0.5 * c for c in view.vector("color", slot)), seen)  # type: ignore[arg-type]
    edge = (1 - (-turned).clamp(0, 1)) ** 4
    polish = 0.9 * shine**70 * lit
    shiny = [
        b * (0.08 + 0.25 * facing) + s * (0.75 * b + 0.10 + 0.25 * edge) + polish
        for b, s in zip(base, seen, strict=True)
    ]
    body = [torch.where(metal, m, b * rubber_light + gloss) for m, b in zip(shiny, base, strict=True)]
    return where(hit, tuple(body), color), number  # type: ignore[arg-type]


def _surface(view: View, number: Tensor, point: Vector, *, plain: bool) -> tuple[Vector, Tensor]:
    """Colour of the solid at each ray's point, and whether it shines like metal there."""
    zero = torch.zeros_like(point[0])
    base: Vector = (zero, zero, zero)
    metal = torch.zeros_like(number, dtype=torch.bool)
    for slot in range(view.slots):
        here = number == slot + 1
        color, shiny = view.vector("color", slot), view.number("metal", slot) > 0
        dull = torch.zeros_like(metal)
        if not plain:
            color, dull = patterned(view, slot, _own(view, slot, point, point)[0], color)
        base = where(here, color, base)
        metal = torch.where(here, shiny & ~dull, metal)
    return base, metal
