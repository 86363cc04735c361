"""Photos and sentences on their way into training: encoded, and each with the noise its edit is anchored to."""

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
from ..engine.memory import Meter, measured_stage
from ..errors import PromptError
from ..families.conditioning import Conditioning
from ..families.family import Denoiser
from ..geometry import Letterbox
from ..pictures import Photo
from ..pictures.letterbox import into_canvas, to_tensor
from ..sampling.inversion import own_noise
from ..settings.stages import EditConfig
from ..training.pack import StageProgress, TrainingInput
from ..training.state import TrainingState

STAGES = ("encode", "load", "invert")
"""Stages measured before an edit trains."""
COARSE_SIDE = 4
"""Cells each way of the photo's low frequencies in an edit: 128 bytes for four channels."""


@dataclass(frozen=True)
class Job:
    """One edit to make."""

    photo: Photo
    prompt: str
    state: TrainingState | None = None
    """Where its training goes on, if it was begun before."""


@dataclass
class EncodedPhoto:
    """The parts of an edit that do not come from training."""

    number: int
    """Of its job."""
    job: Job
    letterbox: Letterbox
    """Where the photo lies in the model's picture."""
    latents: Mapping[str, Tensor]
    """(C, H, W), by denoiser."""
    target: Conditioning
    """One row."""
    own_noise: dict[str, Tensor] = field(default_factory=dict)
    """(C, H, W) in fp16, by denoiser; empty where edits start from their seeds' noise."""
    measured: dict[str, dict[str, float | int | None]] = field(default_factory=dict)
    """Seconds and peak bytes of the stages before training."""

    @property
    def source(self) -> SourcePicture:
        """The photo, by hash and geometry."""
        return SourcePicture.of(self.job.photo.sha256, self.letterbox)


class Prepared(Iterator[TrainingInput]):
    """The training inputs of jobs, which are asked for and encoded group by group, and inverted one by one.

    Of a group, photos of one size come one after the other: they share passes.

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
        self._waiting: deque[EncodedPhoto] = deque()
        self._count = 0
        self.encoded: dict[int, EncodedPhoto] = {}
        """Edits in training, by number; each leaves once trained."""

    def __next__(self) -> TrainingInput:
        while not self._waiting:
            self._encode(next(self._groups))
        photo = self._waiting.popleft()
        generator = torch.Generator().manual_seed(self._config.seed)
        extra = self._extra(photo)
        noise = {
            denoiser.name: self._start_noise(photo, denoiser, generator, extra[denoiser.name])
            for denoiser in self._base.denoisers
        }
        photo.measured = {name: self._meter.stages[name] for name in STAGES if name in self._meter.stages}
        self.encoded[photo.number] = photo
        return TrainingInput(photo.latents, photo.target, generator, noise, extra, photo.job.state, photo.number)

    def _encode(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        for job in jobs:
            check_sentence(job.prompt)
            self._base.family.check_prompt(job.prompt)
        with measured_stage(self._meter, "encode", "`device=cpu`"):
            # The negative prompt is for sampling and the empty one for inversion: the text encoder is loaded once.
            sentences = [*(job.prompt for job in jobs), self._config.sample.negative_prompt, ""]
            target = self._base.encode_text(sentences)
            boxes = [self._letterbox(job.photo) for job in jobs]
            for size in dict.fromkeys(box.size for box in boxes):
                numbers = [number for number, box in enumerate(boxes) if box.size == size]
                canvases = [into_canvas(jobs[number].photo.image, boxes[number]) for number in numbers]
                latents = self._base.encode(torch.cat([to_tensor(canvas) for canvas in canvases]))
                for row, number in enumerate(numbers):
                    own = {name: x[row] for name, x in latents.items()}
                    photo = EncodedPhoto(self._count + number, jobs[number], boxes[number], own, target.rows([number]))
                    self._waiting.append(photo)
        if not self._count:
            with measured_stage(self._meter, "load", "`base_weights=int8`, or `device=cpu`"):
                for denoiser in self._base.denoisers:
                    self._base.network(denoiser)
        self._count += len(jobs)

    def _letterbox(self, photo: Photo) -> Letterbox:
        """Where a photo lies in the model's picture."""
        return Letterbox.fit(*photo.image.size, self._base.sizes.nearest(*photo.image.size))

    def _extra(self, photo: EncodedPhoto) -> dict[str, Conditioning]:
        """One row of what each denoiser takes beside the text: of a cascade, the photo as the one before sees it."""
        extra, lower = dict[str, Conditioning](), None
        for denoiser in self._base.denoisers:
            extra[denoiser.name] = self._base.family.make_extra(denoiser, 1, photo.letterbox.size, lower)
            lower = photo.latents[denoiser.name][None]
        return extra

    def _start_noise(
        self, photo: EncodedPhoto, denoiser: Denoiser, generator: torch.Generator, extra: Conditioning
    ) -> Tensor:
        """The noise (C, H, W) that sampling will start from with the first of its seeds."""
        seed, latents = self._config.sample.seeds[0], photo.latents[denoiser.name]
        drawn = starting_noise(latents.shape, torch.Generator().manual_seed(seed))
        if self._config.sample.start != "inverted":
            return drawn
        with measured_stage(self._meter, "invert", "`device=cpu`"):
            progress = named(self._progress, "invert")
            own = own_noise(self._base, denoiser, latents, generator, progress, extra=extra).half()
        photo.own_noise[denoiser.name] = own
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


def named(progress: StageProgress | None, stage: str) -> Callable[[int, int, str], None] | None:
    """`progress` for one stage."""
    if progress is None:
        return None
    return lambda step, steps, remark: progress(stage, step, steps, remark)
