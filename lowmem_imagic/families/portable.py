"""Converts adapters to a form that all other programs read in the same way.

An edit file is an ordinary LoRA to other programs. Its form follows from how three of them read it:

- diffusers 0.33 to 0.42 look up the alpha of a kohya attention layer under another name than they store it
  (``get_peft_kwargs`` in ``utils/peft_utils.py``) and take the most common alpha instead. So all layers have one alpha,
  and the rest of a layer's scale is in its factors. That costs no byte; one rank for all attention layers would cost
  15 %.
- stable-diffusion.cpp reads the rank from the last side above 1 of ``lora_down``. So a layer has
  `MIN_RANK` or more directions.
- InvokeAI tells Stable Diffusion 1, 2 and XL apart by the input width of the first layer, by name, that projects the
  text or the time (``lora_token_vector_length`` in ``model_util.py``). So that first layer must project the text.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers.adapter_pack import Factors
from ..layers.truncation import MIN_RANK
from .adapter_names import kohya_key

ALPHA = 1.0
"""Alpha of layers whose scale is moved into their factors. This makes the factors larger, away from fp16's smallest
numbers."""

_TEXT = ("attn2_to_k", "attn2_to_v")
"""Endings of layers that project the text."""
_TIME = "time_emb_proj"


def portable(adapter: Mapping[str, Factors], network: nn.Module) -> dict[str, Factors]:
    """The adapter in the form for other programs, as fp32 on the CPU.

    Args:
        adapter: factors by kohya key.
        network: the adapter's UNet, on any device.
    """
    return scaled_alike(_with_text_layer(adapter, network))


def scaled_alike(adapter: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same updates with one alpha for all layers and `MIN_RANK` or more directions each.

    An adapter of this form is returned unchanged. Otherwise alpha becomes `ALPHA`, the rest of the scale is split
    evenly between the factors, and zeros fill up missing directions.
    """
    alphas = {alpha for _, _, alpha in adapter.values()}
    if len(alphas) <= 1 and all(down.shape[0] >= MIN_RANK for down, _, _ in adapter.values()):
        return dict(adapter)
    return {key: _rescaled(*factors) for key, factors in adapter.items()}


def baked(adapter: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same updates with alpha equal to the rank, as fp32 on the CPU: the scale is split evenly between the factors.

    peft's files have no alpha, and readers take the rank for it.
    """
    result = {}
    for key, (down, up, alpha) in adapter.items():
        root = (alpha / len(down)) ** 0.5
        result[key] = (root * down, root * up, float(len(down)))
    return result


def _rescaled(down: Tensor, up: Tensor, alpha: float) -> Factors:
    """Factors of the same update with alpha `ALPHA`."""
    own = down.shape[0]
    rank = max(own, MIN_RANK)
    root = (alpha / own * rank / ALPHA) ** 0.5
    filled_down, filled_up = torch.zeros(rank, *down.shape[1:]), torch.zeros(len(up), rank, *up.shape[2:])
    filled_down[:own], filled_up[:, :own] = root * down, root * up
    return filled_down, filled_up, ALPHA


def _with_text_layer(adapter: Mapping[str, Factors], network: nn.Module) -> dict[str, Factors]:
    """The adapter with a layer that projects the text before, by name, any layer that projects the time.

    Without such a layer, the network's first one gets an update of zeros: 4 kB for Stable Diffusion 1.5.
    """
    projections = [key for key in sorted(adapter) if key.endswith((*_TEXT, _TIME))]
    if projections and projections[0].endswith(_TEXT):
        return dict(adapter)
    layers = {kohya_key(name): layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    texts = sorted(key for key in layers if key.endswith(_TEXT))
    if not texts or (projections and texts[0] > projections[0]):
        return dict(adapter)
    layer = layers[texts[0]]
    down, up = torch.zeros(MIN_RANK, layer.in_features), torch.zeros(layer.out_features, MIN_RANK)
    # The alpha of another layer, so that all layers still have one alpha.
    alpha = next((alpha for _, _, alpha in adapter.values()), ALPHA)
    return {**adapter, texts[0]: (down, up, alpha)}
