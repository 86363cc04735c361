"""The bundled world: scenes are values, and their pictures are ground truth for edits."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_imagic.demo.attributes import COLORS, FLOORS, LYING_SHAPES, MATERIALS, POSES, SHAPES, SIZES
from lowmem_imagic.demo.render import object_mask, render
from lowmem_imagic.demo.scene import Scene, SceneObject
from lowmem_imagic.demo.solids import Solid
from lowmem_imagic.errors import ConfigError, PromptError
from tests import reference_renderer

SIDE = 32


def pixels(scene: Scene) -> np.ndarray:
    """The scene's small picture as floats."""
    return np.asarray(render(scene, SIDE, supersampling=2)).astype(float)


def scenes(objects: int | None = None):
    """Scenes of the training distribution."""
    return st.integers(0, 10_000).map(lambda seed: Scene.draw(random.Random(seed), objects=objects))


def test_rendering_is_a_function_of_the_scene():
    """Equal scenes give equal pictures; the picture is RGB of the asked-for size and not flat."""
    scene = Scene.draw(random.Random(5))
    picture = render(scene, 48)
    assert picture.size == (48, 48) and picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.asarray(render(Scene.draw(random.Random(5)), 48)))
    assert np.asarray(picture).std() > 10


@settings(max_examples=15, deadline=None)
@given(scenes(1), st.sampled_from(sorted(COLORS)))
def test_a_colour_edit_changes_the_object_and_leaves_the_rest(scene, color):
    """Painting the object leaves every pixel that does not touch it exactly as it was."""
    edited = scene.edit(color=color)
    assert edited.objects[0].color == color
    inside = object_mask(scene, SIDE * 2).reshape(SIDE, 2, SIDE, 2).max((1, 3)) > 0
    changed = np.abs(pixels(scene) - pixels(edited)).max(-1) > 0
    if color == scene.objects[0].color:
        assert not changed.any()
    else:
        assert changed[inside].mean() > 0.5
        assert not changed[~inside].any()


@settings(max_examples=15, deadline=None)
@given(scenes(1), st.sampled_from(FLOORS))
def test_a_floor_edit_keeps_the_object_where_it_is(scene, floor):
    """Another floor leaves the object's outline, and nothing but the floor attribute changes in the value."""
    edited = scene.edit(floor=floor)
    assert np.array_equal(object_mask(scene, SIDE), object_mask(edited, SIDE))
    assert edited.objects == scene.objects and edited.edit(floor=scene.floor) == scene


def test_objects_rest_on_the_floor():
    """Every shape in every pose touches the floor and does not sink into it, whatever its turn."""
    for shape in SHAPES:
        for pose in POSES if shape in LYING_SHAPES else ("standing",):
            for rotation in (0.0, 1.1):
                solid = Solid.of(SceneObject(shape=shape, color="red", pose=pose, rotation=rotation))
                # Rays straight up from below: the lowest surface point is where they first hit.
                grid = np.stack(np.meshgrid(np.linspace(-1.2, 1.2, 301), np.linspace(-1.2, 1.2, 301)), -1).reshape(
                    -1, 2
                )
                origin = np.column_stack([grid[:, 0], np.full(len(grid), -1.0), grid[:, 1]]).astype(np.float32)
                up = np.broadcast_to(np.array([0, 1, 0], np.float32), origin.shape)
                lowest = reference_renderer.hit(solid, origin, up)[0].min() - 1.0
                assert lowest == pytest.approx(0, abs=0.01), (shape, pose)


def test_normals_are_unit_and_face_the_viewer():
    """Where a ray hits a solid, the normal has length 1 and points against the ray."""
    for shape in SHAPES:
        for pose in POSES if shape in LYING_SHAPES else ("standing",):
            scene = Scene(objects=(SceneObject(shape=shape, color="red", pose=pose, rotation=0.7),), floor="stone")
            eye, rays = reference_renderer.camera(scene, 40)
            distance, normal = reference_renderer.hit(
                Solid.of(scene.objects[0]), np.broadcast_to(eye, rays.shape), rays
            )
            hit = distance < 100
            assert hit.sum() > 20
            assert np.abs(np.linalg.norm(normal[hit], axis=1) - 1).max() < 1e-4
            assert ((normal[hit] * rays[hit]).sum(1) < 1e-3).all()


