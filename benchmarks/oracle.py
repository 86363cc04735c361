"""Reads shape, colour, floor and the rest off a picture: the judge of samples and edits of the demo world.

    oracle = Oracle.load()
    oracle.read(images)[0].color

A small convolutional network, independent of the bundled model, trained (`benchmarks.train_oracle`) on renders of a
seed that the model never sees. Its file records its accuracy on held-out renders.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from lowmem_imagic.demo.attributes import COLORS, FLOORS, LYING_SHAPES, MATERIALS, POSES, SHAPES, SIZES
from lowmem_imagic.demo.scene import Scene
from lowmem_imagic.storage.atomic import write_bytes
from lowmem_imagic.storage.safetensors_writer import serialize

ORACLE = Path(__file__).parent / "oracle.safetensors"
"""The trained oracle."""
TARGET = 0.97
"""Target share of right readings on held-out renders, for each attribute."""

WORDS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "floor": FLOORS,
    "material": MATERIALS,
    "size": tuple(SIZES),
    "pose": POSES,
}
"""Named attributes and their values, in the order of the network's outputs."""
NUMBERS = ("x", "z", "radius")
"""Attributes that are numbers, in scene units, the network's last outputs."""

CENTER, SPREAD = torch.tensor([0.0, 0.0, 0.7]), torch.tensor([0.6, 0.35, 0.2])
"""Of the numbers, so that the network's outputs are of order one."""
_HALF = 0.625
"""Share of the columns of a two-object scene shown to read one object: all of it, as little of the other as can be."""
_PLACE_CHANNELS = 144
"""What the network knows of each 16 x 16 px."""


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """Visible attributes of one object and its floor."""

    shape: str
    color: str
    floor: str
    material: str
    size: str
    pose: str
    """Always "standing" for shapes that cannot lie."""
    x: float
    """Distance to the right of the centre, scene units."""
    z: float
    """Distance from the camera, relative to the centre, scene units."""
    radius: float
    """Radius in scene units."""

    @staticmethod
    def of(scene: Scene, index: int = 0) -> "Attributes":
        """The truth about object number `index` of a scene."""
        solid = scene.objects[index]
        return Attributes(
            shape=solid.shape,
            color=solid.color,
            floor=scene.floor,
            material=solid.material,
            size=solid.size,
            pose=solid.pose,
            x=solid.x,
            z=solid.z,
            radius=solid.radius,
        )


