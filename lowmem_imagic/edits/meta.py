"""Checks of an edit's plain values, for its constructor and for the reader of its file alike.

No torch: `edits.header.describe` answers without it.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import NonFiniteTensorError, TensorShapeError, TensorValueError
from ..settings.stages import MAX_ALPHA, MAX_RANK, MAX_SEED, MAX_VALUES
from ..storage.strict_json import plain_json
from . import checks
from .identity import TOKEN

MAX_PROMPT_CHARS = 4096
"""Longest sentence."""
MAX_SENTENCES = 64
"""Most sentences of an edit."""
META_KEYS = frozenset(
    (
        "base_weights",
        "eta_default",
        "etas",
        "measured",
        "seed",
        "sentences",
        "settings",
        "start_sentence",
        "versions",
    )
)
"""Values of ``imagic.meta``, beside ``source``; versions 1 and 2 have one sentence in place of the two."""


def checked_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the values of ``imagic.meta`` (all of `META_KEYS`) in their plain form.

    Raises:
        EditHeaderError: A value of the wrong type or out of range; named as in the file.
    """
    sentences = meta["sentences"]
    is_list = isinstance(sentences, list | tuple) and len(sentences) <= MAX_SENTENCES
    checks.require(is_list, "imagic.meta sentences", sentences, f"a list of at most {MAX_SENTENCES} sentences")
    for sentence in sentences:
        checks.text(sentence, "imagic.meta sentences", MAX_PROMPT_CHARS, lines=True)
    checks.require(len(set(sentences)) == len(sentences), "imagic.meta sentences", sentences, "each sentence once")
    start = checks.text(meta["start_sentence"], "imagic.meta start_sentence", MAX_PROMPT_CHARS, lines=True)
    checks.matches(meta["base_weights"], TOKEN, "imagic.meta base_weights", "a short lower-case token")
    versions = dict(checks.mapping(meta["versions"], "imagic.meta versions"))
    for name, version in versions.items():
        checks.text(name, "imagic.meta versions", 100)
        checks.text(version, f"imagic.meta versions.{name}", 100)
    etas = meta["etas"]
    is_list = isinstance(etas, list | tuple) and len(etas) <= MAX_VALUES
    checks.require(is_list, "imagic.meta etas", etas, f"a list of at most {MAX_VALUES} numbers")
    return {
        "sentences": tuple(sentences),
        "start_sentence": start,
        "base_weights": meta["base_weights"],
        "versions": versions,
        "etas": tuple(checks.number(eta, "imagic.meta etas") for eta in etas),
        "eta_default": checks.number(meta["eta_default"], "imagic.meta eta_default"),
        "seed": checks.integer(meta["seed"], "imagic.meta seed", 0, MAX_SEED),
        "settings": _plain(meta["settings"], "imagic.meta settings"),
        "measured": _plain(meta["measured"], "imagic.meta measured"),
    }


def check_factor_shapes(layer: str, down: tuple[int, ...], up: tuple[int, ...]) -> None:
    """Guarantees that the two factors of a layer belong together.

    Raises:
        TensorShapeError: other sides than ``(r, in)`` and ``(out, r)``, or ``(r, in, kh, kw)`` and ``(out, r, 1, 1)``.
    """
    shapes = f"{layer}: lora_down is {down} and lora_up is {up}"
    if len(down) not in (2, 4) or len(up) != len(down) or up[2:] not in ((), (1, 1)):
        raise TensorShapeError(f"{shapes}, expected (r, in) and (out, r), or (r, in, kh, kw) and (out, r, 1, 1)")
    if up[1] != down[0] or min(*down, *up) < 1:
        raise TensorShapeError(f"{shapes}, expected the same rank and no empty side")
    if down[0] > MAX_RANK:
        raise TensorShapeError(f"{shapes}: rank {down[0]}, at most {MAX_RANK} is allowed")


def check_alpha(alpha: float, name: str) -> None:
    """Guarantees an alpha in the range of training.

    Raises:
        NonFiniteTensorError: NaN or infinity.
        EditHeaderError: not above 0.
        TensorValueError: above `MAX_ALPHA`.
    """
    if not math.isfinite(alpha):
        raise NonFiniteTensorError(f"tensor {name}: found {alpha}, expected a finite number")
    checks.require(alpha > 0, f"tensor {name}", alpha, "a number above 0")
    if alpha > MAX_ALPHA:
        raise TensorValueError(f"tensor {name}: found {alpha:g}, expected at most {MAX_ALPHA}")


def check_title(title: object, license_name: object, created: object) -> None:
    """Checks title, licence and date of ``modelspec.*``; the last two may be None.

    Raises:
        EditHeaderError: not text, too long, or not a date.
    """
    checks.text(title, "modelspec.title", 200)
    if license_name is not None:
        checks.text(license_name, "modelspec.license", 200)
    if created is not None:
        checks.date(created)


def _plain(value: object, key: str) -> Any:
    """Returns a plain copy of a mapping, which is on the second level of the header's JSON."""
    return plain_json(checks.mapping(value, key), key, 2)