@settings(max_examples=50, deadline=None)
@given(scenes(), st.integers(0, 100))
def test_captions_say_only_what_is_true(scene, seed):
    """Every attribute word in a caption belongs to an object of the scene or to its floor."""
    words = scene.caption(random.Random(seed)).split()
    for vocabulary, attribute in ((COLORS, "color"), (MATERIALS, "material"), (SIZES, "size"), (SHAPES, "shape")):
        said = Counter(word for word in words if word in vocabulary)
        there = Counter(getattr(solid, attribute) for solid in scene.objects)
        assert not said - there
    assert all(word == scene.floor for word in words if word in FLOORS)


def test_attributes_are_sometimes_left_out():
    """Over many captions each attribute is said and left out, so that words stay independent."""
    rng = random.Random(0)
    captions = [Scene.draw(rng, objects=1).caption(rng) for _ in range(400)]
    for vocabulary in (COLORS, MATERIALS, SIZES, FLOORS):
        share = sum(any(word in vocabulary for word in caption.split()) for caption in captions) / len(captions)
        assert 0.2 < share < 0.99, vocabulary


@settings(max_examples=50, deadline=None)
@given(scenes())
def test_a_full_caption_is_read_back_as_the_same_attributes(scene):
    """`from_sentence` of a complete caption gives a scene with the same attributes and floor."""
    read = Scene.from_sentence(scene.caption(), seed=1)
    assert read.floor == scene.floor
    for mine, its in zip(scene.objects, read.objects, strict=True):
        for attribute in ("shape", "color", "material", "size", "pose"):
            assert getattr(mine, attribute) == getattr(its, attribute)


def test_a_sentence_may_leave_things_open():
    """Details that a sentence leaves open depend only on the seed; everyday words for shapes and floors are known."""
    one, other = (Scene.from_sentence("a ball", seed=seed) for seed in (1, 2))
    assert one.objects[0].shape == "sphere" and one != other
    assert one == Scene.from_sentence("a ball", seed=1)
    assert Scene.from_sentence("a lying red cone on wood").objects[0].pose == "lying"
    assert Scene.from_sentence("a green box on tiles").floor == "tiled"


@pytest.mark.parametrize("sentence", ["", "a dog", "a cube and a cone and a sphere"])
def test_a_sentence_outside_the_world_is_refused(sentence):
    """No shape or more than two is a PromptError that says what a scene has."""
    with pytest.raises(PromptError, match="one or two"):
        Scene.from_sentence(sentence)


@settings(max_examples=50, deadline=None)
@given(scenes(), st.integers(0, 100))
def test_every_caption_can_be_read(scene, seed):
    """A caption says nothing that `from_sentence` refuses, and what it says of shapes and floor is drawn."""
    caption = scene.caption(random.Random(seed))
    read = Scene.from_sentence(caption)
    assert [solid.shape for solid in read.objects] == [solid.shape for solid in scene.objects]
    assert read.floor == scene.floor or scene.floor not in caption.split()


