"""Damaged files: each load gives what was saved, or falls back to the checkpoint before, or refuses in one line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from runs import UserError, checkpoint
from tests.faults.tools import CARTPOLE, copied, damage, killed, put, resumed, same_state
from tests.tools import assert_same_run

EVERY = 25  # damaged checkpoints: one of them is also trained on from


def source(folder: Path) -> Path:
    """A killed run with two checkpoints, which share a block of the replay."""
    settings = {**CARTPOLE, "capacity": 6_000, "train_every": 32, "checkpoint_every": 2_100, "steps": 4_500}
    killed(folder, 4_300, **settings)
    assert checkpoint.steps(folder / "checkpoints") == [2_100, 4_200]
    block = [folder / "checkpoints" / step / "replay" / "frames.0.0.npy" for step in ("2100", "4200")]
    assert block[0].samefile(block[1])
    return folder


def files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def loaded(parent: Path, originals: dict[int, Any]) -> str:
    """Load the newest checkpoint, which may be damaged: "equal", "fell back" or "refused"; all else is an error."""
    newest, said = max(originals), list[str]()
    try:
        step, state = checkpoint.load_latest(parent, said.append)
    except UserError as error:
        assert "\n" not in str(error)
        return "refused"
    assert same_state(state, originals[step]), "wrong data were loaded"
    assert (step == newest) == (not said) and all(str(parent / str(newest)) in line for line in said), said
    return "equal" if step == newest else "fell back"


def check(run: Path, folder: Path, count: int, seed: int) -> str:
    """Damage a checkpoint in `count` ways; the figures."""
    rng, found = np.random.default_rng(seed), Counter[str]()
    parent = run / "checkpoints"
    originals = {step: checkpoint.load(parent / str(step), step) for step in checkpoint.steps(parent)}
    whole = folder / "whole"
    resumed(copied(run, whole))
    for number in range(count):
        trial = copied(run, folder / "trial") / "checkpoints"
        path = files(trial / str(max(originals)))[int(rng.integers(len(files(trial / str(max(originals))))))]
        done = damage(rng, path, shared=bool(rng.integers(2)))
        try:
            outcome = loaded(trial, originals)
            if number % EVERY == 0 and outcome != "refused":
                resumed(trial.parent)
                assert_same_run(whole, trial.parent)
                found["trained on"] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed}: {done}") from error
        found[outcome] += 1
        shutil.rmtree(trial.parent)
    assert found["fell back"] and sum(found.values()) - found["trained on"] == count
    return f"{count} damaged checkpoints: " + ", ".join(f"{n} {name}" for name, n in sorted(found.items()))


def check_shared(run: Path, folder: Path) -> str:
    """A shared file that is damaged costs both checkpoints; each alone is refused, too."""
    parent = run / "checkpoints"
    originals = {step: checkpoint.load(parent / str(step), step) for step in checkpoint.steps(parent)}
    shared = [path for path in files(parent / str(max(originals))) if path.stat().st_nlink > 1]
    for path in shared:
        for together, expected in ((True, "refused"), (False, "fell back")):
            trial = copied(run, folder / "trial") / "checkpoints"
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            put(trial / path.relative_to(parent), bytes(content), together)
            assert loaded(trial, originals) == expected
            shutil.rmtree(trial.parent)
    assert shared
    return f"{len(shared)} shared files, damaged for one checkpoint and for both"


def check_run_files(folder: Path, count: int, seed: int) -> str:
    """Damage config.json and the logs in `count` ways and resume: it goes on, or one line says why not."""
    rng, found = np.random.default_rng(seed), Counter[str]()
    run = folder / "run"
    killed(run, 150, **{**CARTPOLE, "steps": 200, "eval_every": 50, "eval_episodes": 1})
    paths = [path for path in files(run) if path.parent == run]
    assert {"config.json", "scores.csv", "metrics.csv", "evaluations.csv"} <= {path.name for path in paths}
    for number in range(count):
        trial = copied(run, folder / "trial")
        done = damage(rng, trial / paths[int(rng.integers(len(paths)))].name, shared=True)
        try:
            resumed(trial)
            found["went on"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            found["refused"] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed}: {done}") from error
        shutil.rmtree(trial)
    assert found["went on"] and found["refused"]
    return f"{count} damaged logs and configurations: " + ", ".join(
        f"{n} {name}" for name, n in found.items()
    )


class Bomb:
    """Whoever unpickles this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def bombs(marker: Path) -> dict[str, bytes]:
    """A bomb in every shape that a careless reader would unpickle."""
    plain, array, archive, text = pickle.dumps(Bomb(marker)), io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(archive, "w") as file:  # as torch.save writes
        file.writestr("archive/data.pkl", plain)
        file.writestr("archive/version", "3\n")
        file.writestr("data.npy", array.getvalue())  # as np.savez writes
    text.write(pickle.dumps(Bomb(marker), protocol=0))
    return {
        "pickle": plain,
        "text": text.getvalue(),
        "npy": array.getvalue(),
        "zip": archive.getvalue(),
    }


def check_bombs(run: Path, folder: Path, shapes: Collection[str] = ("pickle", "text", "npy", "zip")) -> str:
    """Put a bomb of each shape into each file of a checkpoint, with a manifest that agrees."""
    marker = folder / "exploded"
    with tempfile.TemporaryDirectory() as elsewhere:  # the bomb is a real one
        pickle.loads(pickle.dumps(Bomb(Path(elsewhere) / "exploded")))
        assert (Path(elsewhere) / "exploded").exists()
    parent = run / "checkpoints"
    originals = {step: checkpoint.load(parent / str(step), step) for step in checkpoint.steps(parent)}
    newest = parent / str(max(originals))
    done = 0
    for path in files(newest):
        name = path.relative_to(newest).as_posix()
        for bomb in map(bombs(marker).__getitem__, shapes):
            trial = copied(parent, folder / "trial")
            target = trial / newest.name
            put(target / name, bomb, shared=False)
            if name != "manifest.json":
                manifest = json.loads((target / "manifest.json").read_text())
                facts = {"bytes": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
                manifest["files"][name] = facts
                (target / "manifest.json").write_text(json.dumps(manifest))
            assert loaded(trial, originals) == "fell back", name
            assert not marker.exists(), f"{name} was executed"
            shutil.rmtree(trial)
            done += 1
    return f"{done} bombs in {len(files(newest))} files, none executed, all fell back"
