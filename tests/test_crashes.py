"""Facts about batches with killed processes: after a kill at any moment, the same command finishes the batch.

``pytest -m long tests/test_crashes.py`` does it a hundred times on the bundled model; `tests.crashes` is the harness.
"""

import json
from pathlib import Path

import pytest

from tests import crashes
from tests.crashes import SHORT, Batch, campaign, failpoints, scenes, shared

ITEMS = 3
FEWER = ("--steps-embed", "2", "--steps-finetune", "3", "--steps-sample", "2", "--etas", "0,1", "--save-every", "2")
"""Two states are saved on an item's way."""


@pytest.fixture
def batch(tiny_folder: Path, tmp_path: Path) -> Batch:
    """A few scenes for the tiny model, one slot."""
    words = ("--start", "photo", "--model", str(tiny_folder), "--device", "cpu", "--slots", "1")
    return Batch(scenes(tmp_path, ITEMS), (*FEWER, *words))


@pytest.mark.process
def test_killed_between_any_two_durable_steps(batch: Batch, tmp_path: Path) -> None:
    """Dead after a temporary is written, after it is renamed, before and after the ledger commits, when a training
    state is saved, before an item's report: run again, the files are those of an undisturbed run, byte for byte."""
    found = failpoints(batch, tmp_path, (3,))
    assert found["never_reached"] == [] and len(found["died"]) == len(crashes.PLACES)
    assert found["wrong"] == []


@pytest.mark.process
def test_killed_at_random_moments(batch: Batch, tmp_path: Path) -> None:
    """Killed again and again on its way, a batch comes to the bytes of an undisturbed one, with nothing left over."""
    found = campaign(batch, tmp_path, 3, 0, exact=True)
    assert found["kills"] == 3 and found["wrong"] == []


@pytest.mark.process
def test_two_runs_share_a_folder(batch: Batch, tmp_path: Path) -> None:
    """Two runs started on one folder at the same time make every item, and none twice."""
    found = shared(batch, tmp_path / "out")
    assert found["made"] == ITEMS and found["twice"] == []


@pytest.mark.process
def test_the_comparison_sees_a_difference(batch: Batch, tmp_path: Path) -> None:
    """The harness tells one changed byte, one missing and one left-over file from a batch that is whole."""
    out = tmp_path / "out"
    batch.finish(out)
    whole = crashes.files_of(out)
    assert len(whole) == 5 * ITEMS and crashes.different(crashes.files_of(out), whole) == []
    picture = out / "000" / "eta_0.00.png"
    picture.write_bytes(picture.read_bytes() + b"x")
    (out / "001" / "sheet.png").unlink()
    (out / "002" / ".lowmem-imagic-1.tmp").write_bytes(b"")
    assert crashes.different(crashes.files_of(out), whole) == [
        "000/eta_0.00.png",
        "001/sheet.png",
        "002/.lowmem-imagic-1.tmp",
    ]


@pytest.mark.long
@pytest.mark.parametrize("slots", ["1", "4"])
def test_a_hundred_kills(tmp_path: Path, slots: str) -> None:
    """A hundred kills of batches of 24 on the bundled model: same bytes in one slot, pictures alike in packs."""
    long = Batch(scenes(tmp_path, 24), (*SHORT, "--slots", slots))
    found = campaign(long, tmp_path, 100, 0, exact=slots == "1")
    assert found["kills"] == 100 and found["wrong"] == [], json.dumps(found)
    assert slots == "1" or found["least_psnr_db"] >= crashes.SAME_DB
