"""The encoder's graph, so that Core AI's float16 loses least: the same function, and no operation more in a block.

`coreai.conv2d` has no bias: what a convolution gives is rounded before its bias is added, and a bias under half a step
of float16 is lost, alike at all positions, which no later sum averages out. And a matmul adds up in float16.
"""

from typing import Any

from timm.layers import ConvMlp
from timm.models.fastvit import RepMixerBlock
from torch import Tensor, nn
from torch.nn import functional

from model_export.encoder.channel_first import ChannelAttention
from model_export.encoder.fp16 import Gain

CENTRE = 0.5  # of pixels in 0 to 1
_KEYS = 128  # that a matmul adds up; the sums of so many are added in float32


def arrange(fastvit: Any) -> None:
    """Rewrite a channel-first, range-safe FastViT in place; it takes pixels less `CENTRE` from then on."""
    for name, module in [*fastvit.named_modules()]:
        if isinstance(module, ConvMlp):
            _through(module.conv.conv, module.fc1)
        elif isinstance(module, RepMixerBlock):
            fastvit.set_submodule(name, _Block(module))
        elif isinstance(module, ChannelAttention):
            module.__class__ = _Attention
    first = fastvit.stem[0]
    first.reparam_conv = _Centred(first.reparam_conv)


def _through(convolution: nn.Conv2d, linear: nn.Conv2d) -> None:
    """A bias goes through the 1 x 1 convolution behind it into that one's: an addition less."""
    weight, bias = linear.weight.detach().flatten(1), convolution.bias
    assert bias is not None and linear.bias is not None
    linear.bias = nn.Parameter(linear.bias.detach() + weight @ bias.detach(), requires_grad=False)
    convolution.bias = None


class _Block(nn.Module):
    """timm's `RepMixerBlock` without its mixer's bias on the stream, which is much larger: the MLP's branch, which is
    smaller, takes it there."""

    def __init__(self, block: RepMixerBlock) -> None:
        super().__init__()
        self.token_mixer, self.layer_scale, self.mlp = block.token_mixer, block.layer_scale, block.mlp
        mixer, last = block.token_mixer.reparam_conv, block.mlp.fc2
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

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        (height, width), weight = convolution.padding, convolution.weight.detach()
        assert isinstance(height, int) and isinstance(width, int) and convolution.bias is not None
        self.padding = [width, width, height, height]
        convolution.padding = (0, 0)
        bias = convolution.bias.detach() + CENTRE * weight.sum((1, 2, 3))
        convolution.bias = nn.Parameter(bias, requires_grad=False)
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(functional.pad(x, self.padding, value=-CENTRE))


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
        return self.proj((values @ shares).sum(1).reshape(batch, channels, height, width))
