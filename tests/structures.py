"""Small models, each with a structure that is hard to split. Every function returns a model, a batch and a loss."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

WIDTH, SAMPLES = 8, 4


def rows(*shape):
    return torch.randn(SAMPLES, *shape)


def ids(length=6, vocabulary=16):
    return torch.randint(vocabulary, (SAMPLES, length))


def to_classes(model, inputs=None, classes=WIDTH):
    """Returns a model with a batch of rows, and class targets."""
    return model, (rows(WIDTH) if inputs is None else inputs, torch.randint(classes, (SAMPLES,))), F.cross_entropy


def linears(number, width=WIDTH):
    return nn.ModuleList(nn.Linear(width, width) for _ in range(number))


# skips, sharing, several inputs and outputs


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.GroupNorm(2, 16)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)])
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.first(x)
        skips = []
        for down, norm in zip(self.down, self.norms, strict=True):
            skips.append(x)
            x = F.relu(norm(down(x)), inplace=True)
        for up in self.up:
            x = torch.cat([up(x), skips.pop()], 1)
        return self.last(x)


def unet():
    return UNet(), (rows(3, 8, 8), rows(3, 8, 8)), F.mse_loss


class TiedLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.position = nn.Parameter(torch.randn(6, WIDTH))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True) for _ in range(3))

    def forward(self, x):
        x = self.embed(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.embed.weight)


def next_token(output, targets):
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def tied_lm():
    x = ids()
    return TiedLM(), (x, x), next_token


class SeveralInputs(nn.Module):
    """Takes a tensor, a nested dict, None and a number; returns a dict with a tuple and None."""

    def __init__(self):
        super().__init__()
        self.left, self.right = linears(2), linears(2)
        self.both = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, left, extra, scale=2.0, mask=None):
        right = extra["right"]
        for one, other in zip(self.left, self.right, strict=True):
            left, right = one(left).tanh(), other(right).tanh() * scale
        if mask is not None:
            left = left * mask
        return {"pair": (left, right), "both": self.both(torch.cat([left, right], 1)), "none": None}


def pair_loss(output, targets):
    left, right = output["pair"]
    assert output["none"] is None
    return F.cross_entropy(output["both"], targets) + (left - right).square().mean()


def several_inputs():
    inputs = {"left": rows(WIDTH), "extra": {"right": rows(WIDTH)}, "scale": 0.5, "mask": None}
    return SeveralInputs(), (inputs, torch.randint(WIDTH, (SAMPLES,))), pair_loss


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(kind(WIDTH, WIDTH, batch_first=True) for _ in range(3))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x):
        x, state = self.embed(x), None
        for layer in self.layers:
            x, state = layer(self.drop(x), state)
        return self.head(x)


def lstm():
    x = ids()
    return Recurrent(nn.LSTM), (x, x), next_token


def gru():
    x = ids()
    return Recurrent(nn.GRU), (x, x), next_token


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.first(x)
        for _ in range(6):
            x = x + self.again(x).tanh()
        return self.last(x)


def reused():
    return to_classes(Reused())


class UsedLater(nn.Module):
    """One value is used twice by each of two later layers and by the code between."""

    def __init__(self):
        super().__init__()
        self.layers = linears(6)

    def forward(self, x):
        first = self.layers[0](x).tanh()
        x = first
        for layer in self.layers[1:]:
            x = layer(x) * first + first.sin()
        return x


def used_later():
    return to_classes(UsedLater())


class WeightNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layers = nn.ModuleList(norm(layer) for layer in linears(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


def weight_norm():
    return to_classes(WeightNorm(parametrizations.weight_norm))


def weight_norm_by_hooks():
    return to_classes(WeightNorm(nn.utils.weight_norm))


def spectral_norm():
    return to_classes(WeightNorm(parametrizations.spectral_norm))


class MyFn(torch.autograd.Function):
    """Doubles; its gradient is three times what autograd's would be."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 6


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = linears(4)

    def forward(self, x):
        for layer in self.layers:
            x = MyFn.apply(layer(x)).tanh()
        return x


my_fn = MyFn.apply


