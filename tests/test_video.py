"""Films: read back frame by frame."""

import io
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from runs.video import enlarge, explain, gif_bytes, write_mp4

COLOURS = [(200, 30, 40), (30, 160, 60), (40, 60, 210), (236, 236, 236), (144, 72, 17)]


def film(height=64, width=48):
    frames = np.zeros((len(COLOURS), height, width, 3), np.uint8)
    for frame, colour in zip(frames, COLOURS, strict=True):
        frame[:] = colour
        frame[: height // 2, : width // 2] = 0
    return frames


def read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return (
            frames,
            stream.codec_context.name,
            stream.codec_context.pix_fmt,
            float(stream.average_rate or 0),
        )


@pytest.mark.parametrize(("height", "width"), [(64, 48), (63, 47), (210, 160)])
def test_mp4_reads_back_frame_by_frame(tmp_path, height, width):
    path = tmp_path / "new folder" / "a film.mp4"
    frames = film(height, width)
    assert write_mp4(path, iter(frames), fps=15) == len(frames)
    found, codec, pixels, rate = read(path)
    assert (codec, pixels, rate) == ("h264", "yuv420p", 15.0)
    assert len(found) == len(frames)
    for got, sent in zip(found, frames, strict=True):
        assert got.shape == (height + height % 2, width + width % 2, 3)
        assert np.abs(got[-8:, -8:].mean((0, 1)) - sent[-1, -1]).max() < 6
        assert got[4:16, 4:16].mean() < 6
    assert [entry.name for entry in path.parent.iterdir()] == ["a film.mp4"]


def test_a_film_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "film.mp4"
    write_mp4(path, film(), 30)
    before = path.read_bytes()

    def breaks():
        yield film()[0]
        raise RuntimeError("the game crashed")

    with pytest.raises(RuntimeError, match="crashed"):
        write_mp4(path, breaks(), 30)
    bad = {
        "at least one frame": [],
        "one size": [film()[0], film(32)[0]],
        r"\(H, W, 3\) uint8, got \(4, 4\)": [np.zeros((4, 4), np.uint8)],
        "float64": [np.zeros((4, 4, 3))],
    }
    for message, frames in bad.items():
        with pytest.raises(ValueError, match=message):
            write_mp4(path, frames, 30)
        with pytest.raises(ValueError, match=message):
            gif_bytes(frames, 30)
    with pytest.raises(ValueError, match="fps must be > 0"):
        write_mp4(path, film(), 0)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_gif_holds_every_frame_and_its_time():
    frames = film()
    image: Any = Image.open(io.BytesIO(gif_bytes(frames, fps=10)))
    assert image.n_frames == len(frames)
    for index, sent in enumerate(frames):
        image.seek(index)
        assert image.info["duration"] == 100
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - sent).max() <= 2
    still: Any = Image.open(io.BytesIO(gif_bytes([frames[0], frames[0], frames[1]], fps=10)))
    durations = []
    for index in range(still.n_frames):
        still.seek(index)
        durations.append(still.info["duration"])
    assert sum(durations) == 300


def test_explain_shows_the_frame_and_the_choice():
    frame, names = film(210, 160)[0], ["NOOP", "FIRE", "UP", "DOWN"]
    sizes = set()
    for action, history in (
        (0, []),
        (2, [1.0]),
        (3, [float("nan"), 2.0, 2.0]),
        (1, list(np.sin(np.arange(500)))),
    ):
        for probabilities in (None, [0.1, 0.2, 0.3, 0.4]):
            shown = explain(
                frame, [0.1, -3, 1e9, np.nan], action, names, history, probabilities=probabilities
            )
            assert shown.dtype == np.uint8
            np.testing.assert_array_equal(shown[:630, :480], enlarge(frame, 3))
            sizes.add(shown.shape)
            rows = np.flatnonzero((shown[40:150, 600:630] == (79, 195, 247)).all(-1).any(1))
            assert set(rows // 26) == ({action} if action != 3 else set(rows // 26))
    assert len(sizes) == 1
    assert all(size % 2 == 0 for size in next(iter(sizes))[:2])
    many = explain(film(85, 85)[0], np.arange(18.0), 17, [f"A LONG NAME {i}" for i in range(18)], [1.0, 2.0])
    assert many.shape[0] > 600 and many.shape[0] % 2 == 0 and many.shape[1] % 2 == 0


def test_explain_refuses_what_does_not_fit():
    frame = film()[0]
    for values, action, names in (([1, 2], 2, ["a", "b"]), ([1, 2], 0, ["a"]), ([1, 2], -1, ["a", "b"])):
        with pytest.raises(ValueError, match="do not fit"):
            explain(frame, values, action, names, [])
