"""Facts about SceneEdits: its items, its verdicts, its figures and its methods are what they say."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image
from scipy.stats import binomtest

from benchmarks import (
    averages,
    ceiling,
    compared,
    edit_judge,
    edit_methods,
    edit_quality,
    full_finetuning,
    levers,
    own_noise,
    quality_plots,
    quality_tables,
    training_free,
)
from benchmarks.bundled import model_of
from benchmarks.edit_quality import Judged
from benchmarks.identity import reader
from benchmarks.oracle import Attributes, Oracle
from benchmarks.scene_edits import (
    GROUPS,
    HALVES,
    KINDS,
    KNOWN,
    PATTERN_SHARES,
    SAME_LEVELS,
    STRANGERS,
    TEST,
    VALIDATION,
    SceneEdit,
)
from benchmarks.workers import each
from lowmem_imagic.demo.render import render
from lowmem_imagic.demo.strangers import STRANGE
from lowmem_imagic.diffusion.schedules import PATHS
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.settings.stages import SampleConfig
from tests import calls

pytestmark = pytest.mark.benchmark

PX = 128
LEAST_STRANGERS = 0.7
"""Least share of strangers whose ground truth the judge calls good; it reads patterned objects less well than plain."""
SMALL = preset(
    "fast",
    {
        "embed": {"steps": 2, "draws": 2},
        "finetune": {"steps": 2, "draws": 2},
        # Neither the photo's own noise nor a mask: thirty and ten passes less for every item.
        "sample": {"num_inference_steps": 2, "start": "photo", "mask": 0.0},
    },
)
WHOLE = replace(SMALL, sample=replace(SMALL.sample, start="inverted", mask=0.6))
"""As `SMALL`, with everything that a preset does."""
PLAIN = SampleConfig(num_inference_steps=2, start="photo")


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """The judge."""
    return Oracle.load()


@pytest.fixture(scope="module")
def items() -> list[SceneEdit]:
    """Two items of every kind in each half of the validation set."""
    return VALIDATION.items()[: 2 * len(HALVES) * len(KINDS)]


@pytest.fixture(scope="module")
def photos(items: list[SceneEdit]) -> list[Image.Image]:
    """Photos of the items."""
    return [item.photo_picture(PX) for item in items]


@pytest.fixture(scope="module")
def truths(items: list[SceneEdit]) -> list[Image.Image]:
    """Ground truths of the items."""
    return [item.truth_picture(PX) for item in items]


def item_of(kind: str, half: str = KNOWN, number: int = 0) -> SceneEdit:
    """An item of the validation set."""
    return [item for item in VALIDATION.items() if (item.kind, item.half) == (kind, half)][number]


def test_sets_are_disjoint_and_every_kind_has_its_share() -> None:
    """8 validation and 16 test items of every kind in each half, no scene in both sets; any first part is balanced."""
    sets = {8: VALIDATION.items(), 16: TEST.items()}
    assert not {item.photo for item in sets[8]} & {item.photo for item in sets[16]}
    for share, members in sets.items():
        for half in HALVES:
            counts = {kind: sum((i.kind, i.half) == (kind, half) for i in members) for kind in KINDS}
            assert counts == dict.fromkeys(KINDS, share)
        assert [(item.kind, item.half) for item in members[:16]] == [(kind, half) for kind in KINDS for half in HALVES]
    assert sorted(kind for kinds in GROUPS.values() for kind in kinds) == sorted(KINDS)


def test_items_are_fixed() -> None:
    """The same items are drawn again, in another process and another year."""
    assert [item.sentence for item in VALIDATION.items()[:6]] == [
        "a photo of a white cube on a grass floor",
        "a photo of a white cube on a grass floor",
        "a photo of a black cube on a stone floor",
        "a photo of a black cube",
        "a photo of a green metal cube on a wooden floor",
        "a photo of a green metal cube on a wooden floor",
    ]
    assert [item.photo.objects[0].pattern.kind for item in VALIDATION.items()[1:6:2]] == [
        "checks",
        "stripes",
        "stripes",
    ]


def test_only_what_is_asked_changes() -> None:
    """Photo and ground truth differ in the attributes asked for and in nothing else, and the sentence names them."""
    for item in [*VALIDATION.items(), *TEST.items()]:
        before, after = item.photo, item.edited
        assert replace(before, objects=after.objects, floor=after.floor, ground=after.ground) == after
        names = ["floor"] * ((before.floor, before.ground) != (after.floor, after.ground))
        fields = ("shape", "color", "material", "size")
        names += [n for n in fields if getattr(before.objects[0], n) != getattr(after.objects[0], n)]
        if before.objects[0].pose != after.objects[0].pose and "shape" not in names:
            names.append("pose")
        assert set(names) == set(item.asked)
        assert (len(after.objects) == 2) == (item.kind == "add")
        assert after.objects[0].paint == (None if "color" in item.asked else before.objects[0].paint)
        for name in item.asked:
            assert (after.floor if name == "floor" else getattr(after.objects[0], name)) in item.sentence.split()


def test_strangers_are_known_items_with_strange_details() -> None:
    """A stranger is the known item before it with a pattern, and other details on some, all of the held-out ones; the
    ground truth has the photo's pattern, a second object has none, and sentences never name a detail."""
    members = [*VALIDATION.items(), *TEST.items()]
    extras = []
    for known, strange in zip(members[::2], members[1::2], strict=True):
        assert known.photo.plain and known.edited.plain
        assert (known.half, strange.half, known.kind, known.asked) == (KNOWN, STRANGERS, strange.kind, strange.asked)
        for plain, detailed in ((known.photo, strange.photo), (known.edited, strange.edited)):
            bare = tuple(replace(solid, pattern=None, paint=None) for solid in detailed.objects)
            assert replace(detailed, objects=bare, ground=None, screen=None, props=()) == plain
        [solid] = strange.photo.objects
        own, *added = strange.edited.objects
        assert solid.pattern is not None and solid.pattern.kind in STRANGE.patterns and own.pattern == solid.pattern
        assert solid.pattern.letter in STRANGE.letters
        assert not any(other.pattern or other.paint for other in added)
        kinds = [strange.photo.ground, strange.photo.screen, *strange.photo.props]
        assert {detail.kind for detail in kinds if detail} <= {*STRANGE.grounds, *STRANGE.screens, *STRANGE.props}
        extras.append(
            [bool(solid.paint), *map(bool, (strange.photo.ground, strange.photo.screen, strange.photo.props))]
        )
        unsaid = set(known.sentence.split()) - set(strange.sentence.split())
        assert set(strange.sentence.split()) <= set(known.sentence.split()) | {"a", "an"}
        assert unsaid <= {known.edited.objects[0].color, "on", known.edited.floor, "floor", "a", "an"}
    assert all(0.1 < share < 0.4 for share in np.mean(extras, axis=0))


