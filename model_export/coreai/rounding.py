"""The encoder's graph, so that Core AI's float16 loses least: the same function, and no operation more in a block.

`coreai.conv2d` has no bias: what a convolution gives is rounded before its bias is added, and a bias under half a step
of float16 is lost, alike at all positions, which no later sum averages out. And a matmul adds up in float16.
"""

from typing import Any

from timm.models.fastvit import RepMixerBlock
from torch import Tensor, nn
from torch.nn import functional

from model_export.encoder.channel_first import ChannelAttention
from model_export.encoder.fp16 import Gain

CENTRE = 0.5  # of pixels in 0 to 1
_KEYS = 128  # that a matmul adds up; the sums of so many are added up wider


def arrange(fastvit: Any) -> None:
    """Rewrite a channel-first, range-safe FastViT in place; it takes pixels less `CENTRE` from then on."""
    module: Any
    for name, module in [*fastvit.named_modules()]:
        if isinstance(module, RepMixerBlock):
            fastvit.set_submodule(name, _Block(module))
        elif isinstance(module, ChannelAttention):
            module.__class__ = _Attention
    first = fastvit.stem[0]
    first.reparam_conv = _Centred(first.reparam_conv)


class _Block(nn.Module):
    """timm's `RepMixerBlock` without its mixer's bias on the stream, which is much larger: the MLP's branch, which is
    smaller, takes it there."""

    def __init__(self, block: RepMixerBlock) -> None:
        super().__init__()
        self.token_mixer, self.layer_scale, self.mlp = block.token_mixer, block.layer_scale, block.mlp
        mixer: Any = block.token_mixer.reparam_conv
        last: Any = block.mlp.fc2
        shift = mixer.bias.detach()
        mixer.bias = None
        gain = block.layer_scale.exponent if isinstance(block.layer_scale, Gain) else 0
        last.bias = nn.Parameter(last.bias.detach() + shift * 2.0**-gain, requires_grad=False)
        self.shift = nn.Parameter(shift[:, None, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.token_mixer(x)
        return stream + self.layer_scale(self.mlp(stream + self.shift))


class _Centred(nn.Module):
    """A convolution of pixels, for pixels less `CENTRE`: its bias no longer has to cancel what their mean gives."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        (height, width), weight = convolution.padding, convolution.weight.detach()
        self.padding = [width, width, height, height]
        convolution.padding = (0, 0)
        bias = convolution.bias.detach() + CENTRE * weight.sum((1, 2, 3))
        convolution.bias = nn.Parameter(bias, requires_grad=False)
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.convolution(functional.pad(x, self.padding, value=-CENTRE))
        return result


class _Attention(ChannelAttention):
    """The same, with sums over no more than `_KEYS` keys in a matmul."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = height * width
        if tokens <= _KEYS or tokens % _KEYS or batch != 1:
            return super().forward(x)
        q, k, v = self.qkv(x).view(3, self.heads, self.head_dim, tokens).unbind()
        weights = self.softmax(q.transpose(1, 2) @ k)
        parts = tokens // _KEYS
        values = v.reshape(self.heads, self.head_dim, parts, _KEYS).transpose(1, 2)
        shares = weights.reshape(self.heads, tokens, parts, _KEYS).permute(0, 2, 3, 1)
        mixed: Tensor = self.proj((values @ shares).sum(1).reshape(batch, channels, height, width))
        return mixed
