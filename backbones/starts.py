"""What a memory begins with: an experiment on the three kinds of start, and an example of a backbone without an agent.

python -m backbones.starts [--out DIR]

An LSTM predicts the next number of sin(w t + p), w and p drawn for each wave, with each kind of `--start`: `zero`,
`normal` and `learned` (course notes, 5.2). Its errors are shown by the step of the wave, where the memory is reset
when a new wave begins, and where nobody tells it, so that it begins with what it remembers of another wave.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones.recurrent import LSTM, STARTS
from runs.config import Parser, UserError

STEPS, WAVES = 32, 64  # of a wave; in a batch
UPDATES, SEEDS, TESTS = 1_500, range(5), 2_000
SHOWN = 16  # steps in the picture
OUT = "runs/reference/starts"


def waves(count: int, generator: torch.Generator) -> Tensor:
    """Values (STEPS + 1, count, 1) of sine waves with 0.2 to 1 radians per step."""
    rate, phase = torch.rand(2, count, generator=generator)
    steps = torch.arange(STEPS + 1)[:, None]
    return torch.sin((0.2 + 0.8 * rate) * steps + 2 * math.pi * phase)[..., None]


class Predictor(nn.Module):
    """The next number (T, B, 1) of each wave, on an LSTM."""

    def __init__(self, start: str) -> None:
        """With one kind of start."""
        super().__init__()
        self.backbone = LSTM((1,), encoder="mlp", hidden=(32,), width=32, start=start)
        self.head = nn.Linear(self.backbone.features, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, ...], reset: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Predictions for x (T, B, 1), and what is remembered then; `reset`: new waves begin, and that is known."""
        first = torch.zeros(x.shape[:2], dtype=torch.bool)
        first[0] = reset
        features, state = self.backbone(x, state, first)
        return self.head(features), state


def trained(start: str, seed: int) -> Predictor:
    """A predictor after `UPDATES` batches of waves, each from its beginning."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # torch's initialisers take no generator
        torch.manual_seed(seed)
        net = Predictor(start)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    state = net.backbone.initial(WAVES)
    for _ in range(UPDATES):
        x = waves(WAVES, generator)
        guess, state = net(x[:-1], tuple(leaf.detach() for leaf in state), reset=True)
        optimizer.zero_grad()
        (guess - x[1:]).square().mean().backward()
        optimizer.step()
    return net


@torch.no_grad()
def errors(net: Predictor, reset: bool) -> np.ndarray:
    """Mean squared error (STEPS,) by step of waves that come after other ones, with or without a reset between."""
    generator = torch.Generator().manual_seed(10_000)  # waves that no net has seen
    before, now = waves(TESTS, generator), waves(TESTS, generator)
    _, state = net(before[:-1], net.backbone.initial(TESTS), reset=True)
    guess, _ = net(now[:-1], state, reset)
    return (guess - now[1:]).square().mean((1, 2)).numpy()


def main(arguments: list[str]) -> int:
    """Train all nets, write starts.csv and starts.png."""
    parser = Parser(prog="python -m backbones.starts", description="What a memory begins with.")
    parser.add_argument("--out", metavar="DIR", help=f"where to write (default {OUT})")
    try:
        out = Path(parser.read(arguments).get("out", OUT))
        torch.set_num_threads(1)
        found: dict[tuple[str, bool], np.ndarray] = {}  # (start, reset) -> (seeds, STEPS)
        for start in STARTS:
            nets = [trained(start, seed) for seed in SEEDS]
            for reset in (True, False):
                found[start, reset] = np.stack([errors(net, reset) for net in nets])
                shown = ", ".join(f"{value:.4f}" for value in found[start, reset].mean(0)[:5])
                print(f"{start}, {'reset' if reset else 'no reset'}: {shown} in the first steps")
        print(f"wrote {_table(found, out)}, {_picture(found, out)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _table(found: dict[tuple[str, bool], np.ndarray], out: Path) -> Path:
    names = [f"{start} {'reset' if reset else 'no reset'}" for start, reset in found]
    means = np.stack([each.mean(0) for each in found.values()], 1)  # (STEPS, columns)
    rows = [f"{step},{','.join(f'{value:.6f}' for value in row)}" for step, row in enumerate(means)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "starts.csv").write_text(
            "\n".join([",".join(["step", *names]), *rows]) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    return out / "starts.csv"


def _picture(found: dict[tuple[str, bool], np.ndarray], out: Path) -> Path:
    from runs.report import COLOURS, INK, banded, panels, write

    figure, axes = panels(2)
    titles = ("the memory is reset at the first step", "nobody says that a new wave begins")
    colours: dict[str, str] = dict(zip(STARTS, COLOURS, strict=False))
    for (start, reset), each in found.items():
        panel: Any = axes[0 if reset else 1]
        step, curve = np.arange(SHOWN), each[:, :SHOWN]
        banded(panel, step, curve.mean(0), curve.min(0), curve.max(0), label=start, colour=colours[start])
    for panel, title in zip(axes, titles, strict=True):
        panel.set_yscale("log")
        panel.set_ylim(1e-5, 3)
        panel.set_title(title, loc="left", color=INK, pad=8)
        panel.set_xlabel("step of the wave", color=INK)
        panel.set_ylabel("squared error of the next number", color=INK)
    axes[0].legend(loc="upper right", frameon=False)
    return write(figure, out, "starts.png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