def test_patterns_can_be_read_before_and_after_the_edit(items: list[SceneEdit]) -> None:
    """Every stranger shows its pattern, and its own colour, on a part of the object that can be told apart."""
    for item in items:
        if item.half == STRANGERS:
            for scene in (item.photo, item.edited):
                shown, readable = reader(scene, PX).shares
                assert PATTERN_SHARES[0] / 2 < shown < PATTERN_SHARES[1] + 0.05 and readable > 0.5, item.name


def test_what_must_be_kept_is_the_same_in_the_ground_truth(
    items: list[SceneEdit], photos: list[Image.Image], truths: list[Image.Image]
) -> None:
    """Where an edit must leave the photo alone, ground truth and photo agree above the limit for every item."""
    for item, *pictures in zip(items, photos, truths, strict=True):
        mask = item.kept_mask(PX)
        assert mask.mean() > 0.01
        photo, truth = map(np.asarray, pictures)
        assert edit_judge.psnr_db(photo[mask], truth[mask]) > edit_judge.BACKGROUND_DB


def test_ground_truth_is_good_and_the_photo_is_not(
    oracle: Oracle, items: list[SceneEdit], photos: list[Image.Image], truths: list[Image.Image]
) -> None:
    """Most ground-truth renders are called good; unchanged photos hardly ever, though they keep their background."""
    truth = edit_judge.judge(oracle, items, truths)
    for half, least in {KNOWN: 0.9, STRANGERS: LEAST_STRANGERS}.items():
        assert np.mean([v.good for item, v in zip(items, truth, strict=True) if item.half == half]) >= least
    assert all(verdict.truth_db == verdict.object_db == 99 for verdict in truth)
    assert all(verdict.truth_ssim == pytest.approx(1) for verdict in truth)
    assert [verdict.overlap for verdict in truth] == [None if item.half == KNOWN else 1.0 for item in items]
    unchanged = edit_judge.judge(oracle, items, photos)
    done = [v.success for item, v in zip(items, unchanged, strict=True) if item.kind != "add"]
    assert np.mean(done) <= 0.1
    assert all(verdict.background_db == 99 for verdict in unchanged)
    overlaps = [edit_judge.photo_overlap(item, photo) for item, photo in zip(items, photos, strict=True)]
    assert overlaps == [None if item.half == KNOWN else 1.0 for item in items]


def test_an_object_all_in_the_patterns_colour_has_no_pattern() -> None:
    """A picture of one colour overlaps with no pattern, whichever colour it has, however much the pattern covers."""
    for item in VALIDATION.items()[1:16:2]:
        pattern = reader(item.edited, PX)
        for color in (pattern.within.mean(0), pattern.without.mean(0)):
            flat = np.broadcast_to(color.astype(np.uint8), (PX, PX, 3))
            assert pattern.overlap(flat) < 0.35, item.name


def test_patterns_are_told_apart(items: list[SceneEdit]) -> None:
    """The reader of patterns: coarse, dark, and slightly displaced objects have their identity, those without their
    pattern or with another one do not."""
    measured = ceiling.patterns(items, 96)
    shares = {change: part["identity"]["value"] for change, part in measured.items()}
    assert shares["coarse"] >= 0.9 and shares["dark"] >= 0.95 and shares["displaced"] >= 0.7
    assert shares["removed"] == 0 and shares["another"] <= 0.1
    assert measured["removed"]["overlap"]["value"] < 0.1 and measured["another"]["overlap"]["value"] < 0.4


def test_a_known_object_a_little_off_has_its_identity(items: list[SceneEdit]) -> None:
    """A known object that is displaced by less than `kept` allows is within the limit of PSNR inside."""
    for item in items:
        if item.half == KNOWN:
            solid, *added = item.edited.objects
            moved = replace(solid, x=solid.x + 0.1, z=solid.z - 0.15, jitter=1.05 * solid.jitter)
            picture = np.asarray(render(replace(item.edited, objects=(moved, *added)), 96))
            inside, truth = item.object_mask(96), np.asarray(item.truth_picture(96))
            assert edit_judge.psnr_db(picture[inside], truth[inside]) > edit_judge.OBJECT_DB, item.name


def test_a_paint_is_kept_by_its_colour() -> None:
    """The paint of an object, which the judge has no word for, counts as kept in its own colour alone."""
    item = next(i for i in VALIDATION.items() if i.edited.objects[0].paint and i.kind == "size")
    solid = item.edited.objects[0]
    assert solid.color not in item.sentence.split()
    red = replace(item.edited, objects=(replace(solid, paint=(0.8, 0.1, 0.09)),))
    pattern = reader(item.edited, PX)
    assert pattern.base_error(np.asarray(item.truth_picture(PX))) < 1
    assert pattern.base_error(np.asarray(render(red, PX))) > edit_judge.PAINT_LEVELS


@pytest.mark.parametrize(
    ("change", "success", "kept"),
    [
        ({}, True, True),
        ({"color": "black"}, False, True),
        ({"shape": "sphere"}, True, False),
        ({"floor": "tiled"}, True, False),
        ({"x": 0.4}, True, False),
        ({"radius": 1.4}, True, False),
    ],
)
def test_comparing_readings(change: dict[str, Any], success: bool, kept: bool) -> None:
    """A colour edit succeeds by its colour alone, and keeps by everything else; so does that of a stranger."""
    for half in HALVES:
        _compare(item_of("color", half), change, success, kept)


def _compare(item: SceneEdit, change: dict[str, Any], success: bool, kept: bool) -> None:
    truth = Attributes.of(item.edited)
    moved = {n: getattr(truth, n) + v if isinstance(v, float) else v for n, v in change.items()}
    assert edit_judge.compare(item, [replace(truth, **moved)]) == (success, kept)


def test_comparing_a_second_object() -> None:
    """Adding succeeds by the new object's shape and colour, and keeps by the old one."""
    item = item_of("add")
    old, new = (Attributes.of(item.edited, index) for index in (0, 1))
    assert edit_judge.compare(item, [old, new]) == (True, True)
    assert edit_judge.compare(item, [old, replace(new, color="black")]) == (False, True)
    assert edit_judge.compare(item, [replace(old, color="black"), new]) == (True, False)


