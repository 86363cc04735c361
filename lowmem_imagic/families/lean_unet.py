"""Where a diffusers UNet's layers are replaced by those that keep less for the backward pass (see `layers.lean`)."""

from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..layers.lean import GroupNormSiLU, geglu


class _FrugalResnet(ResnetBlock2D):  # type: ignore[misc]
    """The block with normalisations that activate, and its shortcut before its second convolution.

    Under gradient checkpointing a block is computed again up to the last tensor that it saved. At its end now stands
    the larger of the two frozen products, which saves none.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = self.conv1(self.norm1(input_tensor))
        # In place: a convolution keeps nothing of its output.
        hidden = self.norm2(hidden.add_(self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        result: Tensor = shortcut + self.conv2(self.dropout(hidden))
        return result

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether it does what `module` does: between its second normalisation and its activation, the other kind of
        block scales and shifts by the time; and some change the picture's size."""
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


class _FrugalGEGLU(nn.Module):
    """`GEGLU` around the same projection."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


def make_lean(unet: nn.Module) -> None:
    """Replaces residual blocks, normalisations with SiLU behind them, and GEGLU, in place.

    Names of weights stay as they are.
    """
    module: Any
    for module in list(unet.modules()):
        if _FrugalResnet.suits(module):
            module.__class__ = _FrugalResnet
            module.norm1, module.norm2 = GroupNormSiLU.of(module.norm1), GroupNormSiLU.of(module.norm2)
        elif isinstance(module, FeedForward) and type(module.net[0]) is GEGLU:
            module.net[0] = _FrugalGEGLU(module.net[0].proj)
    norm = getattr(unet, "conv_norm_out", None)
    if isinstance(norm, nn.GroupNorm) and type(unet.conv_act) is nn.SiLU:
        unet.conv_norm_out, unet.conv_act = GroupNormSiLU.of(norm), nn.Identity()
