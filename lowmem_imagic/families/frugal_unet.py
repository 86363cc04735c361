"""Where a diffusers UNet's layers are replaced by those that keep less for the backward pass (see `frugal`)."""

from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..frugal import GroupNormSiLU, geglu


class _TimeSiLU(nn.SiLU):
    """SiLU for the time embedding (R, D) alone: pictures come here normalised and activated already."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 2 else x


class _FrugalGEGLU(nn.Module):
    """`GEGLU` around the same projection."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


def make_frugal(unet: nn.Module) -> None:
    """Replaces normalisations with SiLU behind them, and GEGLU, in place; names of weights stay as they are."""
    for module in list(unet.modules()):
        # Between norm2 and the activation, the other kind of block scales and shifts by the time.
        if isinstance(module, ResnetBlock2D) and module.time_embedding_norm == "default":
            if type(module.nonlinearity) is nn.SiLU:
                module.norm1, module.norm2 = GroupNormSiLU.of(module.norm1), GroupNormSiLU.of(module.norm2)
                module.nonlinearity = _TimeSiLU()
        elif isinstance(module, FeedForward) and type(module.net[0]) is GEGLU:
            module.net[0] = _FrugalGEGLU(module.net[0].proj)
    norm = getattr(unet, "conv_norm_out", None)
    if isinstance(norm, nn.GroupNorm) and type(unet.conv_act) is nn.SiLU:
        unet.conv_norm_out, unet.conv_act = GroupNormSiLU.of(norm), nn.Identity()
