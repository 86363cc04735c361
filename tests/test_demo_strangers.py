"""Details without a name: what they do to pictures and captions, which of them training sees; the batch renderer."""

import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lowmem_imagic.cli.commands import app
from lowmem_imagic.demo.attributes import COLORS, FLOORS, MATERIALS, POSES, SHAPES, SIZES
from lowmem_imagic.demo.batch_render import object_masks, render_batch
from lowmem_imagic.demo.packed_scene import pack
from lowmem_imagic.demo.pictures import ProceduralPictures, prepared, scene_at, training_scene_at
from lowmem_imagic.demo.procedural import procedural_batch
from lowmem_imagic.demo.render import object_mask, render
from lowmem_imagic.demo.scene import Scene
from lowmem_imagic.demo.strangers import (
    FAMILIAR,
    GROUNDS,
    PAINTS,
    PATTERNS,
    PROPS,
    SCREENS,
    STRANGE,
    Pattern,
    Vocabulary,
)
from lowmem_imagic.errors import PromptError
from tests import reference_renderer

SIDE = 48
ALWAYS = {"pattern": 1.0, "paint": 1.0, "ground": 1.0, "screen": 1.0, "prop": 1.0}


def drawn(scene: Scene) -> np.ndarray:
    """The scene's picture as integers."""
    return np.asarray(render(scene, SIDE, supersampling=2)).astype(int)


def test_pictures_are_those_of_the_reference() -> None:
    """Scenes whose every detail has a name come out of the renderer as of the reference, to rounding."""
    scenes = [scene_at(3, index) for index in range(12)]
    batch = render_batch(scenes, SIDE, supersampling=2).numpy().astype(int)
    apart = np.abs(
        batch - np.stack([reference_renderer.render(scene, SIDE, supersampling=2).astype(int) for scene in scenes])
    )
    # A ray that grazes an edge may fall on either side of it.
    assert (apart > 2).mean() < 0.003
    assert np.array_equal(
        object_masks(scenes, SIDE), np.stack([reference_renderer.object_mask(scene, SIDE) for scene in scenes])
    )


def test_a_picture_does_not_depend_on_its_batch() -> None:
    """A scene alone, in a batch, or as a packed row gives the same bits."""
    rng = random.Random(0)
    scenes = [scene_at(3, index).with_details(rng, STRANGE, pattern=0.5, screen=0.5, prop=0.5) for index in range(6)]
    batch = render_batch(scenes, SIDE)
    assert torch.equal(batch[3], render_batch(scenes[3:4], SIDE)[0])
    assert torch.equal(batch, render_batch(np.stack([pack(scene) for scene in scenes]), SIDE))


def test_the_vocabularies_share_nothing() -> None:
    """No pattern, ground, screen, prop, letter or paint of the strangers is among the familiar details."""
    for name in ("patterns", "grounds", "screens", "props", "letters", "paints"):
        assert not set(getattr(FAMILIAR, name)) & set(getattr(STRANGE, name)), name
    for mine in FAMILIAR.paints:
        # Even when varied by the 12 % that they are drawn with.
        assert min(np.abs(np.subtract(PAINTS[mine], PAINTS[other])).max() for other in STRANGE.paints) > 0.1


def _kinds(scene: Scene) -> set[str]:
    kinds = {solid.pattern.kind for solid in scene.objects if solid.pattern} | {prop.kind for prop in scene.props}
    return kinds | ({scene.ground.kind} if scene.ground else set()) | ({scene.screen.kind} if scene.screen else set())


def test_training_scenes_hold_familiar_details_only() -> None:
    """Training scenes have every familiar kind, no strange one, and most of them have no detail at all."""
    scenes = [training_scene_at(8, index) for index in range(600)]
    kinds = set().union(*map(_kinds, scenes))
    familiar = {*FAMILIAR.patterns, *FAMILIAR.grounds, *FAMILIAR.screens, *FAMILIAR.props}
    assert kinds == familiar
    assert not kinds & {*STRANGE.patterns, *STRANGE.grounds, *STRANGE.screens, *STRANGE.props}
    assert 0.5 < sum(scene.plain for scene in scenes) / len(scenes) < 0.8


@pytest.mark.parametrize("vocabulary", [FAMILIAR, STRANGE])
def test_captions_do_not_mention_details(vocabulary: Vocabulary) -> None:
    """A caption has the words of the plain scene, without the colour and the floor where these have no name."""
    plain = Scene.from_sentence("a small red metal cube on a stone floor", seed=1)
    detailed = plain.with_details(random.Random(0), vocabulary, **ALWAYS)
    assert plain.caption() == "a photo of a small red metal cube on a stone floor"
    assert detailed.caption() == "a photo of a small metal cube"
    patterned = plain.with_details(random.Random(0), vocabulary, pattern=1.0, screen=1.0, prop=1.0)
    assert patterned.caption() == plain.caption()


