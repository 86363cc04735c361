"""Stage 3: images on the path from the optimised to the target embedding (paper section 3.2, eq. 3)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.schedules import PATHS, edit_guided, guidance_at, guide, refined, starting_noise, varied
from ..engine.base import BaseModel
from ..engine.memory import with_fallbacks
from ..errors import LowmemImagicError, NonFiniteEditError, NonFiniteModelError
from ..families.conditioning import Conditioning, Part, Path
from ..families.family import Denoiser, Sampler
from ..geometry import Size
from ..layers.adapter_pack import AdapterPack
from ..settings.stages import SampleConfig, Strength, sourced, strength_text, strengths
from .masking import change_mask

Progress = Callable[[int, int, str], None]
"""Called as ``progress(step, steps, remark)`` after every step."""


@dataclass(frozen=True)
class Cell:
    """One image to render."""

    edit: int
    """Number of the edit in the pack."""
    eta: float
    """Interpolation: 0 is the photo, 1 the target sentence."""
    seed: int
    """Seed of the starting noise. With a photo's own noise, 0 is that noise itself; other seeds vary it."""
    strength: Strength = 1.0
    """Factor on the adapter; 0 is the base alone under the sentence: no mask and no source prompt."""
    guidance_scale: float | None = None
    """Classifier-free guidance, see `SampleConfig.photo_guidance`; None takes the settings' scale. With a source prompt
    the photo's guidance counts, which this is only if the settings have none for the photo."""
    sentence: str | None = None
    """The sentence to render it under; None takes the edit's own, the first of several."""


@dataclass(frozen=True)
class _Conditions:
    """The conditioning and the adapters of B images."""

    pack: AdapterPack | None
    """None renders the base alone."""
    rows: Tensor
    """(B,) the edit of each image."""
    strengths: Tensor
    """(B, 3) factors on the adapter of each image."""
    optimized: Conditioning
    """e_opt, a row for each image."""
    target: Conditioning
    """e_tgt, a row for each image."""
    negative: Conditioning | None
    """One row; None without guidance."""
    extra: Conditioning
    """The conditioning beside the text, a row for each image."""
    parts: Mapping[str, Part]
    path: Path | None
    """None for a denoiser that does not follow eta."""
    source: Conditioning | None = None
    """The source prompt's, one row."""

    def at(self, etas: Sequence[float]) -> Conditioning:
        """Sets the adapters' rows; returns the conditioning at these etas, B rows each: the negative's if there is one,
        then the pictures', then with a source prompt the sentences' and the source prompt's, which have no adapter."""
        text = self.target
        if self.source is not None:
            text = self.optimized
        elif self.path is not None:
            text = self.optimized.mix(text, torch.tensor(etas), self.path, self.parts)
        texts = [text] if self.negative is None else [self.negative.expand(text.count), text]
        strengths = [self.strengths] * len(texts)
        if self.source is not None:
            texts += [self.target, self.source.expand(text.count)]
            strengths += [torch.zeros_like(self.strengths)] * 2
        if self.pack is not None:
            self.pack.set_rows(self.rows.repeat(len(texts)), torch.cat(strengths))
        return Conditioning.cat([one | self.extra for one in texts])


class _Photo(NamedTuple):
    """The photo of a masked image, which the image keeps outside its mask."""

    path: Tensor
    """Latents of the photo (eta 0) after every step, (S, C, H, W)."""
    mask: Tensor
    """The mask (1, H, W), see `change_mask`."""


def _guidance(cell: Cell, config: SampleConfig, guided: bool) -> float:
    """Guidance scale of an image; 1, which is none, on a base without guidance."""
    if not guided:
        return 1.0
    scale = config.guidance_scale if cell.guidance_scale is None else cell.guidance_scale
    # With a source prompt, a picture has the photo's prediction at every eta.
    return guidance_at(0.0 if _sourced(cell, config) else cell.eta, scale, config.photo_guidance)


def _sourced(cell: Cell, config: SampleConfig) -> bool:
    """Whether an image has the difference to the source prompt beside the photo's prediction."""
    return sourced(config.source_prompt, cell.eta, cell.strength)


