"""The live panel and its plain form."""

import errno
import io

import pytest
import torch
from rich.console import Console

from runs.panel import Panel, duration, number


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make(terminal=True, width=80, total=1000, folder="runs/x", encoding="utf-8", **keywords):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="", write_through=True)
    console = Console(
        file=file, force_terminal=terminal, width=width, color_system=None, _environ={"TERM": "xterm"}
    )
    clock = Clock()
    panel = Panel("dqn · Pong", total, folder=folder, console=console, clock=clock, **keywords)
    return panel, clock, lambda: raw.getvalue().decode(encoding)


def drawn(panel, width=80):
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(panel._draw())
    return file.getvalue()


def test_without_a_terminal_there_are_plain_lines_now_and_then():
    panel, clock, text = make(terminal=False, width=60)
    with panel:
        for step in range(0, 251, 10):
            panel.update(step, 4 * step, return_=torch.tensor(-20.5), loss=float("nan"))
            panel.say("[bold]hello[/] a line") if step == 100 else None
            clock.now += 1.0
    lines = text().splitlines()
    assert "\x1b" not in text()
    assert lines[1] == "[bold]hello[/] a line"
    assert lines[0].startswith(
        "step 100/1,000 (10.0%)  10 steps/s  40 frames/s  return -20.5  loss nan  ETA 0:01:30"
    )
    assert len(lines) == 4  # two while it ran, one at the end
    assert lines[-1].startswith("step 250/1,000")


@pytest.mark.parametrize("width", [30, 46, 80, 200])
def test_the_panel_fits(width):
    panel, clock, text = make(width=width, folder="runs/a very long folder/" + "name" * 30)
    with panel:
        for step in (100, 200):
            panel.update(
                step,
                4 * step,
                return_=-20.0,
                loss=0.0123,
                some_long_metric_name=1e9,
                evaluation="-8 (best -7)",
            )
            clock.now += 10
        panel.say("a line above")
        shown = drawn(panel, width)
    assert max(map(len, shown.splitlines())) <= min(80, width)
    if width >= 80:
        for word in ("20.0%", "1,000", "800", "0:00:20", "0.0123", "1,000,000,000", "-8 (best -7)"):
            assert word in shown
    assert "a line above" in text()
    assert text().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_nothing_is_drawn_or_read_between_two_redraws():
    class Unread:
        def __float__(self):
            raise AssertionError("read too early")

    panel, clock, text = make()
    with panel:
        before = text()
        for step in range(1, 100):
            panel.update(step, step, loss=Unread())
        panel.update(100, 100, loss=1.5)
        assert text() == before
        clock.now += 1.0
        panel.update(101, 101)
        assert text() != before
        assert "1.5" in drawn(panel) and "frames" not in drawn(panel)


def test_rates_are_of_the_last_while_and_a_resumed_run_starts_from_its_step():
    panel, clock, _ = make(total=10_000)
    with panel:
        panel.update(5000, 5000)
        assert "ETA -" in drawn(panel)
        for _ in range(100):
            clock.now += 1
            panel.update(panel._step + 10, panel._step + 10)
        for _ in range(40):
            clock.now += 1
            panel.update(panel._step + 2, panel._step + 2)
        shown = drawn(panel)
    assert "steps/s  2 " in " ".join(shown.split()).replace("steps/s", "steps/s ")
    assert "0:32:40" in shown  # 3,920 steps to go, 2 a second


def test_errors_pass_through_and_the_terminal_is_restored():
    panel, _, text = make()
    with pytest.raises(KeyboardInterrupt), panel:
        raise KeyboardInterrupt
    assert text().rstrip().endswith("\x1b[?25h")


def test_terminals_that_cannot_show_everything():
    panel, _, text = make(encoding="ascii", folder="runs/é")
    with panel:
        panel.update(1, 4, return_=1.0)
        panel.say("± é")
    assert "dqn ? Pong" in text() and "? ?" in text()
    raw = io.StringIO()
    dumb = Console(file=raw, force_terminal=True, _environ={"TERM": "dumb"})
    with Panel("t", 10, console=dumb):
        pass
    assert "\x1b" not in raw.getvalue()


def test_numbers_for_people():
    assert [number(value) for value in (7, 12345, 0.012345, 12345.6, float("inf"), "text")] == [
        "7",
        "12,345",
        "0.01235",
        "12,346",
        "inf",
        "text",
    ]
    assert duration(3725.9) == "1:02:05"


class Full(io.StringIO):
    """Output into a file on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_output_that_cannot_be_written_ends_no_run():
    with pytest.raises(OSError, match="No space left"):
        Console(file=Full()).print("a line")
    with Panel("t", 10, console=Console(file=Full())) as panel:
        panel.say("a line")
        panel.update(5, 5)
