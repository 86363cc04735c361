"""Replaces layers of a diffusers UNet by layers that keep less for the backward pass (see `layers.lean`)."""

from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..layers.lean import GroupNormSiLU, geglu


class _LeanResnet(ResnetBlock2D):  # type: ignore[misc]
    """The block with `GroupNormSiLU`, and with its shortcut before its second convolution.

    Gradient checkpointing recomputes a block up to its last saved tensor. The larger of the two frozen products saves
    none, and comes last here, so it is not recomputed.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = self.conv1(self.norm1(input_tensor))
        # In place: a convolution does not save its output.
        hidden = self.norm2(hidden.add_(self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        result: Tensor = shortcut + self.conv2(self.dropout(hidden))
        return result

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether this class computes the same as `module`.

        It does not for blocks that scale and shift by the time between second normalisation and activation, nor for
        blocks that change the picture's size.
        """
        return (
            type(module) is ResnetBlock2D
            and type(module.nonlinearity) is nn.SiLU
            and module.time_embedding_norm == "default"
            and module.time_emb_proj is not None
            and not module.skip_time_act
            and module.upsample is None
            and module.downsample is None
            and module.output_scale_factor == 1
        )


class _LeanGEGLU(nn.Module):
    """`GEGLU` around the same projection."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


def make_lean(unet: nn.Module) -> None:
    """Replaces residual blocks, normalisations followed by SiLU, and GEGLU, in place.

    The names of the weights do not change.
    """
    module: Any
    for module in list(unet.modules()):
        if _LeanResnet.suits(module):
            module.__class__ = _LeanResnet
            module.norm1, module.norm2 = GroupNormSiLU.of(module.norm1), GroupNormSiLU.of(module.norm2)
        elif isinstance(module, FeedForward) and type(module.net[0]) is GEGLU:
            module.net[0] = _LeanGEGLU(module.net[0].proj)
    norm = getattr(unet, "conv_norm_out", None)
    if isinstance(norm, nn.GroupNorm) and type(unet.conv_act) is nn.SiLU:
        unet.conv_norm_out, unet.conv_act = GroupNormSiLU.of(norm), nn.Identity()
