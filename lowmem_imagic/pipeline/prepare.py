"""Prepares photos and sentences for training: encodes them, and finds the noise that each edit is anchored to.

Stage 1 starts from an edit's sentence if it has one. Several sentences, or none, leave open what the photo shows: then
it starts from the base's own description of the photo (`sampling.description`).
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from unicodedata import category

import torch
from torch import Tensor

from ..diffusion.schedules import starting_noise, varied
from ..edits.edit import MAX_NOISE_SIDE
from ..edits.identity import SourcePicture
from ..edits.meta import MAX_PROMPT_CHARS, MAX_SENTENCES
from ..engine.base import BaseModel
from ..engine.memory import Meter, measured_stage
from ..errors import ConfigError, PromptError
from ..families.conditioning import Conditioning
from ..families.family import Denoiser
from ..geometry import Letterbox
from ..pictures import Photo
from ..pictures.letterbox import into_canvas, to_tensor
from ..sampling.description import NEUTRAL, describe
from ..sampling.inversion import own_noise
from ..settings.stages import EditConfig
from ..training.pack import StageProgress, TrainingInput
from ..training.state import TrainingState

STAGES = ("encode", "load", "describe", "invert")
"""Stages measured before an edit trains."""


@dataclass(frozen=True)
class Job:
    """One edit to make."""

    photo: Photo
    prompt: str | Sequence[str] = ()
    """Its sentence, several of them, or none, to be asked later."""
    state: TrainingState | None = None
    """The saved training to continue; None begins anew."""

    @property
    def sentences(self) -> tuple[str, ...]:
        """Its sentences."""
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)


@dataclass
class EncodedPhoto:
    """The parts of an edit that do not come from training."""

    number: int
    """The job's number."""
    job: Job
    letterbox: Letterbox
    """Where the photo lies in the model's picture."""
    latents: Mapping[str, Tensor]
    """(C, H, W), by denoiser."""
    start_sentence: str
    """The sentence that stage 1 starts from; "" until the photo is described."""
    start: Conditioning | None
    """Its conditioning, one row."""
    own_noise: dict[str, Tensor] = field(default_factory=dict)
    """(C, H, W) in fp16, by denoiser; empty if edits start from their seeds' noise."""
    measured: dict[str, dict[str, float | int | None]] = field(default_factory=dict)
    """Seconds and peak bytes of the stages before training."""

    @property
    def source(self) -> SourcePicture:
        """The photo, by hash and geometry."""
        return SourcePicture.of(self.job.photo.sha256, self.letterbox)