class Oracle:
    """A trained reader of pictures; see `load` and `read`.

    Attributes:
        report: what is known about it: settings and accuracy on held-out renders (see `measure`).
        sha256: of its file, None where it was just trained.
        size_px: side of the pictures that it was trained on; others are resized.
    """

    def __init__(self, network: nn.Module, report: dict[str, Any], sha256: str | None = None, *, size_px: int) -> None:
        self._network = network.eval().requires_grad_(False)
        self.report, self.sha256, self.size_px = report, sha256, size_px

    @staticmethod
    def load(path: Path = ORACLE) -> "Oracle":
        """The oracle saved at `path`, on the CPU.

        Raises:
            OSError, SafetensorError: the file is missing or damaged.
        """
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            report = json.loads(file.metadata()["report"])
        # The first linear layer sees each place of a picture.
        places = tensors["6.weight"].shape[1] // _PLACE_CHANNELS
        size_px = round(places**0.5) * 16
        network = new_network(size_px)
        network.load_state_dict(tensors, strict=False)
        missing = {name for name in weights(network) if name not in tensors}
        if missing:
            raise ValueError(f"{path.name} lacks {', '.join(sorted(missing))}; train the oracle again")
        return Oracle(network, report, hashlib.sha256(path.read_bytes()).hexdigest(), size_px=size_px)

    def state(self) -> dict[str, Any]:
        """The network's weights, to train it further."""
        return self._network.state_dict()

    def save(self, path: Path) -> None:
        """Writes weights (fp16) and report; equal oracles give equal bytes."""
        write_bytes(path, serialize(weights(self._network), {"report": json.dumps(self.report)}), overwrite=True)

    def read(self, images: Tensor) -> list[Attributes]:
        """What each picture of one object shows; images (B, 3, H, W) in [-1, 1], squares of any size."""
        return self._attributes(self._sized(images))

    def read_pairs(self, images: Tensor) -> list[tuple[Attributes, Attributes]]:
        """The left and the right object of each picture with two objects; images as for `read`.

        The result is a guess for a picture with fewer objects.
        """
        images = self._sized(images)
        left, right = (self._attributes(half(images, side)) for side in (0, 1))
        return list(zip(left, right, strict=True))

    def _sized(self, images: Tensor) -> Tensor:
        """The pictures at the network's size."""
        size = (self.size_px, self.size_px)
        if images.shape[-2:] == size:
            return images.float().cpu()
        return F.interpolate(images.float().cpu(), size=size, mode="bilinear", antialias=True)

    @torch.no_grad()
    def _attributes(self, views: Tensor) -> list[Attributes]:
        found = []
        mirror = torch.ones(len(NUMBERS))
        mirror[0] = -1
        for part in views.split(256):
            # A picture and its mirror image show the same attributes; averaging both is more reliable.
            words, numbers = split(self._network(part))
            again, numbers_again = split(self._network(part.flip(-1)))
            words = {name: logits.softmax(1) + again[name].softmax(1) for name, logits in words.items()}
            numbers = (numbers + numbers_again * mirror) / 2
            chosen = {name: logits.argmax(1).tolist() for name, logits in words.items()}
            for row, (x, z, radius) in enumerate((numbers * SPREAD + CENTER).tolist()):
                said = {name: WORDS[name][number[row]] for name, number in chosen.items()}
                if said["shape"] not in LYING_SHAPES:
                    said["pose"] = "standing"
                found.append(Attributes(**said, x=x, z=z, radius=radius))
        return found


def accuracy(found: Sequence[Attributes], truth: Sequence[Attributes]) -> dict[str, float]:
    """Share of right readings of each visible named attribute; for the pose, among shapes that can lie."""
    shares = {}
    for name in WORDS:
        right = [
            getattr(f, name) == getattr(t, name)
            for f, t in zip(found, truth, strict=True)
            if name != "pose" or t.shape in LYING_SHAPES
        ]
        if right:
            shares[name] = round(sum(right) / len(right), 4)
    return shares


def new_network(size_px: int) -> nn.Module:
    """An untrained network: (B, 3, size, size) in [-1, 1] to (B, logits of all `WORDS`, then `NUMBERS`)."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    outputs = sum(map(len, WORDS.values())) + len(NUMBERS)
    return nn.Sequential(
        block(3, 32, 2),
        block(32, 64, 2),
        block(64, 80, 1),
        block(80, 112, 2),
        block(112, _PLACE_CHANNELS, 2),
        # Kept apart by place: where the object is, is among the questions.
        nn.Flatten(),
        nn.Linear(_PLACE_CHANNELS * (size_px // 16) ** 2, 160),
        nn.ReLU(),
        nn.Linear(160, outputs),
    )


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Tensors for the file: matrices and kernels in fp16, the few vectors in fp32 (variances may be tiny)."""
    return {
        name: tensor.detach().half() if tensor.ndim > 1 else tensor.detach().float()
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def split(outputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The network's outputs as logits by attribute, and numbers (B, 3)."""
    *words, numbers = outputs.split([*map(len, WORDS.values()), len(NUMBERS)], dim=1)
    return dict(zip(WORDS, words, strict=True)), numbers


def half(images: Tensor, side: int) -> Tensor:
    """The pictures with grey over the columns beyond the left (0) or right (1) object."""
    width = images.shape[-1]
    seen = round(_HALF * width)
    covered = slice(seen, None) if side == 0 else slice(None, width - seen)
    shown = images.clone()
    shown[..., covered] = 0
    return shown