@pytest.mark.parametrize(
    ("sentence", "named"),
    [
        ("a crimson cube on a wooden flor", ["'crimson'", "'flor'", "colours red,", "floors wooden,"]),
        ("a red cueb on a wooden floor", ["found 0 shapes", "'cueb'", "shapes sphere, cube,"]),
        ("a tall red cube next to a dog at night", ["'tall', 'dog', 'night'"]),
        ("a cube with a fence and a brick", ["'brick'", "backdrops hills,"]),
        ("two Cubes and a \u2603 cone", ["'two', 'Cubes', '\u2603'"]),
    ],
)
def test_unknown_words_are_named(sentence, named):
    """A sentence with words that the world has not is refused; the message names them, and those that there are."""
    with pytest.raises(PromptError) as caught:
        Scene.from_sentence(sentence)
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("sentence", "named"),
    [
        ("a large small cube", ["'large' and 'small'", "one of small, large"]),
        ("a red and blue cube", ["'red' and 'blue'", "one of red,"]),
        ("a red pink cube", ["'red' and 'pink'"]),
        ("a cube with dots and stripes", ["'dots' and 'stripes'", "one of stripes,"]),
        ("a cube on a wooden floor on sand", ["'wooden' and 'sand'", "one of wooden,"]),
        ("a cube before a wall and a fence", ["'wall' and 'fence'", "one of hills,"]),
        ("a standing cone lying on grass", ["'standing' and 'lying'"]),
        ("a lying cube", ["a cube cannot lie"]),
        ("a cube lying on grass", ["a cube cannot lie"]),
    ],
)
def test_contradictions_are_named(sentence, named):
    """Two words of which only one can be true are refused together; the message says what may be said."""
    with pytest.raises(PromptError) as caught:
        Scene.from_sentence(sentence)
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("sentence", "named"),
    [
        ("a cube on a red floor", "'red' belongs to no object"),
        ("a cube with large stripes", "'large' belongs to no object"),
        ("a cube of metal", "'metal' belongs to no object"),
        ("stripes on a cube", "'stripes' comes before any object"),
        ("a wooden cube", "'wooden' is a floor and cannot describe 'cube'"),
        ("a cube in front of a stone wall", "'stone' is a floor and cannot describe 'wall'"),
        ("a cube on a cone", "'on' needs a floor"),
        ("a cube in front of a cone", "'front' needs a backdrop"),
    ],
)
def test_known_words_that_would_not_be_drawn_are_named(sentence, named):
    """A known word in a place where nothing would be drawn of it is refused by name."""
    with pytest.raises(PromptError, match=named):
        Scene.from_sentence(sentence)


def test_simple_variants_mean_the_same():
    """A pose may follow its object, a pattern may be singular, and fillers, letter case and commas change nothing."""
    lying = Scene.from_sentence("a red lying cone on a grass floor", seed=4)
    for sentence in ("a red cone lying on a grass floor", "There is a Red cone, lying on the grass!"):
        assert Scene.from_sentence(sentence, seed=4) == lying
    two = Scene.from_sentence("a lying red cone and a cube on sand")
    assert Scene.from_sentence("a red cone lying and a cube on sand") == two
    striped = Scene.from_sentence("a red cube with cyan stripes")
    assert Scene.from_sentence("a picture of the red cube with a cyan stripe") == striped
    assert striped.objects[0].pattern is not None


def test_impossible_scenes_are_refused():
    """Unknown values, lying spheres, no objects, unknown edits: ConfigError, all problems of an object at once."""
    with pytest.raises(ConfigError) as caught:
        SceneObject(shape="torus", color="pink")
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="cannot lie"):
        SceneObject(shape="sphere", color="red", pose="lying")
    with pytest.raises(ConfigError, match="one or two"):
        Scene(objects=(), floor="grass")
    scene = Scene.draw(random.Random(1), objects=1)
    for change in ({"colour": "red"}, {"floor": "lava"}, {"color": "pink"}):
        with pytest.raises(ConfigError):
            scene.edit(**change)
    with pytest.raises(ConfigError, match="does not exist"):
        scene.edit(object_index=1, color="red")


def test_changing_a_lying_object_into_a_shape_that_cannot_lie_stands_it_up():
    """A lying cylinder edited into a cube is a standing cube."""
    scene = Scene.from_sentence("a lying blue cylinder")
    assert scene.edit(shape="cube").objects[0].pose == "standing"
    assert scene.edit(shape="cone").objects[0].pose == "lying"
