"""Changes of training and sampling that were tried for strangers, each in the engine for as long as a context lasts.

None is in the package: docs/quality.md has what they gain. They are for the bundled model, which has one denoiser. Each
takes the base, the sentence and the source prompt.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from lowmem_imagic.diffusion import schedules
from lowmem_imagic.diffusion.schedules import PATHS
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.families.family import Denoiser
from lowmem_imagic.families.stable_diffusion import EMBEDS
from lowmem_imagic.pipeline import prepare
from lowmem_imagic.sampling.inversion import SOFTENING

from .edit_methods import SEED, Lever, Within
from .own_noise import fireflow

MIXED, EMPTY = 0.4, 0.2
"""Shares of the rows of stage 2 that `mixed_texts` gives a text between e_opt and e_tgt, and the empty one."""
LATE = 0.2
"""Share of the noise schedule, from its noisy end, without the difference to the source prompt in
`late_difference`."""


@contextmanager
def mixed_texts(base: BaseModel, sentence: str, source: str) -> Iterator[None]:
    """Stage 2 also under texts between e_opt and e_tgt and under the empty one, so that the adapter carries the photo
    whatever is said."""
    predict = base.predict
    target, empty = base.encode_text([sentence, ""])[EMBEDS]
    generator = torch.Generator().manual_seed(SEED)

    def mixed(denoiser: Denoiser, x: Tensor, at: Tensor, given: Conditioning) -> Tensor:
        # Stage 2 alone has gradients and a text without one.
        if torch.is_grad_enabled() and not given[EMBEDS].requires_grad:
            texts = given[EMBEDS].clone()
            for row, (draw, share) in enumerate(torch.rand(len(texts), 2, generator=generator).tolist()):
                if draw < MIXED:
                    texts[row] = torch.lerp(texts[row], target.to(texts), share)
                elif draw < MIXED + EMPTY:
                    texts[row] = empty.to(texts)
            given = given | {EMBEDS: texts}
        return predict(denoiser, x, at, given)

    with mock.patch.object(base, "predict", mixed):
        yield


def second_order(softening: float) -> Within:
    """The photo's own noise by FireFlow, see `benchmarks.own_noise`."""

    def within(base: BaseModel, sentence: str, source: str) -> AbstractContextManager[Any]:
        return mock.patch.object(prepare, "own_noise", fireflow(softening))

    return within


def photo_attention(parts: str) -> Within:
    """Self-attention of the edited pictures with some of q, k and v of the photo's own path, at the same step.

    Args:
        parts: "kv" for appearance (MasaCtrl, arXiv 2304.08465), "qk" for layout (Plug-and-Play, arXiv 2211.12572).
    """

    @contextmanager
    def within(base: BaseModel, sentence: str, source: str) -> Iterator[None]:
        [denoiser] = base.denoisers
        layers = [
            module
            for module in base.network(denoiser).modules()
            if isinstance(module, Attention) and not module.is_cross_attention
        ]
        predict, own = base.predict, [layer.processor for layer in layers]
        step: list[float] = []

        def noted(denoiser: Denoiser, x: Tensor, at: Tensor, given: Conditioning) -> Tensor:
            step[:] = [float(at[0])]
            return predict(denoiser, x, at, given)

        try:
            for layer in layers:
                layer.set_processor(PhotoAttention(parts, step))
            with mock.patch.object(base, "predict", noted):
                yield
        finally:
            for layer, processor in zip(layers, own, strict=True):
                layer.set_processor(processor)

    return within


