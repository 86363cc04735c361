"""Stage 3: images on the way from the optimised to the target embedding (paper section 3.2, eq. 3)."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion.schedules import PATHS, guidance_at, guide, refined, starting_noise, varied
from ..engine.base import BaseModel
from ..engine.memory import in_rungs
from ..errors import LowmemImagicError, NonFiniteEditError, NonFiniteModelError
from ..layers.adapter_pack import AdapterPack
from ..settings.stages import SampleConfig, Strength, strength_text, strengths
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
    """Seed of the starting noise; of a photo's own noise, 0 is that noise itself, and others are variations of it."""
    strength: Strength = 1.0
    """Factor on the adapter; 0 is the base alone, and no mask."""
    guidance_scale: float | None = None
    """Classifier-free guidance, see `SampleConfig.photo_guidance`; None takes the configuration's."""


@dataclass(frozen=True)
class _Conditions:
    """The text and the adapters of B images, between their photos and their sentences."""

    pack: AdapterPack | None
    """None renders the base alone."""
    rows: Tensor
    """(B,) the edit of each."""
    strengths: Tensor
    """(B, 3) factors on its adapter."""
    optimized: Tensor
    """e_opt of each, (B, T, D)."""
    target: Tensor
    """e_tgt of each, (B, T, D)."""
    negative: Tensor | None
    """(1, T, D); None without guidance."""
    config: SampleConfig

    def at(self, etas: Sequence[float]) -> Tensor:
        """Sets the adapters, and gives the text at these etas: (B, T, D), or (2 B, T, D) with the negative first."""
        text = PATHS[self.config.interpolation](self.target, self.optimized, torch.tensor(etas).view(-1, 1, 1))
        copies = 1 if self.negative is None else 2
        if self.pack is not None:
            self.pack.set_rows(self.rows.repeat(copies), self.strengths.repeat(copies, 1))
        return text if self.negative is None else torch.cat([self.negative.expand_as(text), text])


class _Photo(NamedTuple):
    """What a masked image keeps to where it is not to change."""

    path: Tensor
    """Latents of its photo (eta 0) after every step, (S, C, H, W)."""
    mask: Tensor
    """How far each place may change, (1, H, W)."""


def _guidance(cell: Cell, config: SampleConfig) -> float:
    """Guidance scale of an image."""
    scale = config.guidance_scale if cell.guidance_scale is None else cell.guidance_scale
    return guidance_at(cell.eta, scale, config.photo_guidance)


def sample(
    base: BaseModel,
    pack: AdapterPack,
    target_embeddings: Tensor,
    optimized_embeddings: Tensor,
    cells: Sequence[Cell],
    config: SampleConfig,
    progress: Progress | None = None,
    *,
    coarse_latents: Tensor | None = None,
    inverted_noise: Tensor | None = None,
) -> Tensor:
    """Latents (len(cells), C, H, W), fp32 on the CPU, one for each cell, in the order of `cells`.

    Uses classifier-free guidance (see `SampleConfig.photo_guidance`), and starts as `SampleConfig.start` says. Rows are
    (edit, eta, seed, strength, guidance) and never influence each other: an image does not depend on what it was
    rendered with. With `SampleConfig.mask`, the photo (eta 0) is rendered before its edits, whether it is among
    `cells` or not.

    Args:
        base: the frozen base.
        pack: adapters of N edits.
        target_embeddings: e_tgt, (N, T, D).
        optimized_embeddings: e_opt, (N, T, D).
        cells: what to render.
        config: steps, scheduler, start, interpolation, mask, rows per batch; guidance where a cell has
            none of its own.
        progress: called after every step of every batch; its steps are those of all images.
        coarse_latents: low frequencies of the photos (N, C, h, w); needed to start from anything but pure noise.
        inverted_noise: the photos' own noise (N, C, H, W); needed to start from it.

    Raises:
        NonFiniteModelError: the base alone gives NaN or infinity with these settings.
        NonFiniteEditError: an edit does, and the base alone does not.

    **Memory**: `batch_rows` UNet rows; with a mask, in main memory the latents of as many photos after every step.
    """
    if config.start != "noise" and coarse_latents is None:
        raise ValueError(f"sampling starts from {config.start!r} and the photos' coarse latents are not given")
    if config.start == "inverted" and inverted_noise is None:
        raise ValueError("sampling starts from the photos' own noise, which is not given")
    wanted = [replace(cell, guidance_scale=_guidance(cell, config)) for cell in cells]
    photos = {
        own: replace(own, eta=0.0, strength=1.0, guidance_scale=_guidance(replace(cell, eta=0.0), config))
        for own, cell in zip(wanted, cells, strict=True)
        if config.mask and any(strengths(cell.strength))
    }
    first = list(dict.fromkeys(photos.values()))
    rest = [cell for cell in dict.fromkeys(wanted) if cell not in first]
    sampler = _Sampler(
        base=base,
        pack=pack,
        target=target_embeddings,
        optimized=optimized_embeddings,
        config=config,
        negative=base.encode_text([config.negative_prompt])[:1],
        coarse_latents=None if config.start == "noise" else coarse_latents,
        inverted_noise=inverted_noise if config.start == "inverted" else None,
        progress=progress,
        images=len(first) + len(rest),
    )
    ends: dict[Cell, Tensor] = {}
    for begin in range(0, max(1, len(first)), config.batch_rows):
        paths = sampler.render(first[begin : begin + config.batch_rows], {}, whole=True)
        # What has no photo to keep to goes with the first of them.
        some = [cell for cell in rest if photos.get(cell) in paths or (cell not in photos and not begin)]
        needed = dict.fromkeys(photos[cell] for cell in some if cell in photos)
        kept = {photo: _Photo(paths[photo], sampler.mask(photo, paths[photo][-1])) for photo in needed}
        ends |= {photo: path[-1].clone() for photo, path in paths.items()}
        made = sampler.render(some, {cell: kept[photos[cell]] for cell in some if cell in photos})
        ends |= {cell: path[-1] for cell, path in made.items()}
    for cell in wanted:
        # Here, where they are on the CPU already: looking after every step would stop a GPU for it.
        if not ends[cell].isfinite().all():
            raise sampler.fault(cell)
    return torch.stack([ends[cell] for cell in wanted])


