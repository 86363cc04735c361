"""Vectors of many rays: three planes of numbers, which are added and scaled element by element."""

import torch
from torch import Tensor

Vector = tuple[Tensor, Tensor, Tensor]


def dot(a: Vector, b: Vector) -> Tensor:
    """Scalar products."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def along(origin: Vector, distance: Tensor, direction: Vector) -> Vector:
    """Points at distances along rays."""
    return (
        origin[0] + distance * direction[0],
        origin[1] + distance * direction[1],
        origin[2] + distance * direction[2],
    )


def normalized(v: Vector) -> Vector:
    """Vectors of length 1."""
    length = 1 / (dot(v, v).sqrt() + 1e-9)
    return v[0] * length, v[1] * length, v[2] * length


def where(condition: Tensor, a: Vector, b: Vector) -> Vector:
    """`a` where the condition holds, else `b`."""
    return (
        torch.where(condition, a[0], b[0]),
        torch.where(condition, a[1], b[1]),
        torch.where(condition, a[2], b[2]),
    )


def scaled(v: Vector, factor: Tensor) -> Vector:
    """Vectors times numbers."""
    return v[0] * factor, v[1] * factor, v[2] * factor


def mixed(a: Vector, b: Vector, share: Tensor) -> Vector:
    """`a` at the share 0, `b` at 1."""
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share


def bounded(value: Tensor, least: float) -> Tensor:
    """The value, away from zero by `least`, so that one can divide by it."""
    return torch.where(value.abs() < least, torch.full_like(value, least), value)