class CustomBound(Custom):
    def forward(self, x):
        for layer in self.layers:
            x = my_fn(layer(x)).tanh()
        return x


def custom_function():
    return to_classes(Custom())


def custom_function_bound():
    return to_classes(CustomBound())


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = linears(6)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x * 1
        for layer in self.layers:
            x += layer(x * 0.5).tanh()
        return self.last(x)


def in_place():
    return to_classes(InPlace())


class WriteToView(nn.Module):
    """Writes to half of what a layer returned, after others have seen the whole."""

    def __init__(self):
        super().__init__()
        self.layers = linears(6)

    def forward(self, x):
        x = self.layers[0](x)
        x = self.layers[1](x).sin()
        half = x[:, : WIDTH // 2]
        half += self.layers[2](x * 0.5)[:, : WIDTH // 2]
        for layer in self.layers[3:]:
            x = layer(x).tanh()
        return x


def write_to_view():
    return to_classes(WriteToView())


# what depends on the data


class Experts(nn.Module):
    """Sends every row to the expert that a router chooses: how many each gets depends on the data."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 3), linears(3)

    def forward(self, x):
        weights, chosen = self.router(x).softmax(1).max(1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = (chosen == i).nonzero().squeeze(1)
            if len(mine):
                out = out.index_add(0, mine, expert(x[mine]) * weights[mine, None])
        return x + out


class Branching(nn.Module):
    """Does one of two things, as its activations say."""

    def __init__(self):
        super().__init__()
        self.often, self.rarely = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if x.sum() > 0:
            return x + self.often(x)
        return x - self.rarely(x)


class Blocks(nn.Module):
    """Calls one block after the other, and writes down nothing."""

    def __init__(self, *blocks):
        super().__init__()
        self.first, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(blocks)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def experts():
    return to_classes(Blocks(Experts(), Experts(), Experts()))


def branching():
    return to_classes(Blocks(Branching(), Branching(), Branching()))


class Padded(nn.Module):
    """Looks whether there is any padding, as much code does to save work."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True) for _ in range(3))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, ids, mask):
        padding = None if mask.all() else mask.logical_not()
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0.0)
        return self.head(x.mean(1))


def half_padded(length=6):
    """Returns a mask that is all ones for the first half of the samples only."""
    mask = torch.ones(SAMPLES, length, dtype=torch.bool)
    mask[SAMPLES // 2 :, length // 2 :] = False
    return mask


def padded():
    return to_classes(Padded(), {"ids": ids(), "mask": half_padded()}, 16)


# what the model's own forward does


class RootState(nn.Module):
    """Has parameters and a counter of its own, and drops values out itself."""

    def __init__(self):
        super().__init__()
        self.layers = linears(5)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        self.calls += 1
        x = F.dropout(self.layers[0](x) * self.scale, 0.2, self.training)
        for layer in self.layers[1:-1]:
            x = layer(x).tanh()
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.layers[-1](x) * self.scale + self.mean


def root_state():
    return to_classes(RootState())


class Nested(nn.Module):
    """Modules in dicts of lists, called with keyword tensors, returning tuples, dicts, named tuples, dataclasses."""

    def __init__(self):
        super().__init__()
        blocks = {"tuple": ReturnsTuple(), "named": ReturnsNamed(), "dict": ReturnsDict(), "record": ReturnsRecord()}
        self.blocks = nn.ModuleDict({"inner": nn.ModuleDict(blocks), "outer": nn.ModuleList(linears(2))})

    def forward(self, x):
        x = self.blocks["outer"][0](x)
        inner = self.blocks["inner"]
        x, gate = inner["tuple"](hidden=x, scale=0.5)
        named = inner["named"](x=x, gate=gate)
        found = inner["dict"](named.value, extra={"gate": named.gate})
        record = inner["record"](found["value"], found["gates"])
        return Both(self.blocks["outer"][1](record.output), record.hidden)


class ReturnsTuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, scale):
        out = self.linear(hidden)
        return out * scale, out.sigmoid()


Gated = namedtuple("Gated", ["value", "gate"])


class ReturnsNamed(ReturnsTuple):
    def forward(self, x, gate):
        return Gated(self.linear(x) * gate, gate * 2)


class ReturnsDict(ReturnsTuple):
    def forward(self, x, extra):
        return {"value": self.linear(x) * extra["gate"], "gates": [extra["gate"], x], "none": None}


@dataclass
class Both:
    output: torch.Tensor
    hidden: torch.Tensor | None = None


class ReturnsRecord(ReturnsTuple):
    def forward(self, x, gates):
        return Both(self.linear(x) + gates[0] * gates[1], x)


def record_loss(output, targets):
    return F.cross_entropy(output.output, targets) + output.hidden.square().mean()


def nested():
    model, batch, _ = to_classes(Nested())
    return model, batch, record_loss


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = linears(6)
        for i in (0, 1, 3):
            self.layers[i].requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def frozen():
    return to_classes(Frozen())


class Settings(nn.Module):
    """Switches gradients and autocast off and on as it goes."""

    def __init__(self):
        super().__init__()
        self.layers = linears(6)

    def forward(self, x):
        with torch.no_grad():
            target = self.layers[0](x).tanh()
        x = self.layers[1](x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.layers[2](x).tanh()
            with torch.autocast("cpu", enabled=False):
                x = self.layers[3](x.float())
            x = self.layers[4](x)
        return self.layers[5](x.float()) + target


def settings():
    return to_classes(Settings())


class Checkpointed(nn.Module):
    """A block that recomputes itself in backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def checkpoint_in_blocks():
    return to_classes(Blocks(*(Checkpointed(False) for _ in range(3))))


def reentrant_in_blocks():
    return to_classes(Blocks(*(Checkpointed(True) for _ in range(3))))


class CheckpointInRoot(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layers, self.reentrant = linears(5), reentrant

    def forward(self, x):
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = checkpoint(layer, x, use_reentrant=self.reentrant).tanh()
        return x


def checkpoint_in_root():
    return to_classes(CheckpointInRoot(False))


class SharedViews(nn.Module):
    """Two parameters that are views of one memory: they must be on one stage."""

    def __init__(self):
        super().__init__()
        self.layers = linears(5)
        both = torch.randn(2 * WIDTH, WIDTH) / 4
        self.layers[1].weight = nn.Parameter(both[:WIDTH])
        self.layers[2].weight = nn.Parameter(both[WIDTH:])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def shared_views():
    return to_classes(SharedViews())


# torch's own layers


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, 0.1, batch_first=True) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            out, weights = layer(x, x, x)
            x = norm(x + out) + weights.mean()
        return self.head(x[:, 0])


def attention():
    return to_classes(Attention(), rows(5, WIDTH))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 3, nn.LayerNorm(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(self.encoder(x)[:, 0])


def transformer_encoder():
    return to_classes(Encoder(), rows(5, WIDTH))


class Translation(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 2, 2, 2, 16, batch_first=True)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x = self.transformer(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True)
        return self.head(x)


def transformer():
    x = ids(5)
    return Translation(), ({"source": ids(6), "target": x}, x), next_token


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.layers = nn.EmbeddingBag(16, WIDTH), linears(4)
        self.norms = nn.ModuleList(nn.GroupNorm(2, WIDTH) for _ in range(4))

    def forward(self, x):
        x = self.bag(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).relu_()
        return x


def embedding_bag():
    return to_classes(Bag(), ids())


def _is_entry(value, name):
    return callable(value) and getattr(value, "__module__", "") == __name__ and value.__code__.co_argcount == 0


ALL = {
    f.__name__: f
    for f in (
        unet, tied_lm, several_inputs, lstm, gru, reused, used_later, weight_norm, weight_norm_by_hooks, spectral_norm,
        custom_function, custom_function_bound, in_place, write_to_view, experts, branching, padded, root_state, nested,
        frozen, settings, checkpoint_in_blocks, reentrant_in_blocks, checkpoint_in_root, shared_views, attention,
        transformer_encoder, transformer, embedding_bag,
    )
}  # fmt: skip