def test_no_word_is_asked_for_a_detail() -> None:
    """Colour and floor are not asked of a painted object on a ground without a name."""
    item = next(
        i
        for i in (*VALIDATION.items(), *TEST.items())
        if i.edited.objects[0].paint and i.edited.ground and i.kind == "material"
    )
    truth = Attributes.of(item.edited)
    others = {
        "color": "black" if truth.color != "black" else "red",
        "floor": "tiled" if truth.floor != "tiled" else "stone",
    }
    assert edit_judge.compare(item, [replace(truth, **others)]) == (True, True)


VERDICT = edit_judge.Verdict(
    success=True, kept=True, background_db=30, overlap=None, object_db=20, truth_db=20, truth_ssim=0.5
)


def test_good_needs_all_four() -> None:
    """A picture without any of success, kept, background and identity is not good; strangers may differ inside."""
    assert VERDICT.good and replace(VERDICT, overlap=0.6, object_db=10).good
    assert not replace(VERDICT, object_db=15.9).good
    for fault in ({"success": False}, {"kept": False}, {"background_db": 21.9}, {"overlap": 0.59}):
        assert not replace(VERDICT, **fault).good
    assert edit_judge.Verdict.from_json(replace(VERDICT, overlap=0.25).as_json()) == replace(VERDICT, overlap=0.25)


def test_all_kinds_count_alike() -> None:
    """A share is the mean of the kinds' shares, however many items each has; its interval holds it."""
    kinds = ["color"] * 6 + ["pose"] * 2
    share = averages.share(kinds, [True, True, True, False, False, False, False, False])
    assert share["value"] == 0.25 and share["of"] == 8
    assert share["interval_95"][0] < 0.25 < share["interval_95"][1]
    assert averages.level(kinds, [3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 5.0, 5.0])["value"] == 3.25
    assert averages.level(kinds, [1.0] * 8) == {"value": 1.0, "interval_95": [1.0, 1.0], "of": 8}


@pytest.mark.parametrize("good", [0, 1, 5, 40, 64])
def test_intervals_of_shares_are_wilsons(good: int) -> None:
    """With equally many items of each kind the interval is Wilson's of all items, which has a width at 0 and 1, too."""
    share = averages.share([*KINDS] * 8, [True] * good + [False] * (64 - good))
    reference = binomtest(good, 64).proportion_ci(method="wilson")
    assert share["interval_95"] == pytest.approx([reference.low, reference.high], abs=1e-4)


@pytest.mark.parametrize("shares", [[0.02] * 8, [0.05] * 8, [0.0, 0.0, 0.75, 0.0, 0.25, 0.0, 0.0, 0.5]])
def test_intervals_hold_the_truth(shares: list[float]) -> None:
    """The interval of eight items of each kind holds the true share in at least 95 of 100 draws, also a small one."""
    rng, kinds, held = np.random.default_rng(0), [kind for kind in KINDS for _ in range(8)], 0
    for _ in range(500):
        low, high = averages.share(kinds, list(rng.random(64) < np.repeat(shares, 8)))["interval_95"]
        held += low <= np.mean(shares) <= high
    assert held >= 475


def test_differences_are_of_the_same_items() -> None:
    """Two methods are compared item by item; an item that only one of them has is left out."""
    kinds = {"a": "color", "b": "color", "c": "pose", "d": "pose"}
    gap = averages.difference(kinds, {"a": True, "b": False, "c": True}, {"a": False, "b": False, "d": True})
    assert gap is not None and gap["value"] == 0.5 and gap["of"] == 2
    assert averages.difference(kinds, {"a": True}, {"b": True}) is None


def test_intervals_of_differences_are_newcombes() -> None:
    """The interval is that of the example of Newcombe's paper: 36 items good twice, 12 and 2 once, none never. Two
    methods with one and the same good item may still differ."""
    names = [str(number) for number in range(50)]
    first, second = [True] * 48 + [False] * 2, [True] * 36 + [False] * 12 + [True] * 2

    def gap(one: list[bool], other: list[bool]) -> dict[str, Any]:
        found = averages.difference(
            dict.fromkeys(names, "color"), *(dict(zip(names, of, strict=True)) for of in (one, other))
        )
        assert found is not None
        return found

    assert gap(first, second) == {"value": 0.2, "interval_95": [0.0569, 0.3404], "of": 50}
    low, high = gap([True] + [False] * 49, [True] + [False] * 49)["interval_95"]
    assert low == -high < -0.02


def test_halves_and_groups_are_apart() -> None:
    """Figures are of one half and one group of kinds each: a fault in rigid edits of strangers shows there alone."""
    members = VALIDATION.items()
    verdicts = [
        replace(VERDICT, overlap=0.8 if i.half == STRANGERS else None, kept=i.half == KNOWN or i.kind != "floor")
        for i in members
    ]
    figures = edit_judge.by_half(members, verdicts)
    assert figures[KNOWN]["all"]["good"]["value"] == 1 and figures[KNOWN]["all"]["overlap"] is None
    strange = {name: part["good"]["value"] for name, part in figures[STRANGERS].items()}
    assert (strange["all"], strange["rigid"], strange["non_rigid"], strange["floor"]) == (0.875, 0.75, 1, 0)
    assert figures[STRANGERS]["all"]["overlap"]["value"] == 0.8


@pytest.mark.parametrize("processes", [1, 2])
def test_work_is_shared_in_order(processes: int) -> None:
    """Results are in the order of the items, for any distribution over processes; an error ends the run."""
    assert each(math.sqrt, [9.0, 4.0, 1.0], processes=processes, start=math.floor, args=(1.0,)) == [3.0, 2.0, 1.0]
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        each(math.sqrt, [4.0, -1.0], processes=processes, start=math.floor, args=(1.0,))


EARLIER = {"name": "demo", "sha256": dict.fromkeys(("text_encoder", "tokenizer", "unet", "vae"), "0" * 64)}
"""The model of a result with a bundled model that is no longer bundled."""


