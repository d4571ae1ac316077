"""The command: measure each part in turn, print one table; whatever the figures, the exit code is 0."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from agents.run import guarded
from runs.config import Parser, UserError, pick
from runs.origin import origin
from tests.bench.works import WORKS

NAMES = (*WORKS, "memory", "saving", "ceiling")
BYTES, FIRST_UPDATE = 7_300, 30.0  # promised: of a transition (so a million fit in 7.5 GB); seconds
SHARE = 0.75  # promised: of the limit, on policy
Found = dict[str, Any]


@dataclass
class Bench:
    """Measures one thing after the other, each in a fresh process; the cache of compiled code starts empty."""

    folder: str
    quick: bool
    rounds: int
    console: Console

    def measure(self, name: str, names: list[str]) -> Found:
        """All numbers of a benchmark; a comparison goes A B A B."""
        if name == "memory":
            return self.part("memory", name, 20_000 if self.quick else 1_000_000)
        if name == "saving":
            sizes = [10_000] if self.quick else [100_000, 1_000_000]
            return {f"{size:,}": self.part("saving", name, size) for size in sizes}
        if name == "ceiling":
            works = [
                each for each in _works(names) if WORKS[each].agent != "qtable" and not WORKS[each].memory
            ]
            return {each: self.part("ceiling", each, 0.3 if self.quick else 1.5) for each in works}
        work = WORKS[name]
        seconds = 1.0 if self.quick else 8.0 if work.frame_skip > 1 else 5.0
        found: Found = {side: [] for side in ("ours", *work.peers)}
        for _ in range(1 if self.quick else self.rounds):
            for side, rounds in found.items():
                rounds.append(self.part(side, name, seconds))
                rounds[-1]["frames_per_second"] = rounds[-1]["steps_per_second"] * work.frame_skip
                work.compare(name, side, rounds[-1])
        return found

    def part(self, side: str, name: str, amount: float) -> Found:
        """One measurement; RuntimeError with the end of its output if it breaks."""
        file, root = Path(self.folder, "part.json"), Path(__file__).parents[2]
        words = [sys.executable, "-m", "tests.bench.parts", side, name, str(amount), str(file)]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path(self.folder, "compiled"))}
        with self.console.status(f"{name}: {side}"):
            done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words[2:5])} failed:\n{(done.stdout + done.stderr)[-3_000:]}")
        found = json.loads(file.read_text(encoding="utf-8"))
        rate = _speed(found["steps_per_second"], WORKS[name]) if "steps_per_second" in found else "done"
        self.console.print(f"{name}: {side} {rate}", style="dim", highlight=False)
        return found


def _works(names: list[str]) -> list[str]:
    """The comparisons that are asked for; the ceiling alone is that of all."""
    return [name for name in names if name in WORKS] or (list(WORKS) if "ceiling" in names else [])


def _speed(rate: float, work: Any) -> str:
    return f"{rate:,.0f} steps/s, {rate * work.frame_skip:,.0f} frames/s"


def table(results: dict[str, Found], title: str) -> Table:
    """What was promised and what was found."""
    grid = Table(
        title=title, title_justify="left", box=box.HORIZONTALS, show_lines=True, padding=(0, 1, 0, 0)
    )
    for heading in ("work", "ours", "peer", "ratio", "target", "limit"):
        grid.add_column(heading, no_wrap=True)
    races = {name: found for name, found in results.items() if name in WORKS}
    for name, found in races.items():
        grid.add_row(name, *_race(name, found, results.get("ceiling", {}).get(name)))
    for name, found in races.items():
        # DQN on Atari; the first round compiles everything anew
        if WORKS[name].frame_skip > 1 and not WORKS[name].on_policy:
            worst = max(one["seconds_to_first_update"] for one in found["ours"])
            target = _target(f"<= {FIRST_UPDATE:g} s", worst <= FIRST_UPDATE)
            grid.add_row(f"{name}\nfirst update", f"{worst:.1f} s", "", "", target)
    full = results.get("memory", {})
    if "skipped" in full:
        grid.add_row("memory", full["skipped"])
    elif full:
        total, stored = max(full["rss_growth"], full["nbytes"]), full["transitions"]
        cell = f"{total / stored:,.0f} bytes\n{total / 1e9:.2f} GB for\n{stored:,}"
        grid.add_row("memory", cell, "", "", _target(f"<= {BYTES:,}", total / stored <= BYTES))
    for size, one in results.get("saving", {}).items():
        cell = one.get("skipped") or "\n".join(
            f"{one[f'seconds_{kind}']:.1f} s, {one[f'bytes_{kind}'] / 1e9:.2f} GB"
            for kind in ("whole", "later")
        )
        grid.add_row(f"saving {size}\nwhole, then after\n100,000 steps", cell)
    return grid


def _race(name: str, found: Found, limit: Found | None) -> list[str]:
    """Medians with their range; the ratio is that of the medians, its range that of the rounds."""
    work, rates = WORKS[name], {k: [one["steps_per_second"] for one in v] for k, v in found.items()}
    own, best = rates["ours"], max(work.peers, key=lambda side: median(rates[side]))
    ratio, each = median(own) / median(rates[best]), [a / b for a, b in zip(own, rates[best], strict=True)]
    peer, cell = f"{_rates(rates[best], work)}\n{best}", f"{ratio:.2f}\n{min(each):.2f}-{max(each):.2f}"
    target = _target(f">= {work.target:g}", ratio >= work.target) if work.target else ""
    return [_rates(own, work), peer, cell, target, _share(median(own), limit, work) if limit else ""]


def _share(rate: float, limit: Found, work: Any) -> str:
    """How much of the limit was reached."""
    most = limit["limit_steps_per_second"]
    text = f"{rate / most:.0%} of\n{_speed(most, work)}".replace(", ", "\n", 1)
    return f"{text}\n{_target(f'>= {SHARE:.0%}', rate / most >= SHARE)}" if work.on_policy else text


def _rates(rates: list[float], work: Any) -> str:
    low, middle, high = min(rates), median(rates), max(rates)
    return f"{middle:,.0f} steps/s\n{low:,.0f}-{high:,.0f}\n{middle * work.frame_skip:,.0f} frames/s"


def _target(text: str, met: bool) -> str:
    return f"{text}\n{'[green]pass' if met else '[red]fail'}"


def _notes(results: dict[str, Found]) -> list[str]:
    races = {name: found for name, found in results.items() if name in WORKS}
    lines = [
        f"{name}, {side}: {v[0]['compute']}" for name, found in races.items() for side, v in found.items()
    ]
    for name, one in results.get("ceiling", {}).items():
        rates = [
            f"{key.split('_')[0]} "
            + (_speed(rate, WORKS[name]) if "_steps_" in key else f"{rate:,.0f} samples/s")
            for key, rate in one.items()
        ]
        lines.append(f"{name}, each alone: {'; '.join(rates)}")
    return lines


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    parser = Parser(prog="python -m tests.bench", description="Speed and memory against Stable-Baselines3.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default all)")
    parser.add_argument("--json", metavar="FILE", help="write every number")
    parser.add_argument("--rounds", type=int, metavar="N", help="of a comparison (default 3; quote from 5)")
    parser.add_argument(
        "--quick", action="store_true", default=False, help="a second of each: shows that it works, no more"
    )
    given = parser.read(arguments)
    names = list(dict.fromkeys(given.get("names") or NAMES))
    for name in names:
        pick("benchmark", name, dict.fromkeys(NAMES))
    works = [WORKS[name] for name in _works(names)]
    rivals = sorted({work.rival for work in works})
    needed = ["psutil", *rivals, *sorted({need for work in works for need in work.needs})]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'the benchmarks need {", ".join(missing)}: pip install "chordate[bench,mujoco]"')
    console, facts = Console(), origin()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, given["quick"], max(given.get("rounds", 3), 1), console)
        results = {name: bench.measure(name, names) for name in names}
    machine, versions = facts["machine"], [f"{name} {metadata.version(name)}" for name in rivals]
    where = [*versions, machine["cpu"], f"{machine['cores']} cores", f"torch {facts['versions']['torch']}"]
    title = f"{', '.join(where)}\ncommit {facts['commit']}{', QUICK' * given['quick']}"
    console.print(table(results, title))
    console.print(*_notes(results), sep="\n", highlight=False, soft_wrap=True)
    if "json" in given:
        text = json.dumps({**facts, "quick": given["quick"], "results": results}, indent=1)
        Path(given["json"]).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
