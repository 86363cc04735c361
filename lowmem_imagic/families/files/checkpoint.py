"""A whole model, or its UNet alone, in one ``.safetensors`` file of the original layout, and its configuration."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import IncompleteModelError, UnknownModelError
from .. import kinds
from . import layout
from .components import components_of
from .configuration import locate_configuration
from .markers import MARKERS, Marks, read_marks
from .mixed import Elsewhere, Mixed, Others
from .source import Folder, hash_files
from .weights import Entry, Weights, read_header

UNET = "model.diffusion_model."
_AUTOENCODER = ("first_stage_model.", "vae.")
# The prefixes of the original, of Stability's generative-models, of ComfyUI, and of several trainers.
_TEXT_ENCODER = (
    "cond_stage_model.",
    "conditioner.embedders.0.",
    "text_encoders.",
    "text_encoder.",
    "te.",
    "te1.",
    "clip_l.",
    "clip_h.",
)
_XL_TEXT_ENCODERS = {
    "text_encoder": ("conditioner.embedders.0.", "text_encoders.clip_l.", "text_encoder.", "te1.", "clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g.", "text_encoder_2.", "te2.", "clip_g."),
}
_BARE_UNET = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
"""Beginnings of the names of all tensors of a UNet in a file with nothing else."""
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
    # SDXL takes the projection of its second text encoder.
    "text_encoder_2": re.compile(
        r"(.*\.)?(position_ids|attn_mask|attention_mask)$|(.*\.)?(logit_scale|logit_bias)$"
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
_XL_WIDTH = 2048
_BY_DEPTH = {(2, 10, 10): "sdxl", (2, 4, 0): "ssd-1b", (1, 2, 0): "vega"}
"""The same for SDXL and the models made from it by leaving out layers, by the numbers of transformer layers at the end
of the second level, at the end of the third, and in the middle."""


@dataclass(frozen=True)
class SingleFile:
    """One ``.safetensors`` checkpoint in the original layout of Stable Diffusion 1, 2 or XL.

    Raises:
        IncompleteModelError: the file is no such checkpoint, or components are neither in it nor elsewhere.
        WrongFamilyError: the checkpoint is of another kind of model.
    """

    path: Path
    label: str
    config_folder: str | None = None
    """Source of the configurations and the tokenizer: a short name, a Hub id or a diffusers folder. None chooses by the
    checkpoint's own shapes and marks."""
    others: Others = Others()  # noqa: RUF009 (immutable)
    """Folders with components that are not taken from the file."""
    revision: None = None

    def __post_init__(self) -> None:
        for component, prefixes in self._prefixes.items():
            if component not in self.elsewhere and not any(name.startswith(prefixes) for name in self._header):
                setting = "vae" if component == "vae" else "text_from"
                raise IncompleteModelError(
                    f"{self.path.name} lacks the {component} (no tensors {prefixes[0]}*); expected a checkpoint with "
                    f"UNet, autoencoder and text encoder in one file, or a folder with the {component} (`{setting}`)"
                )
        for component, folder in self.elsewhere.items():
            folder.files(component)
        _ = self.marks

    @cached_property
    def kind(self) -> kinds.Kind:
        """The kind of model, by names and shapes of its tensors."""
        return kinds.read_kind(self.path.name, {name: entry.shape for name, entry in self._header.items()}, UNET)

    @cached_property
    def elsewhere(self) -> Elsewhere:
        """Folder of each component that is not taken from the file."""
        return self.others.elsewhere(components_of({"_class_name": self.kind.pipeline}))

    @property
    def _prefixes(self) -> dict[str, tuple[str, ...]]:
        """Prefixes of the names of each component's tensors."""
        unet = (self.kind.unet,) if self.kind.unet else _BARE_UNET
        text = _XL_TEXT_ENCODERS if self.kind.is_xl else {"text_encoder": _TEXT_ENCODER}
        return {"unet": unet, "vae": _AUTOENCODER, **text}

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

    @property
    def _model(self) -> str | None:
        """Short name of the model with this file's configuration; None if it is not known."""
        if self.kind.is_xl:
            second, third, middle = map(self._depth, ("input_blocks.5.1.", "input_blocks.8.1.", "middle_block.1."))
            return _BY_DEPTH.get((second, third, middle)) if self.width == _XL_WIDTH else None
        # Models of width 1024 predict either noise or velocity.
        return CONFIGURATIONS.get(self.width) or BY_PREDICTION.get((self.width, self.marks.prediction_type or ""))

    def _depth(self, block: str) -> int:
        """Number of transformer layers in a block of the UNet."""
        pattern = re.compile(re.escape(f"{self.kind.unet}{block}") + r"transformer_blocks\.(\d{1,3})\.")
        return max((int(match[1]) + 1 for match in map(pattern.match, self._header) if match), default=0)

    @cached_property
    def configuration(self) -> Folder:
        """The configurations and the tokenizers.

        Raises:
            IncompleteModelError: the configuration is unknown, or cannot be downloaded.
            WrongFamilyError: the configuration, or a component elsewhere, is of another family.
        """
        name = self.config_folder or self._model
        if name is None:
            example = "sdxl" if self.kind.is_xl else "sd21 or sd21-base"
            raise IncompleteModelError(
                f"{self.path.name} does not say how it is configured (text width {self.width}); "
                f"name a model or give a diffusers folder of the same family, such as {example} (`model_config`)"
            )
        try:
            folder = locate_configuration(name)
        except UnknownModelError as error:
            if name not in str(error):
                raise
            raise IncompleteModelError(
                f"{self.path.name} needs the configuration and the tokenizer of {name}: "
                f"{str(error).partition('; ')[0]}; connect once (2 MB), or give a diffusers folder of the same family "
                "(`model_config`)"
            ) from error
        kinds.check_configuration(
            folder.config(".", "model_index.json"), self.path.name, folder.label, is_xl=self.kind.is_xl
        )
        return Mixed.of(folder, self.elsewhere)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of the checkpoint, and of the components elsewhere."""
        others = {component: hash_files(folder.files(component)) for component, folder in self.elsewhere.items()}
        return {"checkpoint": hash_files([self.path]), **others}

    @property
    def ignored(self) -> list[str]:
        """Unknown tensors outside of the parts; by-products of training are left out."""
        parts = tuple(prefix for prefixes in self._prefixes.values() for prefix in prefixes)
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
        """A component's tensors under diffusers' names, for this configuration of the component.

        Raises:
            IncompleteModelError: the layout is unknown, or tensors are beyond the configuration.
            WrongFamilyError: the weights have an unsupported format.
        """
        prefixes, entries = self._prefixes[component], dict[str, Entry]()
        for name, entry in self._header.items():
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            core = name.removeprefix(prefix or "") if prefixes is not _BARE_UNET else name
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