class PhotoAttention:
    """Attention that remembers the photo's path, which is one row without guidance, and gives it to edited pictures.

    Their batches have a row with the empty text and then one with their own for each picture.
    """

    def __init__(self, parts: str, step: list[float]) -> None:
        self.parts, self.step = parts, step
        self.photo: dict[float, dict[str, Tensor]] = {}

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        count = len(hidden_states)
        parts = {"q": attn.to_q(hidden_states), "k": attn.to_k(hidden_states), "v": attn.to_v(hidden_states)}
        [step] = self.step
        if count == 1:
            self.photo[step] = parts
        elif step in self.photo and not torch.is_grad_enabled():
            for part in self.parts:
                photo = self.photo[step][part].expand(count // 2, -1, -1)
                parts[part] = torch.cat([parts[part][: count // 2], photo])
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts.values())
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return out


@contextmanager
def embedding_difference(base: BaseModel, sentence: str, source: str) -> Iterator[None]:
    """The source prompt in the embedding, e_opt + eta (e_tgt - e_source), in place of the predictions."""
    e_source = base.encode_text([source])[EMBEDS]

    def path(e_target: Tensor, e_optimized: Tensor, eta: Tensor) -> Tensor:
        return e_optimized + eta * (e_target - e_source.to(e_target))

    with mock.patch.dict(PATHS, dict.fromkeys(PATHS, path)):
        yield


@contextmanager
def late_difference(base: BaseModel, sentence: str, source: str) -> Iterator[None]:
    """The difference to the source prompt from later steps on, so that it changes a picture whose layout is the photo's
    (as the warm-up of SEGA, arXiv 2301.12247)."""
    predict, [denoiser] = base.predict, base.denoisers
    schedule: Any = denoiser.schedule
    first = (1 - LATE) * len(schedule.alpha_bar)

    def late(denoiser: Denoiser, x: Tensor, at: Tensor, given: Conditioning) -> Tensor:
        predicted = predict(denoiser, x, at, given)
        pictures = sourced_pictures(x)
        if pictures and float(at[0]) >= first:
            predicted = torch.cat([predicted[:pictures], predicted[2 * pictures :], predicted[2 * pictures :]])
        return predicted

    with mock.patch.object(base, "predict", late):
        yield


@contextmanager
def empty_source(base: BaseModel, sentence: str, source: str) -> Iterator[None]:
    """The difference to the empty text, in place of that to a source prompt."""
    predict = base.predict
    empty = base.encode_text([""])[EMBEDS]

    def replaced(denoiser: Denoiser, x: Tensor, at: Tensor, given: Conditioning) -> Tensor:
        pictures = sourced_pictures(x)
        if pictures:
            texts = given[EMBEDS]
            last = empty.to(texts).expand(pictures, -1, -1)
            given = given | {EMBEDS: torch.cat([texts[: 2 * pictures], last])}
        return predict(denoiser, x, at, given)

    with mock.patch.object(base, "predict", replaced):
        yield


def edit_limit(limit: float) -> Within:
    """Another `EDIT_LIMIT`."""

    def within(base: BaseModel, sentence: str, source: str) -> AbstractContextManager[Any]:
        return mock.patch.object(schedules, "EDIT_LIMIT", limit)

    return within


# A number: infinite times no way at all is NaN.
UNLIMITED = Lever("source-unlimited", edit_limit(1e9), trains=False, sourced=True, settings={"limit": "none"})
"""The difference to a source prompt without a limit, at the scale that was best without one."""


def sourced_pictures(x: Tensor) -> int:
    """Number of pictures in a batch with a source prompt and without guidance, which has them three times: for the
    photo, the sentence and the source prompt; 0 for any other batch."""
    pictures, rest = divmod(len(x), 3)
    return 0 if rest or not torch.equal(x, x[:pictures].repeat(3, 1, 1, 1)) else pictures


LEVERS = (
    Lever("mixed-texts", mixed_texts, trains=True, settings={"mixed": MIXED, "empty": EMPTY}),
    Lever("second-order", second_order(0.0), trains=True, settings={"softening": 0.0}),
    Lever("second-order-softened", second_order(SOFTENING), trains=True, settings={"softening": SOFTENING}),
    Lever("photo-keys-values", photo_attention("kv"), trains=False),
    Lever("photo-queries-keys", photo_attention("qk"), trains=False),
    Lever("embedding-difference", embedding_difference, trains=False),
    Lever("source-late", late_difference, trains=False, sourced=True, settings={"late": LATE}),
    Lever("source-empty", empty_source, trains=False, sourced=True),
    Lever("source-limit-1", edit_limit(1.0), trains=False, sourced=True, settings={"limit": 1.0}),
    Lever("source-limit-2", edit_limit(2.0), trains=False, sourced=True, settings={"limit": 2.0}),
)