def sample(
    base: BaseModel,
    packs: Mapping[str, AdapterPack],
    target: Conditioning,
    optimized: Conditioning,
    cells: Sequence[Cell],
    config: SampleConfig,
    progress: Progress | None = None,
    *,
    rows: Sequence[int | None] | None = None,
    size: Size | None = None,
    start: Conditioning | None = None,
    coarse: Mapping[str, Tensor] | None = None,
    noise: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Latents (len(cells), C, H, W) by denoiser, fp32 on the CPU, in the order of `cells`; the last one's are decoded.

    Uses classifier-free guidance (see `SampleConfig.photo_guidance`) where the base has it, or a source prompt (see
    `SampleConfig.source_prompt`), and starts from `SampleConfig.start`. Rows are (edit, eta, seed, strength, guidance)
    and never influence each other: an image does not depend on the others in its batch. With `SampleConfig.mask`, the
    photo (eta 0) is rendered before its edits, even if it is not in `cells`. In a cascade, each denoiser takes the
    results of the one before it.

    Args:
        base: the frozen base.
        packs: adapters of N edits, by denoiser.
        target: e_tgt, a row for each sentence.
        optimized: e_opt, N rows, with the start sentence's in the parts that are not stored.
        cells: images to render.
        config: steps, scheduler, start, interpolation, mask, rows per batch; guidance of cells without their own.
        progress: called after every step of every batch; it counts the steps of all images.
        rows: the row of `target` for each cell, the same for the same edit and sentence; None for a cell at eta 0
            whose edit has no sentence. By default a cell takes the row with its edit's number.
        size: width and height of the pictures; None for the model's own.
        start: the start sentences' own conditioning, N rows; required for cells at eta 0, masks and a source prompt if
            a denoiser does not follow eta.
        coarse: low frequencies of the photos (N, C, h, w), by denoiser; required unless `start` is "noise".
        noise: the photos' own noise (N, C, H, W), by denoiser; required if `start` is "inverted".

    Raises:
        NonFiniteModelError: the base alone gives NaN or infinity with these settings.
        NonFiniteEditError: an edit gives NaN or infinity, and the base alone does not.

    **Memory**: `batch_rows` rows; with a mask, main memory also holds the latents of as many photos after every step.
    """
    if config.start != "noise" and coarse is None:
        raise ValueError(f"sampling starts from {config.start!r} and the photos' coarse latents are not given")
    if config.start == "inverted" and noise is None:
        raise ValueError("sampling starts from the photos' own noise, which is not given")
    photos_too = config.mask or config.source_prompt or any(not cell.eta for cell in cells)
    if start is None and photos_too and not all(denoiser.follows_eta for denoiser in base.denoisers):
        raise ValueError("a denoiser renders photos under their start sentences, which are not given")
    places = [cell.edit for cell in cells] if rows is None else rows
    row_of = {(cell.edit, cell.sentence): row for cell, row in zip(cells, places, strict=True) if row is not None}
    wanted, photos = list[Cell](), dict[Cell, Cell]()
    guided = base.guided
    for cell in cells:
        own = replace(cell, guidance_scale=_guidance(cell, config, guided))
        # At eta 0 no sentence is seen: all sentences of an edit share its photo.
        photo_guidance = _guidance(replace(cell, eta=0.0), config, guided)
        photo = replace(own, eta=0.0, strength=1.0, guidance_scale=photo_guidance, sentence=None)
        if replace(own, sentence=None) == photo:
            own = photo
        wanted.append(own)
        if config.mask and any(strengths(cell.strength)) and (own == photo or (cell.edit, cell.sentence) in row_of):
            photos[own] = photo
    first = list(dict.fromkeys(photos.values()))
    rest = [cell for cell in dict.fromkeys(wanted) if cell not in first]
    ends: dict[Cell, Tensor] = {}
    masks: dict[tuple[Cell, str | None], Tensor] = {}
    latents = {}
    for number, denoiser in enumerate(base.denoisers):
        renderer = _Renderer(
            base=base,
            denoiser=denoiser,
            pack=packs[denoiser.name],
            target=target,
            row_of=row_of,
            optimized=optimized if denoiser.follows_eta or start is None else start,
            config=config,
            negative=base.encode_text([config.negative_prompt]),
            source=base.encode_text([config.source_prompt]) if config.source_prompt else None,
            size=size or base.sizes.own,
            lower=ends if number else None,
            lower_masks=masks,
            coarse=None if config.start == "noise" or coarse is None else coarse[denoiser.name],
            noise=noise[denoiser.name] if config.start == "inverted" and noise is not None else None,
            progress=progress,
            images=len(base.denoisers) * (len(first) + len(rest)),
            done=number * (len(first) + len(rest)),
        )
        ends, masks = renderer.all(first, rest, photos), renderer.masks
        for cell in wanted:
            # Checked here, on the CPU: a check after every step would make the GPU wait.
            if not ends[cell].isfinite().all():
                raise renderer.fault(cell)
        latents[denoiser.name] = torch.stack([ends[cell] for cell in wanted])
    return latents


@dataclass(kw_only=True)
class _Renderer:
    """Renders cells in batches with one denoiser and the same settings for all cells."""

    base: BaseModel
    denoiser: Denoiser
    pack: AdapterPack | None
    target: Conditioning
    """e_tgt, a row for each sentence."""
    row_of: Mapping[tuple[int, str | None], int]
    """The row of `target` by edit and sentence."""
    optimized: Conditioning
    """e_opt, a row for each edit; the start sentence's own for a denoiser that does not follow eta."""
    config: SampleConfig
    negative: Conditioning
    """One row."""
    source: Conditioning | None
    """The source prompt's, one row; None without one."""
    size: Size
    lower: Mapping[Cell, Tensor] | None
    """Latents (C, H, W) of the previous denoiser; None for the first."""
    lower_masks: Mapping[tuple[Cell, str | None], Tensor]
    """Masks (1, H, W) of the previous denoiser by photo and sentence."""
    coarse: Tensor | None
    """Low frequencies (N, C, h, w) under the starting noise; None for noise alone."""
    noise: Tensor | None
    """The photos' own noise (N, C, H, W) as starting noise; None for the seeds' noise."""
    progress: Progress | None
    images: int
    """Number of images in all."""
    done: int = 0
    """Number of images rendered so far."""
    masks: dict[tuple[Cell, str | None], Tensor] = field(default_factory=dict)
    """Masks (1, H, W) by photo and sentence."""

    def all(self, first: Sequence[Cell], rest: Sequence[Cell], photos: Mapping[Cell, Cell]) -> dict[Cell, Tensor]:
        """The latents (C, H, W) of all cells, fp32 on the CPU.

        Args:
            first: photos of masked cells.
            rest: all other cells.
            photos: the photo of each masked cell.
        """
        ends: dict[Cell, Tensor] = {}
        for begin in range(0, max(1, len(first)), self.config.batch_rows):
            paths = self.render(first[begin : begin + self.config.batch_rows], {}, whole=True)
            # Cells without a mask are rendered in the first batch.
            some = [cell for cell in rest if photos.get(cell) in paths or (cell not in photos and not begin)]
            kept: dict[Cell, _Photo] = {}
            for cell in (cell for cell in some if cell in photos):
                photo = photos[cell]
                key = photo, cell.sentence
                if key not in self.masks:
                    self.masks[key] = self.mask(replace(photo, sentence=cell.sentence), paths[photo][-1])
                kept[cell] = _Photo(paths[photo], self.masks[key])
            ends |= {photo: path[-1].clone() for photo, path in paths.items()}
            rendered = self.render(some, kept)
            ends |= {cell: path[-1] for cell, path in rendered.items()}
        return ends

    def _targets(self, cells: Sequence[Cell]) -> Conditioning:
        """The conditioning that cells go towards, a row for each: e_opt for the photo."""
        every = Conditioning.cat([self.optimized, self.target])
        count = self.optimized.count
        # A cell at eta 0 may have no sentence.
        rows = [self.row_of.get((cell.edit, cell.sentence)) if cell.eta else None for cell in cells]
        return every.rows([cell.edit if row is None else count + row for cell, row in zip(cells, rows, strict=True)])

    def _extra(self, cells: Sequence[Cell]) -> Conditioning:
        """The conditioning beside the text, a row for each cell."""
        lower = None if self.lower is None else torch.stack([self.lower[cell] for cell in cells])
        return self.base.family.make_extra(self.denoiser, len(cells), self.size, lower)

    def render(self, cells: Sequence[Cell], kept: Mapping[Cell, _Photo], *, whole: bool = False) -> dict[Cell, Tensor]:
        """The latents (1, C, H, W) of each cell, fp32 on the CPU.

        Args:
            cells: different cells, each with its guidance scale.
            kept: the photos of the masked cells.
            whole: return the latents after every step instead, (S, C, H, W).
        """
        waiting = list(_batches(cells, self.config, self.base.most_images))
        rendered: dict[Cell, Tensor] = {}

        def fewer() -> bool:
            most = len(waiting[0]) // 2
            if most:
                waiting[:] = [batch[i : i + most] for batch in waiting for i in range(0, len(batch), most)]
                self._fewer(most)
            return bool(most)

        while waiting:
            paths = with_fallbacks(lambda: self._batch(waiting[0], kept, whole), fewer)
            rendered.update(zip(waiting.pop(0), paths.float().cpu(), strict=True))
            self.done += len(paths)
        return rendered

    def mask(self, photo: Cell, latents: Tensor) -> Tensor:
        """The mask (1, H, W) of the images under a sentence of a photo with latents (C, H, W).

        A denoiser that does not follow eta knows no e_opt to compare a sentence with: it has the mask of the denoiser
        before it, in its own size.
        """
        if not self.denoiser.follows_eta:
            lower = self.lower_masks[replace(photo, sentence=None), photo.sentence]
            return F.interpolate(lower[None], latents.shape[-2:], mode="bilinear")[0]
        extra = self._extra([replace(photo, sentence=None)])
        target = self.target.rows([self.row_of[photo.edit, photo.sentence]])
        mixed = {n: x for n, x in self.optimized.rows([photo.edit]).items() if self.base.family.text[n].mixed}
        texts = (target | mixed, target)
        rows = min(self.config.batch_rows, 2 * (self.base.most_images or self.config.batch_rows))

        def fewer() -> bool:
            nonlocal rows
            if rows <= 2:
                return False
            rows = max(2, rows // 2)
            self._fewer(rows // 2)
            return True

        return with_fallbacks(
            lambda: change_mask(
                self.base,
                self.denoiser,
                latents,
                texts[0] | extra,
                texts[1] | extra,
                self.config.mask,
                max_rows=rows,
            ),
            fewer,
        )

    def fault(self, cell: Cell) -> LowmemImagicError:
        """The error to report for a cell with NaN or infinity: the base's or the edit's.

        Renders the cell once more with the base alone: no adapter, the sentence's own embedding, a seed's noise.
        """
        shape = self.denoiser.shape(self.size)
        row = self.row_of.get((cell.edit, cell.sentence))
        text = self.negative if row is None else self.target.rows([row])
        try:
            self.base.check_denoiser(self.denoiser, torch.zeros(shape), text | self._extra([cell]))
        except NonFiniteModelError as error:
            return error
        # Both ends of the path are the sentence. A source prompt stands for the photo, too: the difference is then as
        # long as the way to the sentence, and has its limit.
        photo = self.source if self.source is not None and _sourced(cell, self.config) else text
        base_alone = replace(self, pack=None, target=text, optimized=photo, coarse=None, noise=None, progress=None)
        sentence = replace(cell, edit=0, sentence=None)
        base_alone.row_of = {(0, None): 0}
        if self.lower is not None:
            base_alone.lower = {sentence: self.lower[cell]}
        if base_alone.render([sentence], {})[sentence].isfinite().all():
            return NonFiniteEditError(
                f"the edit gives NaN or infinity at eta {cell.eta:g} and strength {strength_text(cell.strength)}, "
                f"{self.base.name} alone does not; the edit's numbers are damaged or too large: get the file again, "
                "or try a lower strength"
            )
        beside = ""
        if _sourced(cell, self.config):
            beside = f" and edit guidance {cell.eta * self.config.edit_guidance_scale:g} (`edit_guidance` times eta)"
        return NonFiniteModelError(
            f"sampling on {self.base.name} gives NaN or infinity, with and without the edit, with scheduler "
            f"{self.config.scheduler} in {self.config.num_inference_steps} steps at guidance {cell.guidance_scale:g}"
            f"{beside}; take another scheduler, more steps or less guidance, or another base"
        )

    def _fewer(self, most: int) -> None:
        """Limits sampling batches to this many images from now on."""
        self.base.most_images = most
        self.base.fall_back(f"{most} images a sampling batch")

    def _batch(self, cells: Sequence[Cell], kept: Mapping[Cell, _Photo], whole: bool) -> Tensor:
        """Latents (B, 1, C, H, W) of cells of one kind (see `_parts`); `whole`: after every step (B, S, C, H, W)."""
        base, config = self.base, self.config
        scales = torch.tensor([cell.guidance_scale for cell in cells]).view(-1, 1, 1, 1)
        share = self.denoiser.guidance_share
        # As it is for a share of 1: the other way of writing it rounds.
        guidance = (scales if share == 1 else 1 + share * (scales - 1)).to(base.device) if scales[0] != 1 else None
        source = self.source if _sourced(cells[0], config) else None
        etas = torch.tensor([cell.eta for cell in cells]).view(-1, 1, 1, 1)
        edit_guidance = (share * config.edit_guidance_scale * etas).to(base.device)
        sampler = self.denoiser.schedule.sampler(
            config.scheduler,
            config.num_inference_steps,
            self.denoiser.shape(self.size),
            base.device,
            # The difference to a source prompt exaggerates as guidance does.
            guided=guidance is not None or source is not None,
        )
        # One generator per row: equal seeds give equal noise in every batch and on every device.
        generators = [torch.Generator().manual_seed(cell.seed) for cell in cells]
        latents = self._start(cells, generators, sampler)
        rows = torch.tensor([cell.edit for cell in cells])
        optimized = self.optimized.rows(rows)
        conditions = _Conditions(
            self.pack,
            rows,
            torch.tensor([strengths(cell.strength) for cell in cells]),
            optimized,
            self._targets(cells),
            None if guidance is None else self.negative,
            self.denoiser.drawn(self._extra(cells), generators, training=False),
            base.family.text,
            PATHS[config.interpolation] if self.denoiser.follows_eta else None,
            source,
        )
        masked = [row for row, cell in enumerate(cells) if cell in kept]
        photos = [kept[cells[row]] for row in masked]
        masks = torch.stack([photo.mask for photo in photos]).to(base.device) if photos else None
        conditioning = conditions.at([cell.eta for cell in cells]).to(base.device)
        path: list[Tensor] = []
        network = base.network(self.denoiser)
        attached = contextlib.nullcontext() if self.pack is None else self.pack.attached(network)
        with base.used(), torch.no_grad(), attached:
            for step, at in enumerate(sampler.at):
                copies = conditioning.count // len(cells)
                every = latents if copies == 1 else latents.repeat(copies, 1, 1, 1)
                scaled = sampler.scaled(every, step)
                prediction = base.predict(self.denoiser, scaled, at.expand(len(scaled)), conditioning).float()
                # In the order of `_Conditions.at`.
                parts = prediction.split(len(cells))
                prediction = parts[0] if guidance is None else guide(parts[0], parts[1], guidance)
                if source is not None:
                    sentence, described = parts[-2:]
                    prediction = edit_guided(prediction, sentence, described, edit_guidance)
                latents = sampler.stepped(prediction, step, latents, generators)
                if masks is not None:
                    below = torch.stack([photo.path[step] for photo in photos]).to(latents)
                    latents[masked] = torch.lerp(below, latents[masked], masks)
                # Moved to the CPU at once: no memory plan includes whole paths.
                path = [*path, latents.float().cpu()] if whole else [latents]
                self._report(min(step + 1, config.num_inference_steps) * len(cells))
        return torch.stack(path, 1)

    def _start(self, cells: Sequence[Cell], generators: Sequence[torch.Generator], sampler: Sampler) -> Tensor:
        """The starting latents (B, C, H, W) of cells; draws the noise from their fresh generators."""
        shape = self.denoiser.shape(self.size)
        noise = torch.stack([starting_noise(shape, generator) for generator in generators])
        rows = torch.tensor([cell.edit for cell in cells])
        if self.noise is not None:
            own = self.noise[rows]
            noise = torch.stack([varied(x, e, cell.seed) for x, e, cell in zip(own, noise, cells, strict=True)])
        noise = noise.to(self.base.device)
        below = None if self.coarse is None else refined(self.coarse[rows].to(noise), *shape[1:])
        return sampler.start(noise, below)

    def _report(self, steps: int) -> None:
        """Reports progress, `steps` into a batch."""
        if self.progress is not None:
            each, remark = self.config.num_inference_steps, f"{self.done} of {self.images} images done"
            self.progress(self.done * each + steps, self.images * each, remark)


def _parts(cell: Cell, config: SampleConfig) -> tuple[bool, bool]:
    """Whether an image has guidance, which takes a second row, and a source prompt, which takes two more."""
    return cell.guidance_scale != 1, _sourced(cell, config)


def _batches(cells: Sequence[Cell], config: SampleConfig, most_images: int | None) -> Iterator[list[Cell]]:
    """Yields batches of cells of one kind (see `_parts`), ordered by edit, of at most `SampleConfig.batch_rows` rows
    and `most_images` images."""
    for kind in ((False, False), (True, False), (False, True), (True, True)):
        guided, with_source = kind
        order = sorted((cell for cell in cells if _parts(cell, config) == kind), key=lambda cell: cell.edit)
        rows = 1 + guided + 2 * with_source
        size = max(1, min(config.batch_rows // rows, most_images or config.batch_rows))
        for begin in range(0, len(order), size):
            yield order[begin : begin + size]
