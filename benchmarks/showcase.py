"""Draws the README's picture of edits: ``python -m benchmarks.showcase``, about two minutes on two cores.

Six scenes fixed before any was tried, default settings, seed 0; not selected. The last three have details that the
bundled model has no words for, and the sentence says nothing of them. Each row is a photo, its edit along eta, the same
edit with a source prompt, and the ground truth: the same scene rendered with the edit applied.
"""

from dataclasses import replace
from pathlib import Path

from lowmem_imagic.demo.render import render
from lowmem_imagic.demo.scene import Scene
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.pictures.png import contact_sheet, encode_png
from lowmem_imagic.pipeline.apply import apply_edits
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.storage.atomic import write_bytes

from .edit_methods import SEED, as_photo
from .goals import REPOSITORY

PICTURE = REPOSITORY / "docs" / "edits.png"
ETAS = (0.0, 0.6, 0.8, 1.0)
EDITS = (
    ("a large red rubber cube on a wooden floor", 5, {"color": "blue"}),
    ("a large yellow rubber sphere on a grass floor", 8, {"shape": "cube"}),
    ("a large purple metal sphere on a tiled floor", 4, {"floor": "grass"}),
    ("a large white rubber cube with purple stripes on a grass floor", 6, {"floor": "stone"}),
    ("a large green rubber cone with orange rings on a tiled floor", 2, {"color": "blue"}),
    ("a large blue rubber cylinder with a letter H on a stone floor in front of a wall", 9, {"shape": "sphere"}),
)
"""Scene, its seed, and the attributes that the sentence changes."""


def main(path: Path = PICTURE) -> None:
    """Makes the edits as one pack and draws them."""
    base, settings = BaseModel.load("demo", device="cpu"), preset("balanced")
    photos = [Scene.from_sentence(words, seed=seed) for words, seed, _ in EDITS]
    edited = [scene.edit(**change) for scene, (_, _, change) in zip(photos, EDITS, strict=True)]
    sentences, sources = [_sentence(scene) for scene in edited], [_sentence(scene) for scene in photos]
    pairs = zip(photos, sentences, strict=True)
    jobs = [Job(as_photo(render(scene, base.sizes.own[0])), sentence) for scene, sentence in pairs]
    edits = make_edits(base, jobs, settings)
    cells = [Cell(number, eta, SEED) for number in range(len(edits)) for eta in ETAS]
    pictures = iter(apply_edits(base, edits, cells, settings.sample))
    shown = []
    for edit, photo, truth, sentence, source in zip(edits, photos, edited, sentences, sources, strict=True):
        shown.append(("photo", render(photo, base.sizes.own[0])))
        shown += [(f"eta {eta:g}", next(pictures)) for eta in ETAS]
        sampling = replace(settings.sample, source_prompt=source)
        shown.append(("eta 1, with a source prompt", *apply_edits(base, [edit], [Cell(0, 1.0, SEED)], sampling)))
        shown.append((f"ground truth: {sentence.removeprefix('a photo of ')}", render(truth, base.sizes.own[0])))
    sheet = contact_sheet(shown, columns=len(ETAS) + 3, footer="bundled model, default settings, seed 0", cell_px=160)
    write_bytes(path, encode_png(sheet), overwrite=True)


def _sentence(scene: Scene) -> str:
    """The words of a user: colour, shape and floor."""
    phrase = scene.objects[0].words(size=False, material=False, pose=False)
    return f"a photo of {phrase} on a {scene.floor} floor"


if __name__ == "__main__":
    main()
