"""A whole model in one ``.safetensors`` file, in Stable Diffusion's original layout, and its configuration."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import IncompleteModelError, UnknownModelError
from .. import kinds
from . import layout
from .configuration import locate_configuration
from .markers import MARKERS, Marks, read_marks
from .source import SHORT_NAMES, Folder, hash_files
from .weights import Entry, Weights, read_header

UNET = "model.diffusion_model."
PREFIXES = {
    "unet": (UNET,),
    "vae": ("first_stage_model.", "vae."),
    # The prefixes of the original, of Stability's generative-models, of ComfyUI, and of several trainers.
    "text_encoder": (
        "cond_stage_model.",
        "conditioner.embedders.0.",
        "text_encoders.",
        "text_encoder.",
        "te.",
        "te1.",
        "clip_l.",
        "clip_h.",
    ),
}
"""Prefixes of the names of a component's tensors in a single checkpoint."""
_EXTRAS = {
    "unet": re.compile(r"(?!)"),
    # The discriminator and the perceptual network that the autoencoder was trained with, and an average of weights.
    "vae": re.compile(r"(loss|model_ema)\."),
    # Position ids and masks, which the classes make themselves; CLIP's picture encoder, and layers that compare text
    # with pictures.
    "text_encoder": re.compile(
        r"(.*\.)?(position_ids|attn_mask|attention_mask)$|(.*\.)?(logit_scale|logit_bias|text_projection(\.weight)?)$"
        r"|(.*\.)?(visual|vision_model|visual_projection)(\.|$)"
    ),
}
"""Tensors of each part, named without its prefix, that do not affect pictures."""
_BESIDE = re.compile(
    # Averages of weights (EMA), kept for further training; diffusers takes the plain weights too.
    r"(model_ema|ema_unet|ema)\.|loss\."
    # The noise schedule, which is in the configuration; `alphas_cumprod` is compared with it.
    r"|(model\.)?(betas|alphas_cumprod(_prev|_original)?|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|lvlb_weights"
    r"|logvar|scale_factor|denoiser\.sigmas)$"
    # Counters of trainers.
    r"|(global_step|epoch|iteration|step)$"
)
"""Tensors outside of the parts that do not affect pictures."""
CONFIGURATIONS = {768: "sd15"}
"""Model with the configuration of a single checkpoint, by width of the text conditioning."""
BY_PREDICTION = {(1024, "v_prediction"): "sd21", (1024, "epsilon"): "sd21-base"}
"""The same by width and marked prediction type, for a width with several models."""


@dataclass(frozen=True)
class SingleFile:
    """One ``.safetensors`` checkpoint in Stable Diffusion's original layout.

    Raises:
        IncompleteModelError: the file is no such checkpoint, or lacks autoencoder or text encoder.
        WrongFamilyError: the checkpoint is of another kind of model.
    """

    path: Path
    label: str
    config_folder: str | None = None
    """Source of the configurations and the tokenizer: a short name, a Hub id or a diffusers folder. None chooses by the
    checkpoint's own shapes and marks."""
    revision: None = None

    def __post_init__(self) -> None:
        kinds.check_checkpoint(self.path.name, {name: entry.shape for name, entry in self._header.items()}, UNET)
        for component, prefixes in PREFIXES.items():
            if not any(name.startswith(prefixes) for name in self._header):
                raise IncompleteModelError(
                    f"{self.path.name} lacks the {component} (no tensors {prefixes[0]}*); "
                    "expected a checkpoint with UNet, autoencoder and text encoder in one file"
                )
        _ = self.marks

    @cached_property
    def _contents(self) -> tuple[dict[str, Entry], dict[str, str]]:
        return read_header(self.path, self.path.name)

    @property
    def _header(self) -> dict[str, Entry]:
        """Type and shape of each tensor."""
        return self._contents[0]

    @cached_property
    def marks(self) -> Marks:
        """The checkpoint's marks."""
        return read_marks(self._header, self._contents[1], self.path.name)

    @property
    def width(self) -> int:
        """Width D of the text conditioning; 0 without any."""
        shapes = (entry.shape for name, entry in self._header.items() if name.endswith(".attn2.to_k.weight"))
        return next((shape[-1] for shape in shapes if shape), 0)

    @cached_property
    def configuration(self) -> Folder:
        """The diffusers folder with the configurations and the tokenizer.

        Raises:
            IncompleteModelError: the configuration is unknown, or cannot be downloaded.
        """
        name = self.config_folder or CONFIGURATIONS.get(self.width)
        if name is None and self.marks.prediction_type is not None:
            name = BY_PREDICTION.get((self.width, self.marks.prediction_type))
        if name is None:
            # Models of width 1024 predict either noise or velocity.
            raise IncompleteModelError(
                f"{self.path.name} does not say how it is configured (text width {self.width}); "
                "name a model or give a diffusers folder of the same family, such as sd21 or sd21-base (`model_config`)"
            )
        try:
            return locate_configuration(name)
        except UnknownModelError as error:
            repository = SHORT_NAMES.get(name, name)
            if repository not in str(error):
                raise
            raise IncompleteModelError(
                f"{self.path.name} needs the configuration and the tokenizer of {name}: "
                f"{str(error).partition('; ')[0]}; connect once (2 MB), or give a diffusers folder of the same family "
                "(`model_config`)"
            ) from error

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of the checkpoint."""
        return {"checkpoint": hash_files([self.path])}

    @property
    def ignored(self) -> list[str]:
        """Unknown tensors outside of the parts; by-products of training are left out."""
        parts = tuple(prefix for prefixes in PREFIXES.values() for prefix in prefixes)
        return sorted(
            name
            for name in self._header
            if not name.startswith(parts) and name not in MARKERS and not _BESIDE.match(name)
        )

    def beside(self, name: str) -> Any:
        """The tensor called `name` outside of the parts, such as one of the noise schedule; None if there is none."""
        entry = self._header.get(name)
        return None if entry is None else Weights({name: entry}, self.path.name)[name]

    def tensors(self, component: str, configuration: Mapping[str, Any]) -> layout.Tensors:
        """A part's tensors under diffusers' names, for this configuration of the part.

        Raises:
            IncompleteModelError: the layout is unknown, or tensors are beyond the configuration.
            WrongFamilyError: the weights have an unsupported format.
        """
        entries: dict[str, Entry] = {}
        for name, entry in self._header.items():
            prefix = next((prefix for prefix in PREFIXES[component] if name.startswith(prefix)), None)
            core = name.removeprefix(prefix or "")
            if prefix is None or core in MARKERS or _EXTRAS[component].match(core):
                continue
            if core in entries:
                raise IncompleteModelError(f"{self.path.name} has two tensors {core[:100]} of the {component}")
            entries[core] = entry
        weights = Weights(entries, f"{self.path.name}: the {component}")
        places = layout.ORIGINAL[component](weights.names, configuration)
        if unknown := sorted(set(weights.names) - {place.name for place in places.values()}):
            raise IncompleteModelError(
                f"{self.path.name}: the {component} has {len(unknown)} tensors that the configuration of "
                f"{self.configuration.label} lacks, such as {', '.join(name[:100] for name in unknown[:3])}; expected "
                "a checkpoint that fits it, so give a configuration of the same family (`model_config`)"
            )
        return layout.Tensors(
            weights, {new: place for new, place in places.items() if not new.startswith(layout.UNUSED)}
        )
