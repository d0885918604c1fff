"""Blocks whose trait lies in norms, scales, gates or convolutions."""

import torch
import torch.nn.functional as F
from attention_toys import Attention
from scaffold import DIM, TOKENS, as_map, tokens
from torch import Tensor, nn


def layer_scale(*shape: int) -> nn.Parameter:
    # Initial values near 0, as trained models start from, would hide the layers behind them.
    return nn.Parameter(torch.empty(*shape).uniform_(0.3, 1.0))


# Scales


class LayerScale(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, 32), nn.Linear(32, DIM, bias=False)
        self.gamma1, self.gamma2 = layer_scale(DIM), layer_scale(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attend(self.norm(x))
        return x + self.fc2(F.gelu(self.fc1(x))) * self.gamma2


class MapLayerScale(nn.Module):
    """ConvNeXt without its norm: ``[C, 1, 1]`` scales behind a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)
        self.expand, self.reduce = nn.Conv2d(DIM, 32, 1), nn.Conv2d(32, DIM, 1)
        self.gamma = layer_scale(DIM, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.reduce(F.gelu(self.expand(self.depthwise(x))))


class KeptLayerScale(nn.Module):
    """The layer's result is read twice, scaled differently: no rows could serve both."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)
        self.gamma1, self.gamma2 = layer_scale(DIM), layer_scale(DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return x + self.gamma1 * y + F.relu(self.gamma2 * y)


# Batch norms


class NormBehindLinear(nn.Module):
    """LeViT: the batch norm sees rows, the tokens of all images one below the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM, bias=False)
        self.bn = nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return x + F.hardswish(self.bn(y.flatten(0, 1)).reshape(-1, TOKENS, DIM))


class NormBeforeLayers(nn.Module):
    """NextViT: a batch norm read by a linear and by a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(DIM)
        self.conv = nn.Conv2d(DIM, DIM, 1, groups=3)
        self.linear = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return x + F.relu(self.conv(y)) * as_map(self.linear(tokens(y)))


class NormBeforePadding(nn.Module):
    """The convolution behind the batch norm pads: the zeros know nothing of the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(DIM)
        self.conv = nn.Conv2d(DIM, DIM, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.conv(self.bn(x)))


class NormReadTwice(nn.Module):
    """The batch norm is also the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(DIM)
        self.conv = nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y + F.relu(self.conv(y))


# Convolutions


class StandardisedConv(nn.Conv2d):
    """The weight is standardised at run time, spelled as a batch norm in training mode."""

    def __init__(self) -> None:
        super().__init__(DIM, DIM, 3, padding=1)
        self.gain = nn.Parameter(torch.empty(DIM).uniform_(0.3, 1.0))

    def standardised(self) -> Tensor:
        rows = self.weight.reshape(1, DIM, -1)
        rows = F.batch_norm(rows, None, None, weight=self.gain, training=True, eps=1e-6)
        return rows.reshape_as(self.weight) / self.weight[0].numel() ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(F.conv2d(x, self.standardised(), self.bias, padding=1))


class SeparableAttention(nn.Module):
    """MobileViT v2: a softmax over tokens weighs keys, and their sum meets every value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, DIM)
        self.qkv = nn.Conv2d(DIM, 1 + 2 * DIM, 1)
        self.out = nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        score, key, value = self.qkv(self.norm(x)).split((1, DIM, DIM), dim=1)
        context = (key * score.softmax(dim=-1)).sum(dim=-1, keepdim=True)
        return x + self.out(F.relu(value) * context.expand_as(value))


class PoolMixer(nn.Module):
    """PoolFormer: what the neighbours have and the token has not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, DIM)
        self.gamma = layer_scale(DIM, 1, 1)
        self.fc = nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        pooled = F.avg_pool2d(y, 3, stride=1, padding=1, count_include_pad=False)
        x = x + self.gamma * (pooled - y)
        return x + F.relu(self.fc(x))


class GatedConv(nn.Module):
    """MambaOut: a gate, a part left alone and a convolved part; no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.fc1 = nn.Linear(DIM, 2 * DIM)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc2 = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        gate, same, local = self.fc1(self.norm(x)).split((DIM, DIM - 8, 8), dim=-1)
        local = tokens(self.conv(as_map(local)))
        return x + self.fc2(F.gelu(gate) * torch.cat([same, local], dim=-1))


# Gates and activations


class Mlp(nn.Module):
    """Two linears; the blocks below put one activation each between them."""

    hidden = 32

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.fc1 = nn.Linear(DIM, self.hidden)
        self.fc2 = nn.Linear(32, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))

    def act(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class GeGlu(Mlp):
    hidden = 64

    def act(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.gelu(gate) * value


class SwiGlu(Mlp):
    hidden = 64

    def act(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return value * F.silu(gate)


class QuickGelu(Mlp):
    def act(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class StarRelu(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8944))
        self.shift = nn.Parameter(torch.tensor(-0.4472))

    def act(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) ** 2 + self.shift


class StoredProduct(nn.Module):
    """A projection written as a product with a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.matrix = nn.Parameter(torch.randn(DIM, DIM) * DIM**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.norm(x) @ self.matrix)
