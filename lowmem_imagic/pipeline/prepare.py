"""Photos and sentences on their way into training: encoded, and each with the noise its edit is anchored to."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from unicodedata import category

import torch
from torch import Tensor

from ..diffusion.schedules import starting_noise, varied
from ..edits.identity import SourcePicture
from ..edits.meta import MAX_PROMPT_CHARS
from ..engine.base import BaseModel
from ..engine.memory import Meter, clear_errors
from ..errors import PromptError
from ..families.conditioning import Conditioning
from ..families.family import Denoiser
from ..pictures import Photo
from ..pictures.letterbox import Letterbox, to_square, to_tensor
from ..sampling.inversion import own_noise
from ..settings.stages import EditConfig
from ..training.pack import StageProgress, TrainingInput
from ..training.state import TrainingState

STAGES = ("encode", "load", "invert")
"""What is measured before an edit trains."""


@dataclass(frozen=True)
class Job:
    """One edit to make."""

    photo: Photo
    prompt: str
    state: TrainingState | None = None
    """Where its training goes on, if it was begun before."""


@dataclass
class Taken:
    """What an edit is made of, beside what training gives."""

    job: Job
    latents: Mapping[str, Tensor]
    """(C, H, W), by denoiser."""
    target: Conditioning
    """One row."""
    source: SourcePicture
    inverted_noise: dict[str, Tensor] = field(default_factory=dict)
    """(C, H, W) in fp16, by denoiser; empty where edits start from their seeds' noise."""
    measured: dict[str, dict[str, float | int | None]] = field(default_factory=dict)
    """Seconds and peak bytes of the stages before training."""


class Prepared(Iterator[TrainingInput]):
    """The tasks of jobs, which are taken and encoded group by group as tasks are asked for, and inverted one by one.

    **Memory**: the UNet is loaded once the first group is encoded, and stays.
    """

    def __init__(
        self,
        base: BaseModel,
        config: EditConfig,
        meter: Meter,
        groups: Iterator[Sequence[Job]],
        progress: StageProgress | None,
    ) -> None:
        self._base, self._config, self._meter, self._groups = base, config, meter, groups
        self._progress = progress
        self._ready: deque[Taken] = deque()
        self._count = 0
        self.taken: dict[int, Taken] = {}
        """By the number of their task; taken from here once it is trained."""

    def __next__(self) -> TrainingInput:
        while not self._ready:
            self._encode(next(self._groups))
        taken = self._ready.popleft()
        generator = torch.Generator().manual_seed(self._config.seed)
        extra = self._extra(taken)
        noise = {
            denoiser.name: self._start_noise(taken, denoiser, generator, extra[denoiser.name])
            for denoiser in self._base.denoisers
        }
        taken.measured = {name: self._meter.stages[name] for name in STAGES if name in self._meter.stages}
        self.taken[self._count] = taken
        self._count += 1
        return TrainingInput(taken.latents, taken.target, generator, noise, extra, taken.job.state)

    def _encode(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        for job in jobs:
            check_sentence(job.prompt)
            self._base.family.check_prompt(job.prompt)
        boxes = [Letterbox.fit(*job.photo.image.size, self._base.size_px) for job in jobs]
        sources = [_source(job.photo, box) for job, box in zip(jobs, boxes, strict=True)]
        with measured_stage(self._meter, "encode", "`device=cpu`"):
            # The negative prompt is for sampling and the empty one for inversion: the text encoder is loaded once.
            sentences = [*(job.prompt for job in jobs), self._config.sample.negative_prompt, ""]
            target = self._base.encode_text(sentences)
            squares = [to_square(job.photo.image, box) for job, box in zip(jobs, boxes, strict=True)]
            latents = self._base.encode(torch.cat([to_tensor(square) for square in squares]))
        if not self._count:
            with measured_stage(self._meter, "load", "`base_weights=int8`, or `device=cpu`"):
                for denoiser in self._base.denoisers:
                    self._base.network(denoiser)
        for number, (job, source) in enumerate(zip(jobs, sources, strict=True)):
            own = {name: x[number] for name, x in latents.items()}
            self._ready.append(Taken(job, own, target.rows([number]), source))

    def _extra(self, taken: Taken) -> dict[str, Conditioning]:
        """One row of what each denoiser takes beside the text: of a cascade, the photo as the one before sees it."""
        extra, lower = dict[str, Conditioning](), None
        for denoiser in self._base.denoisers:
            extra[denoiser.name] = self._base.family.make_extra(denoiser, 1, self._base.size, lower)
            lower = taken.latents[denoiser.name][None]
        return extra

    def _start_noise(self, taken: Taken, denoiser: Denoiser, generator: torch.Generator, extra: Conditioning) -> Tensor:
        """The noise (C, H, W) that sampling will start from with the first of its seeds."""
        seed, latents = self._config.sample.seeds[0], taken.latents[denoiser.name]
        drawn = starting_noise(latents.shape, torch.Generator().manual_seed(seed))
        if self._config.sample.start != "inverted":
            return drawn
        with measured_stage(self._meter, "invert", "`device=cpu`"):
            progress = named(self._progress, "invert")
            own = own_noise(self._base, denoiser, latents, generator, progress, extra=extra).half()
        taken.inverted_noise[denoiser.name] = own
        # As the file holds it: training is anchored to the noise that sampling starts from.
        return varied(own.float(), drawn, seed)


def check_sentence(sentence: str) -> None:
    """Makes sure that an edit file can hold the sentence.

    Raises:
        PromptError: too long, or with characters that cannot be shown.
    """
    if len(sentence) > MAX_PROMPT_CHARS:
        raise PromptError(f"the sentence has {len(sentence)} characters, expected at most {MAX_PROMPT_CHARS}")
    hidden = [letter for letter in sentence if category(letter) in ("Cc", "Cs") and letter not in "\t\n\r"]
    if hidden:
        raise PromptError(f"the sentence has the unprintable character {hidden[0]!a}; expected plain text")


def _source(photo: Photo, box: Letterbox) -> SourcePicture:
    return SourcePicture(
        sha256=photo.sha256,
        width_px=box.width_px,
        height_px=box.height_px,
        size_px=box.size_px,
        box=(box.left, box.top, box.right, box.bottom),
    )


def named(progress: StageProgress | None, stage: str) -> Callable[[int, int, str], None] | None:
    """`progress` for one stage."""
    if progress is None:
        return None
    return lambda step, steps, remark: progress(stage, step, steps, remark)


@contextlib.contextmanager
def measured_stage(meter: Meter, name: str, cheaper: str) -> Iterator[None]:
    """Measures a stage, and turns running out of memory in it into one clear error."""
    with clear_errors(name, cheaper), meter.stage(name):
        yield
