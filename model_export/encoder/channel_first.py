"""The folded encoder as a graph for the Neural Engine: channels first, rank 4, 1 x 1 convolutions, one LayerNorm each.

Done on the torch module, before the trace; each change keeps the function (tests: float64, 1e-12). Which change
replaces what, its source and its effect: docs/NEURAL_ENGINE.md.
"""

import torch
from timm.models.fastvit import Attention, AttentionBlock
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) over the channels of (B, C, H, W), without gamma and beta.

    Written as the pattern that coremltools turns into one `layer_norm` (see the module's table).
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + self.eps)


class ChannelAttention(nn.Module):
    """timm's `Attention` after `norm`'s gamma and beta, on (B, C, H, W) throughout."""

    def __init__(self, attention: Attention, norm: nn.LayerNorm) -> None:
        super().__init__()
        channels = attention.qkv.in_features
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        weight = attention.qkv.weight.detach()
        bias = weight @ norm.bias.detach()
        if attention.qkv.bias is not None:
            bias = bias + attention.qkv.bias.detach()
        scale = torch.ones(3 * channels, dtype=weight.dtype)
        scale[:channels] = attention.scale
        self.qkv = pointwise(weight * norm.weight.detach() * scale[:, None], bias * scale)
        self.softmax = nn.Softmax(-1)
        self.proj = pointwise(attention.proj.weight.detach(), attention.proj.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        heads = self.qkv(x).view(batch, 3 * self.heads, self.head_dim, height * width)
        q, k, v = heads.split(self.heads, dim=1)
        weights = self.softmax(q.transpose(2, 3) @ k)
        mixed = v @ weights.transpose(2, 3)
        return self.proj(mixed.view(batch, channels, height, width))


class Encoder(nn.Module):
    """FastViT's feature map (1, C, S/64, S/64), times 2^exponent, as the contract has it: (1, N, C), rows first.

    `fits_float16` says whether the features do, after that factor: else the factor is taken in the output's float32.
    """

    def __init__(self, fastvit: nn.Module, exponent: int = 0, fits_float16: bool = True) -> None:
        super().__init__()
        self.fastvit, self.exponent, self.fits_float16 = fastvit, exponent, fits_float16

    def forward(self, images: Tensor) -> Tensor:
        features = self.fastvit.forward_features(images)  # type: ignore[operator]
        batch, channels, height, width = features.shape
        features = features.view(batch, channels, height * width).transpose(1, 2)
        return features * 2.0**self.exponent if self.exponent else features


def channel_first(folded: nn.Module) -> nn.Module:
    """Rewrite the attention blocks of a folded FastViT (see `fastvlm.model.fold.fold`) in place, and return it.
    Dropouts go, which do nothing here, and nothing changes its input in place: so the exported graph is core ATen as it
    is.

    The feature map stays the same: (B, 3, S, S) -> (B, C, S/64, S/64). Module names stay timm's.
    """
    for name, block in [*folded.named_modules()]:
        if isinstance(block, nn.Dropout):
            folded.set_submodule(name, nn.Identity())
        elif isinstance(block, nn.ReLU):
            block.inplace = False
        elif isinstance(block, AttentionBlock):
            assert isinstance(block.norm, nn.LayerNorm)
            block.token_mixer = ChannelAttention(block.token_mixer, block.norm)  # type: ignore[assignment]
            block.norm = ChannelNorm(block.norm.eps)
    return folded


def pointwise(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A linear layer (O, I) as a 1 x 1 convolution."""
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1, device="meta")
    convolution.weight = nn.Parameter(weight[:, :, None, None], requires_grad=False)
    convolution.bias = nn.Parameter(bias, requires_grad=False)
    return convolution
