"""The marks in a checkpoint file: its prediction type, and whether its noise schedule ends at zero signal.

Programs write marks as empty tensors or as metadata, under many names (from the sources of ComfyUI, kohya-ss sd-scripts
and Forge, and from the specification at github.com/Stability-AI/ModelSpec).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from ...errors import IncompleteModelError, WrongFamilyError

_V_TENSORS = ("v_pred", "v_prediction", "vpred")
_ZERO_SNR_TENSORS = ("ztsnr", "zsnr", "zero_terminal_snr")
_OTHER_TENSORS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "flow_pred", "rectified_flow")
MARKERS = (*_V_TENSORS, *_ZERO_SNR_TENSORS, *_OTHER_TENSORS)
"""Names of tensors that are marks, not weights."""
_PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type", "ss_prediction_type")
_V_KEYS = ("ss_v_parameterization", "ss_v_prediction", "v_prediction", "v_parameterization", "v_pred")
_ZERO_SNR_KEYS = ("ss_zero_terminal_snr", "zero_terminal_snr", "modelspec.zero_terminal_snr", "ztsnr", "zsnr")
_ARCHITECTURE_KEYS = ("modelspec.architecture", "ss_base_model_version")
_CLIP_SKIP_KEYS = ("modelspec.encoder_layer", "ss_clip_skip")
"""Keys for the layer of the text encoder, counted from the end, that the model was trained on."""
_WORDS = {
    "epsilon": ("epsilon", "eps", "noise", "epsilon_prediction"),
    "v_prediction": ("v", "v_prediction", "v_pred", "vpred", "velocity"),
}
_YES, _NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "none", "null")


@dataclass(frozen=True)
class Marks:
    """The marks of a checkpoint; None for a missing mark."""

    prediction_type: str | None = None
    zero_snr: bool | None = None
    said_by: str = ""
    """Names of the marks, for messages."""
    clip_skip: str = ""
    """A request for an earlier layer of the text encoder, which is not applied; "" for the last layer."""


def read_marks(names: Collection[str], metadata: Mapping[str, str], label: str) -> Marks:
    """The marks of the checkpoint called `label`, from the names of its tensors and its metadata.

    Raises:
        IncompleteModelError: its marks contradict each other.
        WrongFamilyError: its prediction type is not supported.
    """
    # Some programs give the empty tensors the UNet's prefix.
    last = {name.removeprefix("model.diffusion_model."): name for name in names}
    if other := [name for name in _OTHER_TENSORS if name in last]:
        raise WrongFamilyError(
            f"{label} is marked as of another noise schedule ({other[0]}); expected a model that predicts epsilon or v"
        )
    said: dict[str, str] = {}
    zero: dict[str, bool] = {}
    said.update({name: "v_prediction" for name in _V_TENSORS if name in last})
    zero.update({name: True for name in _ZERO_SNR_TENSORS if name in last})
    for key in _PREDICTION_KEYS:
        if key in metadata:
            said[key] = _prediction(metadata[key], key, label)
    for key in _V_KEYS:
        if key in metadata and (answer := _answer(metadata[key], key, label)) is not None:
            said[key] = "v_prediction" if answer else "epsilon"
    for key in _ZERO_SNR_KEYS:
        if key in metadata and (answer := _answer(metadata[key], key, label)) is not None:
            zero[key] = answer
    for key in _ARCHITECTURE_KEYS:
        # Such as stable-diffusion-v2-768-v, sd_v2_v and sdxl_base_v1-0_v; other endings are no mark.
        if metadata.get(key, "").strip().lower().partition("/")[0].endswith(("-v", "_v", "-vpred", "_vpred")):
            said[key] = "v_prediction"
    for marks in (said, zero):
        if len(set(marks.values())) > 1:
            listed = ", ".join(f"{key}: {value}" for key, value in sorted(marks.items()))
            raise IncompleteModelError(
                f"{label} contradicts itself ({listed}); find out how it was trained, and remove the wrong mark"
            )
    return Marks(
        prediction_type=next(iter(said.values()), None),
        zero_snr=next(iter(zero.values()), None),
        said_by=", ".join([*said, *zero]),
        clip_skip=next((f"{key} {asked[:20]}" for key, asked in _clip_skips(metadata)), ""),
    )


def _clip_skips(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields keys and values that ask for a layer of the text encoder before its last."""
    for key in _CLIP_SKIP_KEYS:
        asked = metadata.get(key, "").strip()
        if asked.lower() not in ("", "1", "none", "null"):
            yield key, asked


def _prediction(text: str, key: str, label: str) -> str:
    word = text.strip().lower().replace("-", "_").replace(" ", "_")
    for kind, words in _WORDS.items():
        if word in words:
            return kind
    raise WrongFamilyError(f"{label} says {key}: {text[:40]!r}, expected epsilon or v")


def _answer(text: str, key: str, label: str) -> bool | None:
    word = text.strip().lower()
    if not word:
        # For an empty text the key alone is the mark; kohya's keys need a value.
        return None if key.startswith("ss_") else True
    if word in _YES:
        return True
    if word in _NO:
        # kohya writes None if the option was not set.
        return None if word in ("none", "null") else False
    raise IncompleteModelError(f"{label} says {key}: {text[:40]!r}, expected True or False; remove or mend that mark")