class Prepared(Iterator[TrainingInput]):
    """The training inputs of jobs: asks for and encodes one group of jobs at a time, and inverts one photo at a time.

    Photos of one size in a group follow each other, so that they share passes.

    **Memory**: the UNet is loaded after the first group is encoded, and stays loaded.
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
        if not photo.start_sentence:
            with measured_stage(self._meter, "describe", "`device=cpu`"):
                first, progress = self._base.denoisers[0].name, named(self._progress, "describe")
                photo.start_sentence = describe(self._base, photo.latents[first], extra[first], progress)
        start = photo.start
        if start is None:
            start = self._base.encode_text([photo.start_sentence])
        noise = {
            denoiser.name: self._start_noise(photo, denoiser, generator, extra[denoiser.name])
            for denoiser in self._base.denoisers
        }
        photo.measured = {name: self._meter.stages[name] for name in STAGES if name in self._meter.stages}
        self.encoded[photo.number] = photo
        return TrainingInput(
            photo.latents, start, generator, noise, extra, photo.job.state, photo.number, photo.start_sentence
        )

    def _encode(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        for job in jobs:
            check_sentences(job.sentences)
            for sentence in job.sentences:
                self._base.family.check_prompt(sentence)
        check_sentence(self._config.sample.negative_prompt, "the negative prompt")
        check_sentence(self._config.sample.source_prompt, "the source prompt")
        starts = [self._start(job) for job in jobs]
        with measured_stage(self._meter, "encode", "`device=cpu`"):
            # Negative and source prompt are for sampling and the empty one for inversion: the encoder is loaded once.
            asked, sampling = [sentence for job in jobs for sentence in job.sentences], self._config.sample
            text = self._base.encode_text([*starts, *asked, sampling.negative_prompt, sampling.source_prompt, ""])
            boxes = [self._letterbox(job.photo) for job in jobs]
            for size in dict.fromkeys(box.size for box in boxes):
                numbers = [number for number, box in enumerate(boxes) if box.size == size]
                canvases = [into_canvas(jobs[number].photo.image, boxes[number]) for number in numbers]
                latents = self._base.encode(torch.cat([to_tensor(canvas) for canvas in canvases]))
                for row, number in enumerate(numbers):
                    own = {name: x[row] for name, x in latents.items()}
                    job, sentence = jobs[number], starts[number]
                    # A description is encoded alone, also one from a state: the training goes on with the same bits.
                    start = text.rows([number]) if sentence else None
                    if not sentence and job.state is not None:
                        sentence = job.state.start_sentence
                    self._waiting.append(EncodedPhoto(self._count + number, job, boxes[number], own, sentence, start))
        if not self._count:
            with measured_stage(self._meter, "load", "`base_weights=int8`, or `device=cpu`"):
                for denoiser in self._base.denoisers:
                    self._base.network(denoiser)
        self._count += len(jobs)

    def _start(self, job: Job) -> str:
        """The sentence that stage 1 starts from; "" if the photo must be described first."""
        if len(job.sentences) == 1:
            return job.sentences[0]
        return NEUTRAL if self._base.family.vocabulary is None else ""

    def _letterbox(self, photo: Photo) -> Letterbox:
        """Where a photo lies in the model's picture."""
        return Letterbox.fit(*photo.image.size, self._base.sizes.nearest(*photo.image.size))

    def _extra(self, photo: EncodedPhoto) -> dict[str, Conditioning]:
        """The conditioning beside the text, one row, by denoiser; in a cascade with the previous denoiser's latents."""
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
        of_sampling = torch.Generator().manual_seed(seed)
        drawn = starting_noise(latents.shape, of_sampling)
        if self._config.sample.start != "inverted":
            return drawn
        if max(latents.shape[-2:]) > MAX_NOISE_SIDE:
            # Not only after training.
            raise ConfigError(
                f"the photo's own noise has {latents.shape[-1]} x {latents.shape[-2]} numbers with this base, expected "
                f"at most {MAX_NOISE_SIDE} a side, which an edit file holds; take `start=photo`"
            )
        with measured_stage(self._meter, "invert", "`device=cpu`"):
            progress = named(self._progress, "invert")
            # As in sampling: a noised lower picture has the seed's own noise.
            extra = denoiser.drawn(extra, [of_sampling], training=False)
            own = own_noise(self._base, denoiser, latents, generator, progress, extra=extra).half()
        photo.own_noise[denoiser.name] = own
        # Rounded as in the file: sampling starts from exactly the noise that training is anchored to.
        return varied(own.float(), drawn, seed)


def check_sentence(sentence: str, what: str = "the sentence") -> None:
    """Checks that an edit file can contain the sentence, which is `what` in messages.

    Raises:
        PromptError: the sentence is too long, or has unprintable characters.
    """
    if len(sentence) > MAX_PROMPT_CHARS:
        raise PromptError(f"{what} has {len(sentence)} characters, expected at most {MAX_PROMPT_CHARS}")
    hidden = [letter for letter in sentence if category(letter) in ("Cc", "Cs") and letter not in "\t\n\r"]
    if hidden:
        raise PromptError(f"{what} has the unprintable character {hidden[0]!a}; expected plain text")


def check_sentences(sentences: Sequence[str]) -> None:
    """Makes sure that an edit file can hold the sentences together.

    Raises:
        PromptError: too many, one of them twice, or see `check_sentence`.
    """
    if len(sentences) > MAX_SENTENCES:
        raise PromptError(f"found {len(sentences)} sentences, expected at most {MAX_SENTENCES}")
    for number, sentence in enumerate(sentences):
        check_sentence(sentence)
        if sentence in sentences[:number]:
            raise PromptError(f"the sentence {sentence!r} is there twice, expected each once")


def named(progress: StageProgress | None, stage: str) -> Callable[[int, int, str], None] | None:
    """`progress` for one stage."""
    if progress is None:
        return None
    return lambda step, steps, remark: progress(stage, step, steps, remark)
