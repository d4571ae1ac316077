"""Recurrent nets: what was seen before is summed up in a hidden state.

Deviations from the course notes, 5.2:
1. The weights W_g of [h, x] are two matrices and two biases, as torch's kernels want them; the sums are the same.
2. A GRU is built as well, which the notes leave out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor, nn

from backbones.base import Backbone, State, full_precision
from backbones.memory import EncoderKnob, encode
from runs.config import Knob, check

STARTS = ("zero", "normal", "learned")
GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio as a signed number: the step of SplitMix64


def lstm_cell(
    x: Tensor, h: Tensor, c: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as the equations have it; the shipped path runs torch's kernels and is tested against this.

        i = sigma(W_i [h, x] + b_i)      input gate: how much of what is new is preserved
        f = sigma(W_f [h, x] + b_f)      forget gate: how much of the memory is preserved
        c~ = tanh(W_c [h, x] + b_c)      what is new
        o = sigma(W_o [h, x] + b_o)      output gate
        c' = f * c + i * c~
        h' = o * tanh(c')

    Shapes: x (B, E), h and c (B, H), w_x (4 H, E), w_h (4 H, H), b_x and b_h (4 H,), all in the order i f c o.
    Source: the course notes, 5.2.1.
    """
    gates = x @ w_x.T + b_x + h @ w_h.T + b_h  # (B, 4 H)
    i, f, new, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * new.tanh()
    return o.sigmoid() * c.tanh(), c


