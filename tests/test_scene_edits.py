"""Facts about the benchmark of edits: its items, its verdicts and its methods are what they say."""

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
from PIL import Image

from benchmarks import (
    ceiling,
    compared,
    edit_judge,
    edit_methods,
    edit_quality,
    full_finetuning,
    quality_tables,
    suggestion,
    training_free,
)
from benchmarks.oracle import Attributes, Oracle
from benchmarks.scene_edits import KINDS, SAME_LEVELS, TEST, VALIDATION, SceneEdit
from benchmarks.workers import each
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.sampling.suggestion import EtaScore, Suggestion
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.settings.stages import SampleConfig
from tests import calls

pytestmark = pytest.mark.benchmark

PX = 64
ITEMS = VALIDATION.items()
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
def photos() -> list[Image.Image]:
    """Photos of all items."""
    return [item.photo_picture(PX) for item in ITEMS]


@pytest.fixture(scope="module")
def truths() -> list[Image.Image]:
    """Ground truths of all items."""
    return [item.truth_picture(PX) for item in ITEMS]


def item_of(kind: str, number: int = 0) -> SceneEdit:
    """An item of the validation set."""
    return [item for item in ITEMS if item.kind == kind][number]


def test_sets_are_disjoint_and_every_kind_has_its_share() -> None:
    """32 validation and 128 test items, no scene in both, each kind an eighth of each."""
    test = TEST.items()
    assert (len(ITEMS), len(test)) == (32, 128)
    assert not {item.photo for item in ITEMS} & {item.photo for item in test}
    for items in (ITEMS, test):
        assert {kind: sum(i.kind == kind for i in items) for kind in KINDS} == dict.fromkeys(KINDS, len(items) // 8)
    assert [item.kind for item in test[:8]] == list(KINDS)


def test_items_are_fixed() -> None:
    """The same items are drawn again, in another process and another year."""
    assert VALIDATION.items() == ITEMS
    assert [item.sentence for item in ITEMS[:3]] == [
        "a photo of a lying red cone on a grass floor",
        "a photo of a black sphere on a grass floor",
        "a photo of a purple metal cone on a stone floor",
    ]


def test_only_what_is_asked_changes() -> None:
    """Photo and ground truth differ in the attributes asked for and in nothing else, and the sentence names them."""
    for item in [*ITEMS, *TEST.items()]:
        before, after = item.photo, item.edited
        assert replace(before, objects=after.objects, floor=after.floor) == after
        names = ["floor"] * (before.floor != after.floor)
        fields = ("shape", "color", "material", "size")
        names += [n for n in fields if getattr(before.objects[0], n) != getattr(after.objects[0], n)]
        if before.objects[0].pose != after.objects[0].pose and "shape" not in names:
            names.append("pose")
        assert set(names) == set(item.asked)
        assert (len(after.objects) == 2) == (item.kind == "add")
        for name in item.asked:
            assert (after.floor if name == "floor" else getattr(after.objects[0], name)) in item.sentence.split()


def test_what_must_be_kept_is_the_same_in_the_ground_truth(
    photos: list[Image.Image], truths: list[Image.Image]
) -> None:
    """Where an edit must leave the photo alone, ground truth and photo agree above the limit for every item."""
    for item, *pictures in zip(ITEMS, photos, truths, strict=True):
        mask = item.kept_mask(PX)
        assert mask.mean() > 0.01
        photo, truth = map(np.asarray, pictures)
        assert edit_judge.psnr_db(photo[mask], truth[mask]) > edit_judge.BACKGROUND_DB


def test_ground_truth_is_good_and_the_photo_is_not(
    oracle: Oracle, photos: list[Image.Image], truths: list[Image.Image]
) -> None:
    """Nine in ten ground-truth renders are called good; the unchanged photo never, though it keeps its background."""
    truth = edit_judge.judge(oracle, ITEMS, truths)
    assert np.mean([verdict.good for verdict in truth]) >= 0.9
    assert all(verdict.truth_db == 99 and verdict.truth_ssim == pytest.approx(1) for verdict in truth)
    unchanged = edit_judge.judge(oracle, ITEMS, photos)
    assert not any(verdict.success for item, verdict in zip(ITEMS, unchanged, strict=True) if item.kind != "add")
    assert all(verdict.background_db == 99 for verdict in unchanged)


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
    """A colour edit succeeds by its colour alone, and keeps by everything else."""
    item = item_of("color")
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


def test_bootstrap_intervals_hold_the_value() -> None:
    """A share's interval holds it, is the same each time, and is a point when all items agree."""
    verdict = edit_judge.Verdict(success=True, kept=True, background_db=30, truth_db=20, truth_ssim=0.5)
    mixed = [verdict] * 6 + [replace(verdict, success=False)] * 2
    share = edit_judge.bootstrap([v.good for v in mixed])
    assert share["value"] == 0.75 and share == edit_judge.bootstrap([v.good for v in mixed])
    assert share["interval_95"][0] < 0.75 < share["interval_95"][1] <= 1
    assert edit_judge.bootstrap([verdict.good] * 4)["interval_95"] == [1, 1]


def test_differences_are_of_the_same_items() -> None:
    """Two methods are compared item by item; an item that only one of them has is left out."""
    gap = edit_judge.difference({"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 0.0, "b": 0.0, "d": 1.0})
    assert gap["value"] == 0.5 and gap["of"] == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_work_is_shared_in_order(processes: int) -> None:
    """Results are in the order of the items, for any distribution over processes; an error ends the run."""
    assert each(math.sqrt, [9.0, 4.0, 1.0], processes=processes, start=math.floor, args=(1.0,)) == [3.0, 2.0, 1.0]
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        each(math.sqrt, [4.0, -1.0], processes=processes, start=math.floor, args=(1.0,))


def fake_result(good: list[bool], passes: int) -> dict[str, Any]:
    """A result as `edit_quality` writes it, with one item of a main kind for each of `good`."""
    verdict = edit_judge.Verdict(success=True, kept=True, background_db=30, truth_db=20, truth_ssim=0.5)
    verdicts = [verdict if each_good else replace(verdict, kept=False) for each_good in good]
    found = edit_judge.summary(verdicts)
    return {
        "eta": 0.8,
        "at_eta": {quality_tables.MAIN: found, "by_kind": dict.fromkeys(KINDS, found)},
        "reconstruction_db": edit_judge.bootstrap([23.0, 25.0, 27.0], median=True),
        "curve": [{"eta": 0.0}, {"eta": 0.8}],
        "cost": {"passes": passes, "train_s": 1.0, "sample_s_per_picture": 3.0, "edit_bytes_mean": 123456},
        "items": [{"name": f"color-{number}", "verdicts": {"0.8": v.as_json()}} for number, v in enumerate(verdicts)],
    }


def test_tables_say_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows hold the figures of the result files, goals are called missed where they are, and nothing is made up."""
    monkeypatch.setattr(quality_tables, "RESULTS", tmp_path)
    assert quality_tables.test() == quality_tables.goals() == quality_tables.by_kind() == quality_tables.NOTHING
    for name, good, passes in (("balanced", [True, True, False, False], 360), ("full-1e-4", [True] * 4, 1000)):
        path = tmp_path / f"{edit_quality.result_name('test', name)}.json"
        path.write_text(json.dumps(fake_result(good, passes)))
    monkeypatch.setattr(quality_tables, "FULL", "full-1e-4")
    [row] = [line for line in quality_tables.test() if "`balanced`" in line]
    assert "| 4 test | 0.8 | 50 % (" in row and "| 25.0 dB | 360 | 7 | 123 kB |" in row
    goals = "\n".join(quality_tables.goals())
    assert "50 % (0-100) (missed)" in goals and "-50.0 points" in goals and "25.0 dB |" in goals
    assert "360 of 1000 (missed)" in goals and "`fast`" not in goals


@pytest.fixture(scope="module")
def base() -> BaseModel:
    """The bundled model in fp32."""
    return BaseModel.load("demo", device="cpu", weights="fp32")


@pytest.mark.parametrize("name", ["ours", "packed", "full", "full-alike", "sdedit", "ddim-inversion", "sentence-alone"])
def test_every_method_gives_a_picture_for_each_item_and_eta(name: str, base: BaseModel, oracle: Oracle) -> None:
    """A method's pictures can be judged and reported at every eta, and it leaves the base as it was."""
    full = partial(full_finetuning.full_finetune, 1e-4, embed_steps=2, steps=2, draws=2)
    alike = replace(preset("balanced").sample, num_inference_steps=2)
    method = {
        "ours": edit_methods.ours(WHOLE),
        "packed": edit_methods.packed(SMALL, slots=2, together=2),
        "full": full(sampling=PLAIN),
        "full-alike": full(sampling=alike),
        "sdedit": training_free.sdedit(PLAIN),
        "ddim-inversion": training_free.ddim_inversion(SMALL.sample),
        "sentence-alone": training_free.sentence_alone(SMALL.sample),
    }[name]
    before = {key: tensor.clone() for key, tensor in calls.unet(base).state_dict().items()}
    items, etas = ITEMS[:2], (0.0, 0.5, 1.0)
    outcome = method(base, [item.photo_picture(PX) for item in items], [item.sentence for item in items], etas)
    results = [edit_quality.judged(oracle, item, outcome.of(i), base) for i, item in enumerate(items)]
    verdicts = edit_quality.along_eta(results)
    assert all(torch.equal(tensor, before[key]) for key, tensor in calls.unet(base).state_dict().items())
    assert not any(parameter.requires_grad for parameter in calls.unet(base).parameters())
    assert outcome.passes == (8 if name in ("ours", "packed", "full", "full-alike") else 0)
    assert set(verdicts) == set(etas) and all(len(found) == 2 for found in verdicts.values())
    result = edit_quality.report(results, edit_quality.best_eta(items, verdicts))
    assert result["eta"] in (0.5, 1.0)
    assert len(result["curve"]) == 3 and len(result["items"]) == 2
    pictures = {item.name: outcome.pictures[1.0][i] for i, item in enumerate(items)}
    assert isinstance(edit_quality.grid(results, pictures, 1.0), Image.Image)


def test_a_pack_gives_each_item_its_own_pictures(base: BaseModel) -> None:
    """At every eta a packed item's picture is that of the item made alone, to rounding, and not another's."""
    items, etas = ITEMS[:3], (0.0, 1.0)
    photos, sentences = [item.photo_picture(PX) for item in items], [item.sentence for item in items]
    alone = edit_methods.ours(SMALL)(base, photos, sentences, etas).pictures
    packed = edit_methods.packed(SMALL, slots=2, together=3)(base, photos, sentences, etas)
    for number in range(3):
        for eta, [picture] in packed.of(number).pictures.items():
            assert edit_judge.psnr_db(np.asarray(picture), np.asarray(alone[eta][number])) > 35


def test_the_ceiling_is_the_ground_truths(base: BaseModel, oracle: Oracle) -> None:
    """The ground truth counts as done and kept wherever the judge reads it right; its round trip is the base's own."""
    found = ceiling.ceiling(base, oracle, ITEMS[:3])
    assert found["ground_truth"]["good"]["of"] == 3
    for share in found.values():
        assert share["good"]["value"] == pytest.approx(1 - len(share["not_good"]) / 3, abs=1e-3)
    assert found["ground_truth"]["success"]["value"] == 1.0
    # The photos as they are: nothing done.
    photos = [item.photo_picture(PX) for item in ITEMS[:3]]
    assert ceiling.judged(oracle, ITEMS[:3], photos)["success"]["value"] == 0.0


def test_told_where_an_edit_keeps_to_the_mask_it_is_given(
    base: BaseModel, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ground truth's mask holds all that it changes; edits told where leave the rest, whatever their eta."""
    for item in ITEMS[:8]:
        mask = ceiling.truth_mask(base, item)
        assert mask.shape == (1, *base.family.latent_shape[1:]) and mask.any()
        photo, truth = (np.asarray(p, np.int16) for p in (item.photo_picture(PX), item.truth_picture(PX)))
        outside = np.kron(mask[0].numpy(), np.ones([PX // mask.shape[-1]] * 2)) == 0
        assert abs(photo - truth).max(-1)[outside].max(initial=0) <= SAME_LEVELS
    monkeypatch.setattr(ceiling, "truth_mask", lambda base, item: torch.zeros(1, *base.family.latent_shape[1:]))
    masked = replace(SMALL, sample=replace(SMALL.sample, mask=0.6))
    for in_full in (False, True):
        found = ceiling.told(base, oracle, ITEMS[:1], masked, None, where=True, in_full=in_full)
        assert len({verdict.truth_db for [verdict] in found.values()}) == 1
    found = ceiling.told(base, oracle, ITEMS[:1], masked, None, where=False, in_full=False)
    assert len({verdict.truth_db for [verdict] in found.values()}) == len(ceiling.ETAS)


def test_a_sentence_in_full_names_size_and_material() -> None:
    """Said in full, a sentence describes the whole ground truth; otherwise it leaves open what it does not change."""
    for item in ITEMS:
        assert replace(item, in_full=True).sentence == item.edited.caption()
    shape = next(item for item in ITEMS if item.kind == "shape")
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
    path.write_text(json.dumps({**second, "settings": {}}))
    assert run_quality(monkeypatch, "--items", "2", "--out", str(path), "--resume") == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("method", [training_free.sdedit, training_free.ddim_inversion])
def test_no_steps_give_the_photo_back(method: Any, base: BaseModel) -> None:
    """Methods without training give the photo's round trip through the autoencoder at 0, and another picture at 1."""
    photo = ITEMS[0].photo_picture(PX)
    config = replace(SMALL.sample, num_inference_steps=10)
    made = method(config)(base, [photo], [ITEMS[0].sentence], (0.0, 1.0)).pictures
    distances = [edit_judge.psnr_db(np.asarray(made[eta][0]), np.asarray(photo)) for eta in (0.0, 1.0)]
    assert distances[0] > 25 and distances[1] < distances[0] - 3


def test_inversion_comes_back(base: BaseModel) -> None:
    """A photo inverted and denoised without text or guidance is nearly the photo: the inversion is of that sampler."""
    photo = ITEMS[0].photo_picture(PX)
    config = replace(SMALL.sample, num_inference_steps=40, guidance_scale=1.0)
    made = training_free.ddim_inversion(config)(base, [photo], [""], (0.0, 0.7)).pictures
    assert edit_judge.psnr_db(np.asarray(made[0.7][0]), np.asarray(made[0.0][0])) > 25


def test_kept_edits_are_not_trained_again(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits in a folder are rendered without training, for any settings of sampling; other training settings train."""
    photos, sentences = [ITEMS[0].photo_picture(PX)], [ITEMS[0].sentence]
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


def test_kept_full_finetuning_goes_on(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full fine-tuning takes finished items from its folder: the same pictures and seconds, and the base untouched."""
    photos, sentences = [ITEMS[0].photo_picture(PX)], [ITEMS[0].sentence]

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


def test_variants_differ_from_balanced(tmp_path: Path) -> None:
    """Every variant's name stands for settings other than those of `balanced`."""
    balanced = preset("balanced")
    assert set(compared.FULL_RATES) < set(compared.compared())
    for name, values in {**compared._TRAINING, **{n: {"sample": v} for n, v in compared._SAMPLING.items()}}.items():
        assert preset("balanced", values) != balanced, name


def test_a_partial_run_chooses_no_eta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eta of the test set is a whole validation run's; a partial one counts as none."""
    monkeypatch.setattr(edit_quality, "RESULTS", tmp_path)
    path = tmp_path / f"{edit_quality.result_name('validation', 'balanced')}.json"
    path.write_text(json.dumps({"eta": 0.8, "partial": True}))
    with pytest.raises(FileNotFoundError, match="partial"):
        edit_quality.chosen_eta("balanced")
    path.write_text(json.dumps({"eta": 0.8, "partial": False}))
    assert edit_quality.chosen_eta("balanced") == 0.8


def test_suggestions_are_compared_like_with_like() -> None:
    """Good items are counted at the fixed eta, at each item's best, and at the eta each price suggests; never at 0."""
    items = [item_of("color"), item_of("shape"), item_of("add")]
    verdict = edit_judge.Verdict(success=True, kept=True, background_db=30, truth_db=20, truth_ssim=0.5)
    bad = replace(verdict, success=False)
    # The first is good from 0.8 on, the second up to 0.6, the third is of a hard kind and does not count.
    verdicts = {eta: [verdict if eta >= 0.8 else bad, verdict if eta <= 0.6 else bad, bad] for eta in edit_quality.ETAS}
    follows = [[eta for eta in edit_quality.ETAS], [min(eta, 0.6) for eta in edit_quality.ETAS]]
    suggestions = [
        Suggestion(0.0, tuple(EtaScore(eta, f, eta, 0.0) for eta, f in zip(edit_quality.ETAS, line, strict=True)))
        for line in (*follows, follows[0])
    ]
    result = suggestion.report(items, suggestions, verdicts, 1.0)
    assert result["fixed"]["value"] == 0.5 and result["best_of_each"]["value"] == 1.0
    assert {price: share["value"] for price, share in result["suggested"].items()}["0.5"] == 1.0
    assert result["suggested"]["1"]["value"] <= 1.0 and len(result["items"]) == 2