@dataclass(kw_only=True)
class _Sampler:
    """Renders cells in batches, the settings of all cells being the same."""

    base: BaseModel
    pack: AdapterPack | None
    target: Tensor
    optimized: Tensor
    config: SampleConfig
    negative: Tensor
    """(1, T, D)."""
    coarse_latents: Tensor | None
    """What the starting noise lies over (N, C, h, w), None for nothing."""
    inverted_noise: Tensor | None
    """What the starting noise is or is varied from (N, C, H, W), None for the seeds' own."""
    progress: Progress | None
    images: int
    """How many there will be."""
    done: int = 0
    """How many there are."""

    def render(self, cells: Sequence[Cell], kept: Mapping[Cell, _Photo], *, whole: bool = False) -> dict[Cell, Tensor]:
        """The latents (1, C, H, W) of each cell, fp32 on the CPU.

        Args:
            cells: each once, with guidance of their own.
            kept: what some of them keep to.
            whole: give the latents after every step, (S, C, H, W).
        """
        waiting = list(_batches(cells, self.config.batch_rows, self.base.most_images))
        rendered: dict[Cell, Tensor] = {}

        def fewer() -> bool:
            most = len(waiting[0]) // 2
            if most:
                waiting[:] = [batch[i : i + most] for batch in waiting for i in range(0, len(batch), most)]
                self._fewer(most)
            return bool(most)

        while waiting:
            paths = in_rungs(lambda: self._batch(waiting[0], kept, whole), fewer)
            rendered.update(zip(waiting.pop(0), paths.float().cpu(), strict=True))
            self.done += len(paths)
        return rendered

    def mask(self, photo: Cell, latents: Tensor) -> Tensor:
        """Where images that keep to a photo may change, (1, H, W); its latents are (C, H, W)."""
        rows = min(self.config.batch_rows, 2 * (self.base.most_images or self.config.batch_rows))

        def fewer() -> bool:
            nonlocal rows
            if rows <= 2:
                return False
            rows = max(2, rows // 2)
            self._fewer(rows // 2)
            return True

        return in_rungs(
            lambda: change_mask(
                self.base,
                latents,
                self.optimized[photo.edit],
                self.target[photo.edit],
                self.config.mask,
                max_rows=rows,
            ),
            fewer,
        )

    def fault(self, cell: Cell) -> LowmemImagicError:
        """The error to report for a cell that came out as NaN or infinity: the base's or the edit's.

        The cell is rendered once more without anything of the edit: no adapter, the sentence's own embedding, a
        seed's noise.
        """
        try:
            self.base.check_unet(torch.zeros(self.base.family.latent_shape), self.target[cell.edit])
        except NonFiniteModelError as error:
            return error
        base_alone = replace(
            self, pack=None, optimized=self.target, coarse_latents=None, inverted_noise=None, progress=None
        )
        sentence = replace(cell, eta=1.0)
        if base_alone.render([sentence], {})[sentence].isfinite().all():
            return NonFiniteEditError(
                f"the edit gives NaN or infinity at eta {cell.eta:g} and strength {strength_text(cell.strength)}, "
                f"{self.base.name} by itself does not; the edit's numbers are damaged or too large: get the file "
                "again, or try a lower strength"
            )
        return NonFiniteModelError(
            f"sampling on {self.base.name} gives NaN or infinity, with and without the edit, with scheduler "
            f"{self.config.scheduler} in {self.config.num_inference_steps} steps at guidance {cell.guidance_scale:g}; "
            "take another scheduler, more steps or less guidance, or another base"
        )

    def _fewer(self, most: int) -> None:
        """Takes at most this many images at once from now on."""
        self.base.most_images = most
        self.base.step_down(f"{most} images a sampling batch")

    def _batch(self, cells: Sequence[Cell], kept: Mapping[Cell, _Photo], whole: bool) -> Tensor:
        """Latents (B, 1, C, H, W) of cells with or all without guidance; `whole`, after every step (B, S, C, H, W)."""
        base, config = self.base, self.config
        rows = torch.tensor([cell.edit for cell in cells])
        scales = torch.tensor([cell.guidance_scale for cell in cells]).view(-1, 1, 1, 1)
        guidance = scales.to(base.device) if scales[0] != 1 else None
        conditions = _Conditions(
            self.pack,
            rows,
            torch.tensor([strengths(cell.strength) for cell in cells]),
            self.optimized[rows],
            self.target[rows],
            None if guidance is None else self.negative,
            config,
        )
        scheduler = base.family.scheduler(config.scheduler)
        scheduler.set_timesteps(config.num_inference_steps, device=base.device)
        # One generator a row: equal seeds see equal noise, whatever the batch and the device.
        generators = [torch.Generator().manual_seed(cell.seed) for cell in cells]
        latents = self._start(cells, generators, scheduler)
        masked = [row for row, cell in enumerate(cells) if cell in kept]
        photos = [kept[cells[row]] for row in masked]
        masks = torch.stack([photo.mask for photo in photos]).to(base.device) if photos else None
        options = _step_options(scheduler, generators)
        text = conditions.at([cell.eta for cell in cells]).to(base.device)
        path: list[Tensor] = []
        attached = contextlib.nullcontext() if self.pack is None else self.pack.attached(base.unet)
        with base.used(), torch.no_grad(), attached:
            for step, timestep in enumerate(scheduler.timesteps):
                both = latents if guidance is None else torch.cat([latents, latents])
                scaled = scheduler.scale_model_input(both, timestep)
                prediction = base.predict(scaled, timestep.expand(len(scaled)), text).float()
                if guidance is not None:
                    unconditional, conditional = prediction.chunk(2)
                    prediction = guide(unconditional, conditional, guidance)
                latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
                if masks is not None:
                    below = torch.stack([photo.path[step] for photo in photos]).to(latents)
                    latents[masked] = torch.lerp(below, latents[masked], masks)
                # Off the device at once: whole paths are in no plan.
                path = [*path, latents.float().cpu()] if whole else [latents]
                self._report(min(step + 1, config.num_inference_steps) * len(cells))
        return torch.stack(path, 1)

    def _start(self, cells: Sequence[Cell], generators: Sequence[torch.Generator], scheduler: Any) -> Tensor:
        """The latents (B, C, H, W) that cells start from; their generators, fresh, go on from there."""
        shape = self.base.family.latent_shape
        noise = torch.stack([starting_noise(shape, generator) for generator in generators])
        rows = torch.tensor([cell.edit for cell in cells])
        if self.inverted_noise is not None:
            own = self.inverted_noise[rows]
            noise = torch.stack([varied(x, e, cell.seed) for x, e, cell in zip(own, noise, cells, strict=True)])
        noise = noise.to(self.base.device)
        if self.coarse_latents is None:
            pure: Tensor = noise * scheduler.init_noise_sigma
            return pure
        below = refined(self.coarse_latents[rows].to(noise), *shape[1:])
        started: Tensor = scheduler.add_noise(below, noise, scheduler.timesteps[:1].expand(len(noise)))
        return started

    def _report(self, steps: int) -> None:
        """Says how far things are, `steps` into a batch."""
        if self.progress is not None:
            each, remark = self.config.num_inference_steps, f"{self.done} of {self.images} images done"
            self.progress(self.done * each + steps, self.images * each, remark)


def _batches(cells: Sequence[Cell], batch_rows: int, most_images: int | None) -> Iterator[list[Cell]]:
    """The cells that are rendered together: edits side by side, at most `batch_rows` rows and `most_images`.

    Guidance 1 takes one row an image, any other two, so the two kinds are kept apart.
    """
    for guided in (False, True):
        order = sorted((cell for cell in cells if (cell.guidance_scale != 1) == guided), key=lambda cell: cell.edit)
        size = max(1, min(batch_rows // (2 if guided else 1), most_images or batch_rows))
        for begin in range(0, len(order), size):
            yield order[begin : begin + size]


def _step_options(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """The generators, for a scheduler whose step draws noise."""
    return {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