class Recurrent(Backbone, ABC):
    """An encoder, and recurrent layers on it; below it are final classes only.

    State: memory (B, P, L, H), the P tensors that one of L layers of width H carries (h, or h and c), and if it starts
    from `normal` values a key (B,), from which those of the next episode will follow.
    Shapes: obs (B, *S) or (T, B, *S) -> (B, H) or (T, B, H), h of the last layer.
    """

    memory = True
    kernel: type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]  # torch's layers
    carried: int  # P
    key: Tensor  # of `normal` starts

    def __init__(
        self,
        observation: spaces.Space[Any] | tuple[int, ...],
        *,
        encoder: EncoderKnob = None,
        width: Annotated[int, Knob("width of the memory", low=1)] = 128,
        layers: Annotated[int, Knob("layers of memory", low=1)] = 1,
        start: Annotated[str, Knob("memory at the start of an episode", choices=STARTS)] = "zero",
        **knobs: Any,
    ) -> None:
        """With an encoder, and its `knobs` if it is given by name."""
        super().__init__()
        check(type(self), {"width": width, "layers": layers, "start": start})
        self.encoder = encode(encoder, observation, knobs)
        self.layers = self.kernel(self.encoder.features, width, layers)
        self.features, self.start = width, start
        _prepare(self.layers)
        if start == "learned":
            self.learned = nn.Parameter(torch.zeros(self.carried, layers, width))
        if start == "normal":
            self.register_buffer("key", torch.randint(2**62, ()))

    @abstractmethod
    def cell(self, x: Tensor, memory: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """One step of one layer: x (B, E), memory (B, P, H) -> memory (B, P, H), h first."""

    def initial(self, n: int) -> State:
        """See `Backbone.initial`."""
        if self.start != "normal":
            return (self._begin(n),)
        keys = splitmix(self.key + torch.arange(n, device=self.key.device) * GOLDEN)
        return self._begin(n, keys), keys

    def forward(self, obs: Any, state: State = (), first: Tensor | None = None) -> tuple[Tensor, State]:
        """See `Backbone.forward`."""
        x = self.encoder(obs)[0].float()
        with full_precision(x):
            state = state or self.initial(x.shape[-2])
            if x.ndim == 2:
                return self._step(x, state, first)
            return self._scan(x, state, first)  # type: ignore[call-arg]  # its decorator hides that it is a method

    def maps(self, obs: Tensor, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Those of the encoder."""
        return self.encoder.maps(obs, names)

    def _begin(self, n: int, keys: Tensor | None = None) -> Tensor:
        """The memories (n, P, L, H) of n new episodes."""
        shape = (self.carried, self.layers.num_layers, self.features)
        if keys is not None:
            return normal(keys, math.prod(shape)).view(n, *shape)
        if self.start == "learned":
            return self.learned.expand(n, *shape)
        return torch.zeros(n, *shape, device=next(self.parameters()).device)

    def _reset(self, state: State, first: Tensor) -> State:
        """Begin anew in the rows where first (B,) is true."""
        if not first.any():
            return state
        memory, *keys = state
        keys = [key + first * GOLDEN for key in keys]
        return torch.where(first[:, None, None, None], self._begin(len(first), *keys), memory), *keys

    def _step(self, x: Tensor, state: State, first: Tensor | None) -> tuple[Tensor, State]:
        memory, *keys = state if first is None else self._reset(state, first)
        after = []
        for layer, weights in enumerate(self.layers.all_weights):
            after.append(self.cell(x, memory[:, :, layer], weights))
            x = after[-1][:, 0]
        return x, (torch.stack(after, 2), *keys)

    @torch.compiler.disable  # every pass has other pieces, and would be compiled anew
    def _scan(self, x: Tensor, state: State, first: Tensor | None) -> tuple[Tensor, State]:
        """Every piece of an episode in x (T, B, E) at once."""
        memory, *keys = state if first is None else self._reset(state, first[0])
        if first is None or not first[1:].any():
            y, memory = self._run(x, memory)
            return y, (memory, *keys)
        found = pieces(first)
        keys = [key[found.row] + found.number * GOLDEN for key in keys]
        begun = torch.where(
            (found.number > 0)[:, None, None, None], self._begin(len(found.row), *keys), memory[found.row]
        )
        y, memory = self._in_powers(x, begun, found)
        return y, (memory[found.last], *(key[found.last] for key in keys))

    def _in_powers(self, x: Tensor, memory: Tensor, found: Pieces) -> tuple[Tensor, Tensor]:
        """Run the pieces, each as far as it goes, in blocks of 2^k steps: log2 T kernel calls without padding.

        On the CPU the LSTM's kernel for blocks is several times faster than that for a PackedSequence.
        Shapes: x (T, B, E), memory (S, P, L, H) -> (T, B, H) and the memories after (S, P, L, H).
        """
        flat, outputs, places = x.flatten(0, 1), [], []
        at, left = found.at.clone(), found.length
        for power in reversed(range(int(left.max()).bit_length())):
            steps = 2**power
            some = (left & steps).nonzero()[:, 0]  # (R,) the pieces with such a block
            if len(some):
                place = (at[some] + torch.arange(steps)[:, None] * x.shape[1]).to(x.device)  # (steps, R)
                at[some] += steps * x.shape[1]
                some = some.to(x.device)
                y, after = self._run(flat[place], memory[some])
                memory = memory.index_copy(0, some, after)
                outputs.append(y.flatten(0, 1))
                places.append(place.flatten())
        y = torch.cat(outputs)
        return torch.empty_like(y).index_copy(0, torch.cat(places), y).unflatten(0, x.shape[:2]), memory

    def _run(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """One kernel call: x (T, R, E), memory (R, P, L, H) -> (T, R, H), the memory after."""
        parts = memory.permute(1, 2, 0, 3).contiguous().unbind()  # P of (L, R, H)
        if self.carried == 1:
            y, after = self.layers(x, parts[0])
            return y, after.transpose(0, 1)[:, None]
        y, after = self.layers(x, parts)
        return y, torch.stack(after).permute(2, 0, 1, 3)


class RNN(Recurrent):
    """h' = tanh(W [h, x] + b); `Recurrent` has the rest."""

    kernel, carried = nn.RNN, 1

    def cell(self, x: Tensor, memory: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """See `Recurrent.cell`."""
        return torch.rnn_tanh_cell(x, memory[:, 0], *weights)[:, None]


class GRU(Recurrent):
    """`Recurrent` with two gates and one tensor of memory.

        r = sigma(W_r [h, x] + b_r)      reset gate
        z = sigma(W_z [h, x] + b_z)      update gate
        n = tanh(W_n x + b_n + r * (U_n h + d_n))
        h' = (1 - z) * n + z * h

    Source: Cho et al. 2014, arXiv 1406.1078, with the reset gate after the product.
    """

    kernel, carried = nn.GRU, 1

    def cell(self, x: Tensor, memory: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """See `Recurrent.cell`."""
        return torch.gru_cell(x, memory[:, 0], *weights)[:, None]


class LSTM(Recurrent):
    """Long short-term memory, `lstm_cell`; `Recurrent` has the rest.

    The forget gate's bias is 1 at first, so that the memory lasts from the beginning.
    Source: the course notes, 5.2.1; Gers et al. 2000 (the bias).
    """

    kernel, carried = nn.LSTM, 2

    def cell(self, x: Tensor, memory: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """See `Recurrent.cell`."""
        h, c = memory.unbind(1)
        return torch.stack(torch.lstm_cell(x, (h, c), *weights), 1)


class Pieces(NamedTuple):
    """The S pieces into which resets after t = 0 cut a (T, B) pass, row by row; `at` and `length` lie on the CPU.

    Shapes: all (S,) but last (B,).
    """

    at: Tensor  # t B + b of the first step
    length: Tensor  # steps
    row: Tensor  # b
    number: Tensor  # how many of the row are before it
    last: Tensor  # the piece in which each row ends


def pieces(first: Tensor) -> Pieces:
    """Cut first (T, B) at t = 0 and wherever an episode begins."""
    device, cut = first.device, first.T.cpu().clone()  # (B, T)
    cut[:, 0] = True
    n, steps = cut.shape
    row, t = cut.nonzero().unbind(1)
    length = torch.diff(row * steps + t, append=torch.tensor([n * steps]))
    ends = cut.sum(1).cumsum(0)
    on_device = (part.to(device) for part in (row, cut.cumsum(1)[row, t] - 1, ends - 1))
    return Pieces(t * n + row, length, *on_device)


def normal(keys: Tensor, count: int) -> Tensor:
    """Standard normal numbers (N, count) that follow from keys (N,) int64 alone.

    SplitMix64 in counter mode, then Box-Muller. Source: Steele et al. 2014.
    """
    pairs = torch.arange(1, (count + 1) // 2 + 1, device=keys.device)
    bits = splitmix(splitmix(keys)[:, None] + pairs * GOLDEN)  # (N, pairs)
    one, two = ((_shifted(bits, by) & 0xFFFFFF) for by in (40, 8))  # 24 bits each, as many as a float32 holds
    radius = (-2 * ((one + 1) / 2**24).log()).sqrt()
    angle = two * (2 * math.pi / 2**24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]


def splitmix(keys: Tensor) -> Tensor:
    """What SplitMix64 makes of its counter, int64 -> int64; it wraps around as uint64 does."""
    keys = (keys ^ _shifted(keys, 30)) * -0x40A7B892E31B1A47
    keys = (keys ^ _shifted(keys, 27)) * -0x6B2FB644ECCEEE15
    return keys ^ _shifted(keys, 31)


def _shifted(keys: Tensor, by: int) -> Tensor:
    """Shift right without the sign."""
    return (keys >> by) & (2 ** (64 - by) - 1)


@torch.no_grad()
def _prepare(layers: nn.RNNBase) -> None:
    """Orthogonal recurrence gate by gate, so that nothing carried grows or fades at first; biases 0, of f gates 1."""
    for name, parameter in layers.named_parameters():
        gates = parameter.split(layers.hidden_size)
        if name.startswith("bias"):
            parameter.zero_()
        elif name.startswith("weight_hh"):
            for gate in gates:
                nn.init.orthogonal_(gate)
        if name.startswith("bias_ih") and layers.mode == "LSTM":
            gates[1].fill_(1)
