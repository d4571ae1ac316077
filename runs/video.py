"""Films of episodes: mp4 files, animated GIFs, and frames that explain what the agent thinks."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from runs.disk import partial_name

BACKGROUND, INK, FAINT, BAR, CHOSEN = (
    (18, 20, 24),
    (232, 234, 237),
    (134, 142, 150),
    (62, 78, 98),
    (79, 195, 247),
)
PANEL = 360  # pixels, the width of what stands beside the frame
MARGIN = 16  # pixels
ROW = 26  # pixels, one action
GRAPH = 150  # pixels, the height of the value graph with its title


def write_mp4(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Write frames as H.264 in an mp4 file that every player and browser shows; return how many there were.

    Frames may come from a generator, one at a time. An odd size is padded by one repeated row or column.
    On any failure no half film is left behind, and a film that was there before stays.

    Shapes: each frame (H, W, 3) uint8, all of one size.
    Raises: ValueError for no frames, frames of another shape or type, or fps <= 0.
    """
    if fps <= 0:
        raise ValueError(f"fps must be > 0, got {fps}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = partial_name(path)
    try:
        count = _encode(aside, frames, Fraction(fps).limit_denominator(1001))
        aside.replace(path)
        return count
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _encode(path: Path, frames: Iterable[np.ndarray], rate: Fraction) -> int:
    import av

    stream: Any = None
    shape, count = None, 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as film:
        for frame in frames:
            _check(frame, shape)
            shape = frame.shape
            even = np.pad(
                frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge"
            )  # yuv420p halves it
            if stream is None:
                stream = film.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "veryfast"})
                stream.height, stream.width, stream.pix_fmt = *even.shape[:2], "yuv420p"
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")))
            count += 1
        if stream is None:
            raise ValueError("a film needs at least one frame")
        film.mux(stream.encode())
    return count


def _check(frame: np.ndarray, shape: tuple[int, ...] | None) -> None:
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"a frame must be (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
    if shape is not None and frame.shape != shape:
        raise ValueError(f"all frames of a film must have one size: {shape}, then {frame.shape}")


def gif_bytes(frames: Iterable[np.ndarray], fps: float) -> bytes:
    """Encode frames as an animated GIF that repeats; equal frames in a row become one that stays longer.

    Shapes: each frame (H, W, 3) uint8, all of one size.
    Units:  GIF times are hundredths of a second, and viewers slow down below two: at most 50 frames a second.
    Raises: ValueError for no frames, or frames of another shape or type.
    """
    from PIL import Image

    images, shape = [], None
    for frame in frames:
        _check(frame, shape)
        shape = frame.shape
        images.append(Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE))
    if not images:
        raise ValueError("a film needs at least one frame")
    file = io.BytesIO()
    pause = max(2, round(100 / fps)) * 10
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=pause, loop=0)
    return file.getvalue()