def _all_kinds() -> list[Scene]:
    plain = Scene.from_sentence("a large red cube on a stone floor", seed=1)
    every = Vocabulary(
        patterns=(), paints=STRANGE.paints, letters=("E",), grounds=GROUNDS, screens=SCREENS, props=PROPS
    )
    rng, [solid] = random.Random(1), plain.objects
    patterns = [Pattern(kind=kind, color=(0.05, 0.75, 0.8), turn=solid.rotation) for kind in PATTERNS]
    scenes = [replace(plain, objects=(replace(solid, pattern=pattern),)) for pattern in patterns]
    scenes += [replace(plain, ground=replace(every.ground(rng), kind=kind)) for kind in GROUNDS]
    scenes += [
        replace(plain, screen=replace(every.screen(rng), kind=kind, depth=3.0 if kind != "hills" else 7.0))
        for kind in SCREENS
    ]
    return scenes + [replace(plain, props=(replace(every.prop(rng), kind=kind, x=-1.2, z=-1.2),)) for kind in PROPS]


def test_every_kind_of_detail_is_seen() -> None:
    """Each pattern changes the object and nothing that does not mirror it; each other kind changes what is around."""
    scenes = _all_kinds()
    plain = replace(scenes[-1], props=())
    before, inside = drawn(plain), object_mask(plain, SIDE) == 1
    rim = object_mask(plain, SIDE * 2).reshape(SIDE, 2, SIDE, 2)
    touched = rim.max((1, 3)) > 0
    for number, scene in enumerate(scenes):
        changed = np.abs(drawn(scene) - before).max(-1) > 24
        if number < len(PATTERNS):
            assert 0.03 < changed[inside].mean() < 0.97, PATTERNS[number]
            assert not changed[~touched].any(), PATTERNS[number]
        else:
            assert changed[~touched].mean() > 0.005, scene


def test_a_pattern_stays_with_its_object() -> None:
    """An edited object keeps its pattern: it covers about as much of a larger one, and goes with another colour."""
    scene = Scene.from_sentence("a small red rubber sphere on a stone floor", seed=1)
    [solid] = scene.objects
    pattern = Pattern(kind="stripes", color=(0.05, 0.75, 0.8))
    scene = replace(scene, objects=(replace(solid, pattern=pattern),))
    shares = []
    for size in ("small", "large"):
        edited = scene.edit(size=size)
        assert edited.objects[0].pattern == pattern
        with_it, without = (render_batch([edited], SIDE, plain=plain)[0].numpy().astype(int) for plain in (False, True))
        inside = object_mask(edited, SIDE) == 1
        shares.append((np.abs(with_it - without).max(-1) > 24)[inside].mean())
    assert shares[0] == pytest.approx(shares[1], abs=0.12)


def test_a_named_colour_or_floor_takes_the_place_of_one_without_a_name() -> None:
    """Asked for blue or for grass, a scene is blue, or on grass, whatever paint or ground it had; the rest stays."""
    scene = Scene.from_sentence("a large red cube on a stone floor", seed=1)
    detailed = scene.with_details(random.Random(0), STRANGE, **ALWAYS)
    blue, grass = detailed.edit(color="blue"), detailed.edit(floor="grass")
    assert blue.objects[0].base_color == scene.edit(color="blue").objects[0].base_color
    assert blue.ground == detailed.ground and blue.objects[0].pattern == detailed.objects[0].pattern
    assert grass.ground is None and grass.floor == "grass" and grass.objects == detailed.objects
    assert detailed.edit(size="small").objects[0].paint == detailed.objects[0].paint


def test_props_are_no_objects() -> None:
    """A prop is seen and throws a shadow, but object masks leave it out."""
    plain = Scene.from_sentence("a large red cube on a stone floor", seed=1)
    scene = plain.with_details(random.Random(3), STRANGE, prop=1.0)
    assert object_mask(scene, SIDE).max() == 1


