"""A transformer over the last steps of the episode.

Deviations from the course notes, 5.3:
1. Only the decoder's masked self-attention, as in GPT: there is nothing to translate from.
2. The norm comes before each part, not after it (Xiong et al. 2020): the residual stays the identity.
3. The network in the feed-forward layer has GELU for ReLU.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from backbones.base import Backbone, State, full_precision
from backbones.memory import EncoderKnob, ages, encode
from runs.config import Knob, UserError, check

POSITIONS = ("relative", "sinusoidal", "learned")


class Transformer(Backbone):
    """Causal self-attention over the encodings of the last K = `context` steps of the episode, this one among them.

        x = x + MHA(norm(x));  x = x + FF(norm(x))      in each of L layers, with a norm at the end
        head = softmax(Q K^T / sqrt(d) + b) V           of H heads of d = D / H numbers

    Positions: `relative`, b learned by head and distance (Raffel et al. 2020, without buckets), at first falling with
    the distance as in ALiBi: were it zero, a new net could not tell the last step from the first; `sinusoidal`, of the
    step in the episode, added to x at the bottom (Vaswani et al. 2017); `learned`, a table of K rows in its place, read
    in a circle, so that no two steps within the context share one. With `gate` the residual sums become gates.
    State: keys and values of the last K - 1 steps (B, L, 2, K - 1, D), and the age (B,) of the next step. They cross
    from one pass to the next; those of former episodes are masked. A pass goes through in blocks of K steps, each of
    which looks at 2 K - 1: its cost is linear in T.
    Shapes: obs (B, *S) or (T, B, *S) -> (B, D) or (T, B, D). T may exceed K.
    Raises: UserError if the heads do not divide the width.
    Source: the course notes, 5.3; Parisotto et al. 2019, arXiv 1910.06764 (memory, gate).
    """

    memory = True

    def __init__(
        self,
        observation: spaces.Space[Any] | tuple[int, ...],
        *,
        encoder: EncoderKnob = None,
        width: Annotated[int, Knob("width of the memory", low=1)] = 128,
        layers: Annotated[int, Knob("layers of memory", low=1)] = 2,
        heads: Annotated[int, Knob("attention heads of a layer", low=1)] = 4,
        context: Annotated[int, Knob("steps that are attended to, this one among them", low=2)] = 64,
        positions: Annotated[str, Knob("how steps are told apart", choices=POSITIONS)] = "relative",
        gate: Annotated[bool, Knob("gates on the residuals, as in GTrXL")] = False,
        **knobs: Any,
    ) -> None:
        """With an encoder, and its `knobs` if it is given by name."""
        super().__init__()
        given = {"width": width, "layers": layers, "heads": heads, "context": context}
        check(Transformer, {**given, "positions": positions, "gate": gate})
        if width % heads:
            raise UserError(f"--heads must divide --width {width}, got {heads}")
        self.encoder = encode(encoder, observation, knobs)
        self.features, self.context, self.positions = width, context, positions
        self.embed = nn.Linear(self.encoder.features, width)
        self.layers = nn.ModuleList(_Layer(width, heads, gate) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        if positions == "relative":
            self.table = nn.Parameter(near(heads, context))
        if positions == "learned":
            self.table = nn.Parameter(0.02 * torch.randn(context, width))

    @property
    def reach(self) -> int:
        """K, of each layer."""
        return self.context

    def initial(self, n: int) -> State:
        """See `Backbone.initial`."""
        device = self.embed.weight.device
        past = torch.zeros(n, len(self.layers), 2, self.context - 1, self.features, device=device)
        return past, torch.zeros(n, dtype=torch.int64, device=device)

    def forward(self, obs: Any, state: State = (), first: Tensor | None = None) -> tuple[Tensor, State]:
        """See `Backbone.forward`."""
        run = self._run(obs, state, first)
        y = self.norm(run.inputs[-1][:, : run.steps]).transpose(0, 1)  # (T, B, D)
        past = torch.cat([run.past, torch.stack(run.new, 1)], 3)[:, :, :, len(y) :]
        return (y[0] if run.single else y), (past, run.age + 1)

    def attention(self, obs: Any, state: State = (), first: Tensor | None = None) -> Tensor:
        """The weight that each head gives to the step i steps back, for the arguments of `forward`.

        Shapes: (B, L, H, K) or (T, B, L, H, K), index i in [0, K) on the last axis.
        """
        run, k = self._run(obs, state, first), self.context
        found = zip(self.layers, run.inputs, run.past.unbind(1), strict=False)
        with full_precision(run.bias):
            weights = [layer.weights(x, past, run.bias) for layer, x, past in found]  # type: ignore[operator]  # _Layer
        weights = torch.stack(weights, 2)  # (B, n, L, H, Q, K - 1 + Q)
        shape, device = weights.shape, weights.device
        place = torch.arange(shape[4], device=device)[:, None] + torch.arange(k - 1, -1, -1, device=device)
        weights = weights.gather(5, place.expand(*shape[:5], k)).permute(1, 4, 0, 2, 3, 5)
        weights = weights.flatten(0, 1)[: run.steps]
        return weights[0] if run.single else weights

    def maps(self, obs: Tensor, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Those of the encoder."""
        return self.encoder.maps(obs, names)

    def _run(self, obs: Any, state: State, first: Tensor | None) -> _Run:
        x = self.encoder(obs)[0].float()
        single = x.ndim == 2
        if single:
            x, first = x[None], None if first is None else first[None]
        past, before = state or self.initial(x.shape[1])
        with full_precision(x):
            if first is None:
                age = before + torch.arange(len(x), device=x.device)[:, None]
            else:
                age = ages(first, before)  # (T, B)
            x, steps, new = self._placed(self.embed(x), age).transpose(0, 1), len(x), []
            block = min(steps, self.context)
            over = -steps % block  # steps that fill the last block up
            bias = self._bias(F.pad(age.T, (0, over)).unflatten(1, (-1, block)))
            inputs = [F.pad(x, (0, 0, 0, over))]
            for layer, cached in zip(self.layers, past.unbind(1), strict=True):
                x, now = layer(inputs[-1], cached, bias)
                inputs.append(x)
                new.append(now[:, :, :steps])
        return _Run(inputs, bias, past, new, age[-1], steps, single)

    def _placed(self, x: Tensor, age: Tensor) -> Tensor:
        """x (T, B, D) and where each step stands in its episode."""
        if self.positions == "learned":
            return x + self.table[age % self.context]
        return x + sinusoids(age, x.shape[2]) if self.positions == "sinusoidal" else x

    def _bias(self, age: Tensor) -> Tensor:
        """What is added to the scores: age (B, n, Q) -> (B, n, 1 or H, Q, K - 1 + Q), -inf where no look may go."""
        past, steps = self.context - 1, age.shape[2]
        here, there = torch.arange(steps, device=age.device), torch.arange(past + steps, device=age.device)
        back = past + here[:, None] - there  # (Q, K - 1 + Q) how many steps
        seen = ((back >= 0) & (back <= past) & (back <= age[..., None]))[:, :, None]
        if self.positions != "relative":
            return torch.zeros(seen.shape, device=age.device).masked_fill(~seen, -math.inf)
        return self.table[:, back.clamp(0, past)].masked_fill(~seen, -math.inf)


