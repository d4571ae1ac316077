"""The README's programs, as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text("utf-8"), re.DOTALL
)


def test_the_supervised_loop_learns(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    torch.manual_seed(0)
    (block,) = [block for block in BLOCKS if "from backbones import CNN" in block]
    exec(compile(block, "README.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) < 0.5


def test_every_block_is_a_program() -> None:
    assert len(BLOCKS) >= 2
    for block in BLOCKS:
        compile(block, "README.md", "exec")