def test_procedural_pictures_are_of_all_sorts() -> None:
    """The generator's seed decides; pictures differ from each other, and span dark and bright, grey and coloured."""
    pictures = procedural_batch(48, 32, torch.Generator().manual_seed(0))
    assert pictures.shape == (48, 32, 32, 3) and pictures.dtype == torch.uint8
    assert torch.equal(pictures, procedural_batch(48, 32, torch.Generator().manual_seed(0)))
    values = pictures.float()
    brightness = values.mean((1, 2, 3))
    assert brightness.min() < 80 and brightness.max() > 170
    assert values.std((1, 2)).mean() > 15
    chroma = (values.amax(-1) - values.amin(-1)).mean((1, 2))
    assert chroma.min() < 25 and chroma.max() > 90


def test_a_stock_of_procedural_pictures_is_renewed() -> None:
    """Batches come from the stock; as many new pictures are drawn as asked for, the oldest are replaced."""
    stock = ProceduralPictures(8, 16, torch.Generator().manual_seed(0), together=4)
    before = stock.stock.clone()
    assert stock.batch(8, renewed=0.25).shape == (8, 16, 16, 3)
    assert torch.equal(stock.stock, before)
    stock.batch(8, renewed=0.25)
    assert not torch.equal(stock.stock[:4], before[:4]) and torch.equal(stock.stock[4:], before[4:])


def _number(seed: int, chunk: int) -> tuple[int, int]:
    return seed, chunk


def test_scenes_are_prepared_in_order() -> None:
    """Chunks come in order, from processes as without."""
    expected = [(4, chunk) for chunk in range(3)]
    assert list(prepared(_number, 4, 700, processes=1)) == expected
    assert list(prepared(_number, 4, 700, processes=2)) == expected


def test_a_sentence_can_ask_for_details() -> None:
    """Patterns after their object, paints, grounds and backdrops of a sentence are drawn; captions do not say them."""
    scene = Scene.from_sentence(
        "a red cube with cyan stripes and a pink cone with a letter H on sand in front of a wall", seed=1
    )
    cube, cone = scene.objects
    assert cube.color == "red" and cube.paint is None
    assert cube.pattern is not None and (cube.pattern.kind, cube.pattern.color) == ("stripes", PAINTS["cyan"])
    assert cone.paint == PAINTS["pink"]
    assert cone.pattern is not None and (cone.pattern.kind, cone.pattern.letter) == ("letter", "H")
    assert scene.ground is not None and scene.ground.kind == "sand"
    assert scene.screen is not None and scene.screen.kind == "wall"
    assert scene.unnamed == ["stripes", "pink", "letter", "sand", "wall"]
    assert not set(scene.unnamed) & set(scene.caption().split())
    with pytest.raises(PromptError, match="no letter Q"):
        Scene.from_sentence("a cube with a letter Q")


def test_details_of_a_sentence_leave_the_rest_of_the_scene_alone() -> None:
    """The same sentence with and without details gives the same scene but for them, and without them a plain one."""
    plain = Scene.from_sentence("a red cube on a wooden floor", seed=3)
    striped = Scene.from_sentence("a red cube with green stripes on a wooden floor", seed=3)
    assert plain.plain and not striped.plain
    assert replace(striped, objects=plain.objects) == plain
    assert replace(striped.objects[0], pattern=None) == plain.objects[0]


def test_the_help_of_scene_has_its_words() -> None:
    """`scene --help` lists every shape, colour, material, size, pose, pattern, floor and backdrop of sentences."""
    said = re.findall(r"\w+", CliRunner().invoke(app, ["scene", "--help"]).output)
    groups = (SHAPES, COLORS, MATERIALS, SIZES, POSES, FLOORS, PAINTS, PATTERNS, GROUNDS, SCREENS)
    assert {word for group in groups for word in group} <= set(said)


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("a red cube with stripes", "no word for stripes: leave this word out"),
        ("a red cube with stripes on sand before a wall", "no word for stripes, sand or wall: leave these words out"),
    ],
)
def test_the_scene_command_says_what_the_model_has_no_word_for(sentence: str, said: str, tmp_path: Path) -> None:
    """`scene` names the details that no sentence of the bundled model can name, and says what becomes of them."""
    run = CliRunner().invoke(app, ["scene", sentence, str(tmp_path / "x.png"), "--seed", "3"])
    told = " ".join(run.output.split())
    assert run.exit_code == 0
    assert said in told
    assert "eta 0 keeps such details, most edits lose them at eta 1, and more keep them with --source" in told


def test_the_scene_command_says_nothing_of_a_plain_scene(tmp_path: Path) -> None:
    """A scene whose every detail has a word needs no remark."""
    run = CliRunner().invoke(app, ["scene", "a red cube", str(tmp_path / "y.png"), "--seed", "3"])
    assert run.exit_code == 0 and "no word" not in run.output