class _Run(NamedTuple):
    """What a pass in n blocks of Q steps leaves: what went into each layer and came out of the last, and the rest."""

    inputs: list[Tensor]  # of (B, n Q, D), of which the first T steps count
    bias: Tensor
    past: Tensor  # (B, L, 2, K - 1, D)
    new: list[Tensor]  # L of (B, 2, T, D)
    age: Tensor  # (B,) at the last step
    steps: int  # T
    single: bool


class _Layer(nn.Module):
    """Attention and a dense net, each on its norm, joined to x one after the other."""

    def __init__(self, width: int, heads: int, gate: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.joins = nn.ModuleList([Gate(width) if gate else _Sum(), Gate(width) if gate else _Sum()])

    def forward(self, x: Tensor, past: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, n Q, D), past keys and values (B, 2, K - 1, D), bias -> x, the new keys and values (B, 2, n Q, D)."""
        q, k, v, new = self._project(x, past, bias.shape[3])
        q, k, v, bias = (part.flatten(0, 1) for part in (q, k, v, bias))
        y = F.scaled_dot_product_attention(q, k, v, bias)  # (B n, H, Q, d)
        x = self.joins[0](x, self.out(y.transpose(1, 2).reshape(x.shape)))
        return self.joins[1](x, self.dense(self.norms[1](x))), new

    def weights(self, x: Tensor, past: Tensor, bias: Tensor) -> Tensor:
        """The attention in `forward`, (B, n, H, Q, K - 1 + Q)."""
        q, k, _, _ = self._project(x, past, bias.shape[3])
        return (q @ k.transpose(3, 4) / math.sqrt(q.shape[4]) + bias).softmax(4)

    def _project(self, x: Tensor, past: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (B, n, H, Q, d), keys and values (B, n, H, K - 1 + Q, d), the new keys and values (B, 2, n Q, D)."""
        x = self.norms[0](x)
        new = self.key_value(x).unflatten(2, (2, -1)).transpose(1, 2)
        seen = torch.cat([past, new], 2).unfold(2, past.shape[2] + block, block)  # (B, 2, n, D, K - 1 + Q)
        k, v = seen.unflatten(3, (self.heads, -1)).transpose(4, 5).unbind(1)
        q = self.query(x).unflatten(1, (-1, block)).unflatten(3, (self.heads, -1)).transpose(2, 3)
        return q, k, v, new


class _Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Gate(nn.Module):
    """GTrXL's gate in place of x + y: a GRU whose memory is x, which nearly passes x on at first.

        y = relu(y);  r = sigma(W_r y + U_r x);  z = sigma(W_z y + U_z x - b)
        h = tanh(W_h y + U_h (r * x));  (1 - z) * x + z * h         b = 2 at first

    Shapes: x, y (.., D) -> (.., D).
    Source: Parisotto et al. 2019, arXiv 1910.06764, 3.2.
    """

    def __init__(self, width: int) -> None:
        """Of that width."""
        super().__init__()
        self.of_y = nn.Linear(width, 3 * width, bias=False)  # r z h
        self.of_x = nn.Linear(width, 2 * width, bias=False)  # r z
        self.of_reset = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.full((width,), 2.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See the class."""
        y_r, y_z, y_h = self.of_y(y.relu()).chunk(3, -1)
        x_r, x_z = self.of_x(x).chunk(2, -1)
        r, z = (y_r + x_r).sigmoid(), (y_z + x_z - self.bias).sigmoid()
        return (1 - z) * x + z * (y_h + self.of_reset(r * x)).tanh()


def near(heads: int, context: int) -> Tensor:
    """-m_h i (H, K) of heads h = 1 .. H and distances i = 0 .. K - 1, with m_h = 2^(-8 h / H).

    Source: Press et al. 2022, arXiv 2108.12409 (ALiBi), section 3.
    """
    slopes = 2.0 ** (-8 / heads * torch.arange(1, heads + 1))
    return -slopes[:, None] * torch.arange(context)


def sinusoids(age: Tensor, width: int) -> Tensor:
    """sin and cos of the age at wavelengths from 2 pi to 10,000 times that; (..) -> (.., width).

    Source: Vaswani et al. 2017, arXiv 1706.03762, 3.5, the sines before the cosines.
    """
    half = (width + 1) // 2
    rate = 10_000 ** (-torch.arange(half, device=age.device) / half)
    angle = age[..., None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1)[..., :width]