def enlarge(frame: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel `factor` times in both directions.

    Shapes: (H, W, 3) -> (factor*H, factor*W, 3).
    """
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def explain(
    frame: np.ndarray,
    values: Sequence[float] | np.ndarray,
    action: int,
    action_names: Sequence[str],
    value_history: Sequence[float],
    *,
    probabilities: Sequence[float] | np.ndarray | None = None,
    label: str = "Q",
) -> np.ndarray:
    """Draw the game frame, enlarged, with what the agent thinks beside it: a bar per action, and V over time.

    The chosen action is highlighted. Bars reach from the least to the greatest action, so that small
    differences show. The size depends only on that of the frame and on the number of actions.

    Shapes: frame (H, W, 3) uint8, values and probabilities (A,), value_history (T,), oldest first, of which
            the last 200 are drawn -> (H', W', 3) uint8, H' and W' even.
    Units:  `label` names the values.
    """
    from PIL import Image, ImageDraw

    _check(frame, None)
    if not len(values) == len(action_names) or not 0 <= action < len(values):
        raise ValueError(
            f"{len(values)} values, {len(action_names)} action names and action {action} do not fit"
        )
    picture = enlarge(frame, max(1, round(600 / frame.shape[0])))  # (H', W', 3)
    top = MARGIN + 24
    height = max(picture.shape[0], top + ROW * len(values) + GRAPH + MARGIN)
    width = picture.shape[1] + PANEL
    image = Image.new("RGB", (width + width % 2, height + height % 2), BACKGROUND)
    image.paste(Image.fromarray(picture), (0, (height - picture.shape[0]) // 2))
    draw = ImageDraw.Draw(image)
    left, right = picture.shape[1] + MARGIN, width - MARGIN
    _bars(draw, (left, MARGIN, right), np.asarray(values, float), action, action_names, probabilities, label)
    _graph(draw, (left, height - GRAPH, right, height - MARGIN), np.asarray(value_history, float)[-200:])
    return np.array(image)


@functools.cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _bars(
    draw: Any,
    box: tuple[int, int, int],
    values: np.ndarray,
    action: int,
    names: Sequence[str],
    probabilities: Sequence[float] | np.ndarray | None,
    label: str,
) -> None:
    left, top, right = box
    value_at, share_at = (right - 62 if probabilities is not None else right), right
    bar = (left + 122, value_at - 62)
    small = _font(13)
    draw.text((left, top), "action", FAINT, small)
    draw.text((value_at, top), label, FAINT, small, anchor="ra")
    if probabilities is not None:
        draw.text((share_at, top), "prob.", FAINT, small, anchor="ra")
    for index, (name, share) in enumerate(zip(names, _shares(values), strict=True)):
        y = top + 24 + ROW * index
        ink, fill = (CHOSEN, CHOSEN) if index == action else (INK, BAR)
        draw.text((left, y + 2), _cut(name), ink, _font(14))
        draw.rectangle((bar[0], y + 4, bar[0] + max(2, round(share * (bar[1] - bar[0]))), y + ROW - 8), fill)
        draw.text((value_at, y + 2), _number(values[index]), ink, _font(14), anchor="ra")
        if probabilities is not None:
            draw.text((share_at, y + 2), f"{100 * probabilities[index]:.0f} %", ink, _font(14), anchor="ra")


def _number(value: float) -> str:
    """With as many decimals as fit, and the same number of them from frame to frame."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.3g}"


def _cut(name: str) -> str:
    return name if len(name) <= 13 else name[:12] + "."


def _shares(values: np.ndarray) -> np.ndarray:
    """Bar lengths in [0, 1]: the greatest value fills its row, the least keeps a stub."""
    finite = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    span = finite.max() - finite.min()
    return 0.08 + 0.92 * (finite - finite.min()) / span if span > 0 else np.full(len(values), 0.5)


def _graph(draw: Any, box: tuple[int, int, int, int], history: np.ndarray) -> None:
    left, top, right, bottom = box
    history = history[np.isfinite(history)]
    draw.text((left, top), "V over time", FAINT, _font(13))
    if not history.size:
        return
    draw.text((right, top), _number(history[-1]), CHOSEN, _font(14), anchor="ra")
    low, high = float(history.min()), float(history.max())
    plot = (left, top + 24, right - 52, bottom)
    draw.line((plot[0], plot[3], plot[2], plot[3]), BAR)
    draw.text((right, plot[1]), _number(high), FAINT, _font(12), anchor="ra")
    if high > low:
        draw.text((right, plot[3] - 12), _number(low), FAINT, _font(12), anchor="ra")
    x = np.linspace(plot[0], plot[2], 200)[-len(history) :]  # newest at the right, moving left
    share = (history - low) / (high - low) if high > low else np.full(len(history), 0.5)
    y = plot[3] - share * (plot[3] - plot[1])
    if len(history) > 1:
        draw.line(list(zip(x.tolist(), y.tolist(), strict=True)), CHOSEN, width=2, joint="curve")
    draw.ellipse((x[-1] - 3, y[-1] - 3, x[-1] + 3, y[-1] + 3), CHOSEN)