def fake_result(good: float, passes: int, **changes: Any) -> dict[str, Any]:
    """A result as `edit_quality` writes it, with that share of good items in each half."""
    results = [
        Judged(
            item,
            {
                eta: replace(VERDICT, kept=number // 2 < good * 8, overlap=0.9 if item.half == STRANGERS else None)
                for eta in (0.0, 0.8)
            },
            **{"reconstruction_db": 25.0, "photo_overlap": 0.7 if item.half == STRANGERS else None, "passes": passes},
            **{"train_s": 1.0, "sample_s": 3.0, "edit_bytes": 123456},
        )
        for number, item in enumerate(VALIDATION.items()[:16])
    ]
    figures = edit_quality.report(results, 0.8)
    return {**figures, "partial": False, "items": [result.as_json() for result in results], **changes}


def test_tables_say_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows hold the figures of the result files, goals are called missed where they are, and nothing is made up."""
    monkeypatch.setattr(quality_tables, "RESULTS", tmp_path)
    tables = (quality_tables.goals, quality_tables.curve, quality_tables.differences, quality_tables.ceiling)
    assert all(table() == quality_tables.NOTHING for table in tables)
    assert quality_tables.methods("test", KNOWN) == quality_tables.kinds("test", KNOWN) == quality_tables.NOTHING
    for name, result in {
        "balanced": fake_result(0.5, 360),
        "full-1e-4": fake_result(1.0, 1000),
        "fast": fake_result(1.0, 1, partial=True),
    }.items():
        (tmp_path / f"{edit_quality.result_name('test', name)}.json").write_text(json.dumps(result))
    [row] = [line for line in quality_tables.methods("test", STRANGERS) if "`balanced`" in line]
    assert "| 0.8 | 50 % (22-78) | " in row and "| 100 % | 0.90 | 20.0 dB | 25.0 dB (25) | 0.70 | 360 | 123 kB |" in row
    [row] = [line for line in quality_tables.methods("test", KNOWN) if "`balanced`" in line]
    assert "0.90" not in row and "| 20.0 dB | 25.0 dB (25) | 360 | 123 kB |" in row
    goals = "\n".join(quality_tables.goals())
    assert "less `full-1e-4` | at least +10 points, interval above 0 | -50.0 points (-78 to -7) (missed)" in goals
    assert "less `ddim-inversion` | at least +25 points, interval above 0 | not measured" in goals
    assert "| at least 60 % | 50 % (22-78) (missed) |" in goals and "0.700 (0.700-0.700) (missed)" in goals
    assert "360 of 1000 (missed)" in goals and "`fast`" not in goals
    assert quality_tables.differences()[2].startswith("| `balanced` less `full-1e-4` | -50.0 points")
    partial = tmp_path / f"{edit_quality.result_name('test', 'full-1e-4')}.json"
    whole = partial.read_text()
    partial.write_text(json.dumps(fake_result(1.0, 1000, partial=True)))
    assert "-50.0 points (-78 to -7) on 8 items (missed)" in "\n".join(quality_tables.goals())
    partial.write_text(json.dumps({"partial": True, "items": json.loads(whole)["items"]}))
    goals = "\n".join(quality_tables.goals())
    assert "less `full-1e-4` | at least +10 points, interval above 0 | not measured" in goals
    partial.write_text(whole)
    assert "`once` less `balanced` | at least -5 points | not measured" in goals
    once = tmp_path / f"{edit_quality.result_name('test', 'once')}.json"
    once.write_text(json.dumps(fake_result(0.25, 360, partial=True)))
    assert "less `balanced` | at least -5 points | -25.0 points (-54 to +13) on 8 items (missed)" in "\n".join(
        quality_tables.goals()
    )
    once.unlink()
    assert quality_tables.kinds("test", KNOWN)[2] == "| color | 100 % | 100 % |"
    assert quality_tables.curve()[2] == "| `full-1e-4` | known | 100 % | 100 % |"
    truth = fake_result(1.0, 0)["at_eta"]
    both = {"validation": {"ground_truth": truth}, "test": {"round_trip": truth, "drawn_anew": truth}}
    (tmp_path / "edit_ceiling.json").write_text(json.dumps(both))
    assert quality_tables.kinds("test", KNOWN)[2] == "| color | 100 % | 100 % | 100 % | 100 % |"
    good, half = "100 % (68-100); success 100 %", "50 % (22-78); success 100 %"
    assert quality_tables.ceiling()[2:] == [
        f"| the ground truth | {good} | {good} |  |  |",
        f"| the same through the autoencoder |  |  | {good} | {good} |",
        f"| the same with all that photo and sentence leave open drawn anew |  |  | {good} | {good} |",
        f"| `balanced`, as it is |  |  | {half} | {half} |",
    ]


def test_few_items_are_compared_where_all_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods whose items take minutes, and small models, stand beside others on the items that all of them have."""
    monkeypatch.setattr(quality_tables, "RESULTS", tmp_path)
    balanced, flow = fake_result(1.0, 360), fake_result(0.5, 240, partial=True)
    flow["items"] = [item for number, item in enumerate(flow["items"]) if number not in (0, 3)]
    for name, result in {"balanced": balanced, "flow": flow}.items():
        assert quality_tables.few(quality_tables.FAMILIES, quality_tables.WORLDS) == quality_tables.NOTHING
        (tmp_path / f"{edit_quality.result_name('validation', name)}.json").write_text(json.dumps(result))
    known, strangers = "7 of 7 | 7 of 7 |  | 25.0 dB | ", "7 of 7 | 7 of 7 | 0.90 | 25.0 dB | 0.70"
    assert quality_tables.few(quality_tables.FAMILIES, quality_tables.WORLDS)[2:] == [
        f"| the bundled model | known | 0.8 | 7 of 7 | 7 of 7 | 7 of 7 | {known} | 360 |",
        f"| the bundled model | strangers | 0.8 | 7 of 7 | 7 of 7 | 7 of 7 | {strangers} | 360 |",
        f"| a small FLUX.2 klein | known | 0.8 | 3 of 7 | 7 of 7 | 3 of 7 | {known} | 240 |",
        f"| a small FLUX.2 klein | strangers | 0.8 | 3 of 7 | 7 of 7 | 3 of 7 | {strangers} | 240 |",
    ]
    methods = quality_tables.few(("flow", "balanced", "source"))
    assert methods[0].startswith("| method | photos |") and methods[2].startswith("| `flow` | known | 0.8 | 3 of 7 |")


def test_small_models_are_told_by_what_they_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table has the shares of right attributes of each measured model, numbers of a few, and a gap without any."""
    monkeypatch.setattr(quality_tables, "RESULTS", tmp_path)
    one = {name: {"share": 0.75, "of": 40} for name in quality_tables.NAMES}
    one |= {"pose": None, "size": {"share": 0.75, "of": 8}}
    part = {"one_object": {"captions": 48, "attributes": one}}
    for name, result in {"demo_quality": {"samples": part}, "world_quality_flow": part}.items():
        assert quality_tables.drawing() == quality_tables.NOTHING
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    shares = "48 | 75 % | 75 % | 75 % | 6 of 8 | 75 % |  |"
    assert quality_tables.drawing()[2:] == [f"| the bundled model | {shares}", f"| a small FLUX.2 klein | {shares}"]


def test_plots_show_both_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are drawn from results of either set, equal results to equal files, and left alone without results. A plot
    over the size of the edit file needs two sizes."""
    monkeypatch.setattr(quality_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(quality_plots, "DOCS", tmp_path)
    quality_plots.main()
    assert not list(tmp_path.glob("*.png"))
    for items in ("validation", "test"):
        for method in ("balanced", "keep-all"):
            (tmp_path / f"{edit_quality.result_name(items, method)}.json").write_text(json.dumps(fake_result(0.5, 360)))
    quality_plots.main()
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(first) == {"quality_curves.png", "quality_sizes.png"}
    quality_plots.main()
    assert first == {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    """The bundled model in fp32."""
    return BaseModel.load("demo", device="cpu", weights="fp32")


@pytest.mark.parametrize(
    "name",
    [
        *("ours", "sourced", "packed", "full", "full-alike"),
        *("sdedit", "ddim-inversion", "semantic-guidance", "sentence-alone"),
    ],
)
def test_every_method_gives_a_picture_for_each_item_and_eta(name: str, base: BaseModel, oracle: Oracle) -> None:
    """A method's pictures can be judged and reported at every eta, and it leaves the base as it was."""
    full = partial(full_finetuning.full_finetune, 1e-4, embed_steps=2, steps=2, draws=2)
    alike = replace(preset("balanced").sample, num_inference_steps=2)
    method = {
        "ours": edit_methods.ours(WHOLE),
        "sourced": edit_methods.ours(SMALL, sourced=True),
        "packed": edit_methods.packed(SMALL, slots=2, together=2),
        "full": full(sampling=PLAIN),
        "full-alike": full(sampling=alike),
        "sdedit": training_free.sdedit(PLAIN),
        "ddim-inversion": training_free.ddim_inversion(SMALL.sample),
        "semantic-guidance": training_free.semantic_guidance(SMALL.sample),
        "sentence-alone": training_free.sentence_alone(SMALL.sample),
    }[name]
    before = {key: tensor.clone() for key, tensor in calls.unet(base).state_dict().items()}
    items, etas = VALIDATION.items()[:2], (0.0, 0.5, 1.0)
    photos = [item.photo_picture(base.sizes.own[0]) for item in items]
    sources = [item.source for item in items]
    outcome = method(base, photos, [item.sentence for item in items], etas, sources=sources)
    results = [edit_quality.judged(oracle, item, outcome.of(i), base) for i, item in enumerate(items)]
    verdicts = edit_quality.along_eta(results)
    assert all(torch.equal(tensor, before[key]) for key, tensor in calls.unet(base).state_dict().items())
    assert not any(parameter.requires_grad for parameter in calls.unet(base).parameters())
    assert outcome.passes == (8 if name in ("ours", "sourced", "packed", "full", "full-alike") else 0)
    assert set(verdicts) == set(etas) and all(len(found) == 2 for found in verdicts.values())
    result = edit_quality.report(results, edit_quality.best_eta(verdicts))
    assert result["eta"] in (0.5, 1.0)
    assert len(result["curve"]) == 3 and set(result["at_eta"]) == set(result["photo"]) == set(HALVES)
    assert [Judged.from_json(i, r.as_json()).as_json() for i, r in zip(items, results, strict=True)] == [
        r.as_json() for r in results
    ]
    pictures = {item.name: outcome.pictures[1.0][i] for i, item in enumerate(items)}
    assert isinstance(edit_quality.grid(results, pictures, 1.0), Image.Image)


def test_a_pack_gives_each_item_its_own_pictures(base: BaseModel) -> None:
    """At every eta a packed item's picture is that of the item made alone, to rounding, and not another's."""
    items, etas = VALIDATION.items()[:3], (0.0, 1.0)
    photos = [item.photo_picture(base.sizes.own[0]) for item in items]
    sentences = [item.sentence for item in items]
    alone = edit_methods.ours(SMALL)(base, photos, sentences, etas).pictures
    packed = edit_methods.packed(SMALL, slots=2, together=3)(base, photos, sentences, etas)
    for number in range(3):
        for eta, [picture] in packed.of(number).pictures.items():
            assert edit_judge.psnr_db(np.asarray(picture), np.asarray(alone[eta][number])) > 35


@pytest.mark.parametrize("lever", (*levers.LEVERS, levers.UNLIMITED), ids=lambda lever: lever.name)
def test_a_lever_changes_the_edit_and_nothing_after_it(
    lever: edit_methods.Lever, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that is tried changes the edited picture; one of sampling leaves the photo as it is; later edits are
    those of before."""
    # The first of few steps is not among the first fifth of the timesteps.
    monkeypatch.setattr(levers, "LATE", 0.6)
    item = item_of("color")
    photo = item.photo_picture(base.sizes.own[0])

    def made(**changes: Any) -> dict[float, Any]:
        return {
            eta: np.asarray(picture)
            for eta, [picture] in edit_methods.ours(WHOLE, **changes)(
                base, [photo], [item.sentence], (0.0, 1.0), sources=[item.source]
            ).pictures.items()
        }

    plain, changed, after = made(sourced=lever.sourced), made(lever=lever), made(sourced=lever.sourced)
    assert not np.array_equal(changed[1.0], plain[1.0])
    assert lever.trains or np.array_equal(changed[0.0], plain[0.0])
    assert np.array_equal(after[1.0], plain[1.0])


def test_photo_attention_gives_edited_pictures_the_photos_own(base: BaseModel) -> None:
    """With q, k and v of the photo, a picture's self-attention is the photo's; the row without text keeps its own."""
    step = [7.0]
    layer = next(m for m in calls.unet(base).modules() if isinstance(m, Attention) and not m.is_cross_attention)
    photo, empty, edited = torch.randn(3, 1, 16, layer.to_q.in_features, generator=torch.Generator().manual_seed(0))
    own = layer.processor
    attention = levers.PhotoAttention("qkv", step)
    with torch.no_grad():
        seen, alone = own(layer, photo), own(layer, empty)
        torch.testing.assert_close(attention(layer, photo), seen)
        both = attention(layer, torch.cat([empty, edited]))
        torch.testing.assert_close(both, torch.cat([alone, seen]))
        # At another step there is no photo yet.
        step[:] = [8.0]
        both = attention(layer, torch.cat([empty, edited]))
        torch.testing.assert_close(both, torch.cat([alone, own(layer, edited)]))


def test_mixed_texts_are_between_the_photo_and_the_sentence_or_empty(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 2 sees e_opt, points on its way to e_tgt, and the empty text; stage 1 sees its own text alone."""
    optimized = torch.zeros(1, 32, 128)
    target, empty = calls.encode_text(base, ["a photo of a red cube on a stone floor", ""])
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(base, "predict", lambda denoiser, x, at, given: seen.extend(given["embeds"]))
    with levers.mixed_texts(base, "a photo of a red cube on a stone floor", ""):
        for text in (optimized.expand(64, -1, -1), optimized.clone().requires_grad_()):
            base.predict(base.denoisers[0], torch.zeros(1), torch.zeros(1), Conditioning({"embeds": text}))
    assert not seen.pop().any()
    shares = [float((text * target).sum() / target.square().sum()) for text in seen]
    kinds = [
        "empty" if torch.equal(text, empty) else "mixed" if share and torch.allclose(text, share * target) else "own"
        for text, share in zip(seen, shares, strict=True)
    ]
    assert all(text.any() == (kind != "own") for text, kind in zip(seen, kinds, strict=True))
    assert all(0 < share < 1 for share, kind in zip(shares, kinds, strict=True) if kind == "mixed")
    assert 16 < kinds.count("mixed") < 36 and 4 < kinds.count("empty") < 24


def test_the_difference_to_a_source_prompt_is_changed_in_pictures_that_have_it_alone(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`source-late` has no difference in the first fifth of the steps, and the whole one later; `source-empty` takes
    the difference to the empty text at every step. Batches without a source prompt, and photos, are left alone."""
    first, second, empty = calls.encode_text(base, ["a red cube", "a blue cube", ""])
    texts = torch.stack([first, first, second, second, empty, empty])
    pictures = torch.randn(2, 20, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(base, "predict", lambda denoiser, x, at, given: given["embeds"])

    def predicted(lever: Any, x: torch.Tensor, at: float) -> torch.Tensor:
        with lever(base, "a blue cube", "a red cube"):
            found = base.predict(base.denoisers[0], x, torch.full((len(x),), at), Conditioning({"embeds": texts}))
        return found  # type: ignore[no-any-return]

    sourced, others = pictures.repeat(3, 1, 1, 1), torch.cat([pictures, pictures, pictures.flip(0)])
    changed = torch.stack([first, first, empty, empty, empty, empty])
    assert torch.equal(predicted(levers.late_difference, sourced, 999.0), changed)
    assert torch.equal(predicted(levers.late_difference, sourced, 799.0), texts)
    texts = torch.stack([first, first, first, first, second, second])
    changed = torch.stack([first, first, first, first, empty, empty])
    for at in (999.0, 0.0):
        assert torch.allclose(predicted(levers.empty_source, sourced, at), changed)
    for lever in (levers.late_difference, levers.empty_source):
        assert torch.equal(predicted(lever, others, 999.0), texts)
        assert levers.sourced_pictures(pictures) == 0


def test_the_difference_of_embeddings_adds_no_more_than_the_change(base: BaseModel) -> None:
    """`embedding-difference` goes from e_opt by eta times the difference of sentence and source prompt, and nowhere if
    they are the same."""
    source, target = calls.encode_text(base, ["a photo of a red cube", "a photo of a blue cube"]).split(1)
    optimized, eta = torch.randn_like(source), torch.tensor(0.7)
    with levers.embedding_difference(base, "a photo of a blue cube", "a photo of a red cube"):
        torch.testing.assert_close(PATHS["linear"](target, optimized, eta), optimized + eta * (target - source))
        torch.testing.assert_close(PATHS["linear"](source, optimized, eta), optimized)
    assert not torch.allclose(PATHS["linear"](source, optimized, eta), optimized)


def test_a_source_prompt_may_be_the_bases_own_description(base: BaseModel) -> None:
    """`describes` renders with the base's description of the photo, whatever sources the protocol has."""
    item = item_of("color")
    photo = item.photo_picture(base.sizes.own[0])

    def edited(source: str, **changes: Any) -> Any:
        method = edit_methods.ours(SMALL, **changes)
        [picture] = method(base, [photo], [item.sentence], (1.0,), sources=[source]).pictures[1.0]
        return np.asarray(picture)

    told = edited(edit_methods.described(base, photo), sourced=True)
    assert np.array_equal(edited("", describes=True), told)
    assert not np.array_equal(edited("a photo of a white cone", sourced=True), told)


def test_fireflow_is_closer_to_the_exact_flow_than_ddim(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """For Gaussian data, whose flow is known in closed form, FireFlow's noise has a tenth of DDIM inversion's error."""
    spread, latents = 0.5, torch.randn(20, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.5
    schedule: Any = base.denoisers[0].schedule
    alpha = schedule.alpha_bar.double()

    def predict(denoiser: Any, x: torch.Tensor, at: torch.Tensor, given: Any) -> torch.Tensor:
        signal = torch.from_numpy(np.interp(float(at[0]), np.arange(len(alpha)), alpha.numpy()).reshape(1))
        return (x * (1 - signal).sqrt() / (signal * spread**2 + 1 - signal)).float()

    monkeypatch.setattr(base, "predict", predict)
    signal, first = alpha[-1], alpha[0]
    grown = ((signal * spread**2 + 1 - signal) / (first * spread**2 + 1 - first)).sqrt()
    exact = (latents * grown - signal.sqrt() * latents) / (1 - signal).sqrt()
    errors = {}
    for name, way in (("fireflow", own_noise.fireflow), ("ddim", own_noise.ddim)):
        found = way(0.0)(base, base.denoisers[0], latents, torch.Generator().manual_seed(0))
        errors[name] = float((found - exact).square().mean().sqrt())
    assert errors["fireflow"] < errors["ddim"] / 10 and errors["fireflow"] < 0.01


def test_the_ceiling_is_the_ground_truths(base: BaseModel, oracle: Oracle) -> None:
    """The ground truth counts as done and kept wherever the judge reads it right; its round trip is the base's own."""
    items = VALIDATION.items()[:4]
    found = ceiling.ceiling(base, oracle, items)
    for part in found.values():
        missed = sum(2 * (1 - part[half]["all"]["good"]["value"]) for half in HALVES)
        assert missed == pytest.approx(len(part["not_good"]), abs=1e-3)
    assert found["ground_truth"][KNOWN]["all"]["success"]["value"] == 1.0
    assert found["ground_truth"][STRANGERS]["all"]["overlap"]["value"] == 1.0
    # The photos as they are: nothing done.
    photos = [item.photo_picture(PX) for item in items]
    judged = ceiling.judged(oracle, items, photos)
    assert judged[KNOWN]["all"]["success"]["value"] == 0.0


def test_another_right_answer_differs_where_nobody_is_told() -> None:
    """Drawn anew are the direction of a new pose or of sides that the photo has not, the size that a word stands for, a
    second object, and a new floor's texture; what the sentence names or the photo shows stays."""
    free = {
        "pose": {"rotation"},
        "size": {"jitter"},
        "add": {"added"},
        "floor": {"texture_seed"},
        "shape": {"rotation"},
        "two": {"rotation", "texture_seed"},
    }
    drawn: dict[str, set[str]] = {}
    for item in [*VALIDATION.items(), *TEST.items()]:
        anew = ceiling.drawn_anew(item)
        assert replace(item, edited=anew).sentence == item.sentence
        (own, *added), (old, *old_added) = anew.objects, item.edited.objects
        changed = {name for name in ("rotation", "jitter") if getattr(own, name) != getattr(old, name)}
        changed |= {"added"} if added != old_added else set()
        changed |= {"texture_seed"} if anew.texture_seed != item.edited.texture_seed else set()
        assert changed <= free.get(item.kind, set())
        if item.half == STRANGERS and item.kind != "pose":
            assert "rotation" not in changed
        drawn[item.kind] = drawn.get(item.kind, set()) | changed
        same = replace(own, rotation=old.rotation, jitter=old.jitter), *old_added
        assert replace(anew, objects=same, texture_seed=item.edited.texture_seed) == item.edited
    assert {kind: names for kind, names in drawn.items() if names} == free


def test_told_where_an_edit_keeps_to_the_mask_it_is_given(
    base: BaseModel, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ground truth's mask holds all that it changes; edits told where leave the rest, whatever their eta."""
    items, side = VALIDATION.items()[:16:2], base.sizes.own[0]
    for item in items:
        mask = ceiling.truth_mask(base, item)
        assert mask.shape == (1, *base.family.latent_shape[1:]) and mask.any()
        photo, truth = (np.asarray(p, np.int16) for p in (item.photo_picture(side), item.truth_picture(side)))
        outside = np.kron(mask[0].numpy(), np.ones([side // mask.shape[-1]] * 2)) == 0
        assert abs(photo - truth).max(-1)[outside].max(initial=0) <= SAME_LEVELS
    monkeypatch.setattr(ceiling, "truth_mask", lambda base, item: torch.zeros(1, *base.family.latent_shape[1:]))
    masked = replace(SMALL, sample=replace(SMALL.sample, mask=0.6))
    for in_full in (False, True):
        found = ceiling.told(base, oracle, items[:1], masked, None, where=True, in_full=in_full)
        assert len({verdict.truth_db for [verdict] in found.values()}) == 1
    found = ceiling.told(base, oracle, items[:1], masked, None, where=False, in_full=False)
    assert len({verdict.truth_db for [verdict] in found.values()}) == len(ceiling.ETAS)


def test_a_sentence_in_full_names_size_and_material() -> None:
    """Said in full, a sentence describes the whole ground truth; otherwise it leaves open what it does not change."""
    for item in VALIDATION.items():
        assert replace(item, in_full=True).sentence == item.edited.caption()
    shape = item_of("shape")
    assert shape.edited.objects[0].material not in shape.sentence.split()


def run_quality(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`edit_quality`'s command line on a small method of this package."""
    monkeypatch.setattr(edit_quality, "compared", lambda work=None: {"balanced": edit_methods.ours(SMALL)})
    monkeypatch.setattr(sys, "argv", ["edit_quality", "--method", "balanced", "--device", "cpu", *arguments])
    return edit_quality.main()


def test_a_stopped_comparison_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result keeps its items when it is resumed, counts every run, and is never replaced or mixed unasked."""
    path = tmp_path / "result.json"
    assert run_quality(monkeypatch, "--items", "1", "--out", str(path)) == 0
    first = json.loads(path.read_text())
    assert first["partial"] and first["earlier_runs"] == []
    assert run_quality(monkeypatch, "--items", "2", "--out", str(path)) == 2
    assert "--resume" in capsys.readouterr().err
    assert run_quality(monkeypatch, "--items", "2", "--out", str(path), "--resume") == 0
    second = json.loads(path.read_text())
    assert second["items"][0] == first["items"][0] and len(second["items"]) == 2
    assert second["earlier_runs"] == [first["provenance"]]
    path.write_text(json.dumps({**second, "figures": "of an older version", "at_eta": {}}))
    assert run_quality(monkeypatch, "--items", "2", "--out", str(path), "--resume") == 0
    again = json.loads(path.read_text())
    for rounded in ("cost", "photo"):
        assert again.pop(rounded).keys() == second[rounded].keys()
    assert again == {name: second[name] for name in again} and again["at_eta"], "its figures anew, and no further run"
    path.write_text(json.dumps({**second, "settings": {}}))
    assert run_quality(monkeypatch, "--items", "2", "--out", str(path), "--resume") == 2
    assert "other settings" in capsys.readouterr().err
    del second["items"][0]["verdicts"]["1.2"]
    path.write_text(json.dumps(second))
    assert run_quality(monkeypatch, "--items", "2", "--out", str(path), "--resume") == 2
    assert "other etas" in capsys.readouterr().err


@pytest.mark.parametrize("method", [training_free.sdedit, training_free.ddim_inversion])
def test_no_steps_give_the_photo_back(method: Any, base: BaseModel) -> None:
    """Methods without training give the photo's round trip through the autoencoder at 0, and another picture at 1."""
    photo = item_of("color").photo_picture(base.sizes.own[0])
    config = replace(SMALL.sample, num_inference_steps=10)
    made = method(config)(base, [photo], [item_of("color").sentence], (0.0, 1.0)).pictures
    distances = [edit_judge.psnr_db(np.asarray(made[eta][0]), np.asarray(photo)) for eta in (0.0, 1.0)]
    assert distances[0] > 25 and distances[1] < distances[0] - 3


def test_inversion_comes_back(base: BaseModel) -> None:
    """A photo inverted and denoised without text or guidance is nearly the photo: the inversion is of that sampler."""
    photo = item_of("color").photo_picture(base.sizes.own[0])
    config = replace(SMALL.sample, num_inference_steps=40, guidance_scale=1.0)
    made = training_free.ddim_inversion(config)(base, [photo], [""], (0.0, 0.7)).pictures
    assert edit_judge.psnr_db(np.asarray(made[0.7][0]), np.asarray(made[0.0][0])) > 25


def test_semantic_guidance_is_the_difference_of_two_sentences(base: BaseModel) -> None:
    """With a source prompt equal to the sentence every eta is as eta 0; others change it, and more at a larger one."""
    item = item_of("color")
    photo, method = item.photo_picture(base.sizes.own[0]), training_free.semantic_guidance(SMALL.sample)

    def made(source: str) -> list[np.ndarray]:
        pictures = method(base, [photo], [item.sentence], (0.0, 0.5, 1.0), sources=[source]).pictures
        return [np.asarray(pictures[eta][0]) for eta in (0.0, 0.5, 1.0)]

    same, other = made(item.sentence), made(item.source)
    # Rows that several threads share out are rounded apart.
    assert max(np.abs(picture.astype(int) - same[0]).max() for picture in same) <= 1
    changes = [edit_judge.psnr_db(picture, other[0]) for picture in other[1:]]
    assert changes[1] < changes[0] < 60


def test_kept_edits_are_not_trained_again(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits in a folder are rendered without training, for any settings of sampling; other training settings train."""
    item = item_of("color")
    photos, sentences = [item.photo_picture(base.sizes.own[0])], [item.sentence]
    runs: list[int] = []
    train = edit_methods.make_edits
    monkeypatch.setattr(edit_methods, "make_edits", lambda b, jobs, c: runs.append(len(jobs)) or train(b, jobs, c))

    def run(**changes: Any) -> edit_methods.Outcome:
        config = replace(SMALL, **changes)
        return edit_methods.ours(config, edits=tmp_path)(base, photos, sentences, (0.5,))

    first, again = run(), run()
    other = run(sample=replace(SMALL.sample, strength=0.5))
    assert runs == [1]
    assert [p.tobytes() for p in first.pictures[0.5]] == [p.tobytes() for p in again.pictures[0.5]]
    assert [p.tobytes() for p in first.pictures[0.5]] != [p.tobytes() for p in other.pictures[0.5]]
    assert first.train_s == again.train_s and first.edit_bytes == other.edit_bytes
    less = run(finetune=replace(SMALL.finetune, keep=0.02))
    assert runs == [1] and less.edit_bytes[0] < 0.7 * first.edit_bytes[0]
    run(finetune=replace(SMALL.finetune, lora_rank=2))
    assert runs == [1, 1]


def test_edits_of_a_changed_engine_are_kept_apart(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lever that changes training trains edits of its own, and others if its numbers change; one of sampling shares
    the edits that are there."""
    item, runs = item_of("color"), list[int]()
    train = edit_methods.make_edits
    monkeypatch.setattr(edit_methods, "make_edits", lambda b, jobs, c: runs.append(len(jobs)) or train(b, jobs, c))
    of = {lever.name: lever for lever in levers.LEVERS}
    softened = of["second-order-softened"]
    harder = replace(softened, settings={"softening": 0.5})
    for lever, trainings in ((None, 1), (of["source-limit-1"], 1), (softened, 2), (softened, 2), (harder, 3)):
        method = edit_methods.ours(SMALL, edits=tmp_path, lever=lever)
        method(base, [item.photo_picture(base.sizes.own[0])], [item.sentence], (0.5,), sources=[item.source])
        assert len(runs) == trainings, lever


def test_kept_full_finetuning_goes_on(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full fine-tuning takes finished items from its folder: the same pictures and seconds, and the base untouched."""
    item = item_of("color")
    photos, sentences = [item.photo_picture(base.sizes.own[0])], [item.sentence]

    def run(rate: float, folder: Path | None) -> edit_methods.Outcome:
        kept = {"embed_steps": 1, "steps": 1, "draws": 1, "sampling": PLAIN, "folder": folder}
        return full_finetuning.full_finetune(rate, **kept)(base, photos, sentences, (0.0, 1.0))

    first = run(1e-3, tmp_path)
    monkeypatch.setattr(full_finetuning, "Trainer", None)
    again, other = run(1e-3, tmp_path), run(1e-2, tmp_path)
    assert first.pictures[1.0][0].tobytes() == again.pictures[1.0][0].tobytes() != other.pictures[1.0][0].tobytes()
    assert first.train_s == pytest.approx(again.train_s)
    monkeypatch.undo()
    assert run(1e-3, None).pictures[1.0][0].tobytes() == first.pictures[1.0][0].tobytes()


def test_every_method_has_settings_of_its_own() -> None:
    """No two methods of this package, or of full fine-tuning, have the same settings: each is measured once."""
    elsewhere = {"balanced-fp32", "cascade"}  # as `balanced`, on another base
    untrained = {"sdedit", "ddim-inversion", "sentence-alone"}
    methods = {name: method.settings for name, method in compared.compared().items()}
    assert elsewhere | untrained | set(compared.FULL_RATES) < set(methods)
    for name in methods.keys() - elsewhere - untrained:
        assert {other for other in methods if methods[other] == methods[name]} - elsewhere == {name}


def test_a_partial_run_chooses_no_eta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eta of the test set is a whole validation run's with the present model; any other run counts as none."""
    monkeypatch.setattr(edit_quality, "RESULTS", tmp_path)
    path = tmp_path / f"{edit_quality.result_name('validation', 'balanced')}.json"
    for run in ({"partial": True}, {"partial": False, "model": EARLIER}):
        path.write_text(json.dumps({"eta": 0.8, **run}))
        with pytest.raises(FileNotFoundError, match="edit_quality_validation_balanced"):
            edit_quality.chosen_eta("balanced")
    path.write_text(json.dumps({"eta": 0.8, "partial": False}))
    assert edit_quality.chosen_eta("balanced") == 0.8


def test_results_of_an_earlier_bundled_model_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables have no figures of a bundled model that is no longer bundled, and name the methods that lack newer ones.
    Results of the bundled model itself, and of other models, stay."""
    monkeypatch.setattr(quality_tables, "RESULTS", tmp_path)
    present = model_of(BaseModel.load("demo"))
    of = {"balanced": present, "fast": EARLIER, "cascade": {**EARLIER, "name": "IF-I-world"}}
    for name, model in of.items():
        path = tmp_path / f"{edit_quality.result_name('validation', name)}.json"
        path.write_text(json.dumps(fake_result(0.5, 360, model=model)))
    table = quality_tables.methods("validation", KNOWN)
    assert [row.split("`")[1] for row in table if row.startswith("| `")] == ["balanced", "cascade"]
    assert table[-1].endswith("left out: `fast`.")
    assert quality_tables.few(["balanced", "fast"])[:1] == quality_tables.NOTHING
    assert "`fast`" not in "\n".join(quality_tables.goals("validation"))
    (tmp_path / f"{edit_quality.result_name('test', 'balanced')}.json").write_text(
        json.dumps(fake_result(0.5, 360, model=present, eta=0.6))
    )
    # Validation chooses 0.8 by now.
    assert quality_tables.methods("test", KNOWN)[:1] == quality_tables.NOTHING
