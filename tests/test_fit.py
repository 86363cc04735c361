"""Facts about the hint: its conditions, and the settings that it names."""

import json
import math

import pytest
import torch

from lowmem_imagic.actions.fit_hint import OVERFIT_DB, UNDERFIT_DB, Fit, embedding_distance


@pytest.mark.parametrize(
    ("reconstruction_db", "change_db", "words"),
    [
        (UNDERFIT_DB - 1, 15.0, ("under-fitted", "`steps_finetune`")),
        (UNDERFIT_DB - 1, OVERFIT_DB + 1, ("under-fitted",)),
        (26.0, OVERFIT_DB + 1, ("over-fitted", "`strength=0.7`")),
        (26.0, math.inf, ("over-fitted",)),
        (26.0, 15.0, ()),
        (None, None, ()),
        (26.0, None, ()),
    ],
)
def test_the_hint_names_what_is_wrong(reconstruction_db: float | None, change_db: float | None, words: tuple[str, ...]):
    """A lost photo is under-fitted, equal pictures along eta are over-fitted; otherwise nothing is said."""
    fit = Fit(reconstruction_db=reconstruction_db, change_db=change_db, embedding_distance=0.1)
    assert all(word in fit.hint for word in words) and bool(fit.hint) == bool(words)
    assert json.loads(json.dumps(fit.as_json(), allow_nan=False))["hint"] == fit.hint


def test_the_hint_names_no_setting_that_is_on() -> None:
    """An edit that adapts all layers is not told to adapt all."""
    lost = {"reconstruction_db": UNDERFIT_DB - 1, "change_db": 15.0, "embedding_distance": 0.1}
    assert "`adapt=all`" in Fit(**lost, adapt="attn").hint and "`adapt=all`" not in Fit(**lost, adapt="all").hint


def test_distance_is_relative() -> None:
    """The distance of the embeddings is 0 for equal ones and does not depend on their scale."""
    target = torch.randn(5, 3)
    assert embedding_distance(target, target) == 0
    assert embedding_distance(10 * (target + 1), 10 * target) == pytest.approx(embedding_distance(target + 1, target))
    assert embedding_distance(2 * target, target) == pytest.approx(1.0)
