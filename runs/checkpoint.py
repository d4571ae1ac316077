"""Checkpoints: folders that are complete or invisible, verified before use, without pickle.

A state is a dict of groups. A group of tensors becomes `<group>.safetensors`, a group of numpy arrays
`<group>/<name>.npy`, anything else `<group>.json`; `manifest.json` lists each file with its size and SHA-256.

What has not changed since another checkpoint can be shared with it: the file gets a second name (a hard link), so that
each folder is complete by itself, and a large replay costs only what was added to it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import torch as safetensors

from runs.config import UserError
from runs.disk import PARTIAL, partial_name, sync_folder

FORMAT = 1
MANIFEST = "manifest.json"
OLD = ".old"  # the one being replaced; taken only if its successor never arrived

State = dict[str, Any]

_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_JSON_LIMIT = 64 * 2**20  # bytes; manifests and counters are far smaller


class CorruptCheckpoint(ValueError):
    """A checkpoint that is damaged or incomplete; the message names it and the file."""


class NewerFormat(UserError):
    """A checkpoint that a later version of this program wrote."""


def save(
    folder: Path, step: int, state: State, base: Path | None = None, unchanged: Collection[str] = ()
) -> None:
    """Write `state` as the checkpoint `folder`, replacing one of that name.

    Arrays named in `unchanged` ("group/name") are as in the checkpoint `base`, and shared with it where it has them.
    Everything is written and synced aside first. On any failure what was there before is intact.
    Raises: OSError if the disk refuses (full, read-only); ValueError or TypeError for an unfit state.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    tidy(folder.parent)
    aside = partial_name(folder)
    try:
        aside.mkdir()
        shared = {f"{name}.npy" for name in unchanged}
        files = _write_groups(aside, state, base, _facts(base) if shared else {}, shared)
        manifest = {"format": FORMAT, "step": step, "files": files}
        _write(aside, MANIFEST, lambda file: file.write(json.dumps(manifest, indent=2).encode()))
        for inner in [*(entry for entry in aside.iterdir() if entry.is_dir()), aside]:
            sync_folder(inner)
        _put_in_place(aside, folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            error.add_note(f"the checkpoint at step {step} was not saved; the one before is intact")
        raise


def _facts(base: Path | None) -> dict[str, Any]:
    """The files of a checkpoint as its manifest lists them; none if it cannot be read."""
    try:
        return {} if base is None else _manifest(base, None)["files"]
    except (OSError, ValueError):
        return {}


def load(folder: Path, step: int | None = None) -> State:
    """Read the checkpoint `folder`, tensors on the CPU, after checking every size and hash.

    Arrays are read-only views of their files.
    Raises: CorruptCheckpoint if anything differs from the manifest, or the manifest is not for `step`; NewerFormat.
    """
    folder = folder if folder.exists() else folder.with_name(folder.name + OLD)
    try:
        state: State = {}
        for name, facts in _manifest(folder, step)["files"].items():
            group, kind, entry = _parse(name)
            value = _read(folder, name, facts)
            if kind == "npy":
                state.setdefault(group, {})[entry] = value
            else:
                state[group] = value
        return state
    except NewerFormat:
        raise
    except Exception as error:  # each parser of a forged file has errors of its own
        raise CorruptCheckpoint(
            f"checkpoint {folder} is not usable: {' '.join(str(error).split())}"
        ) from error


def load_latest(parent: Path, say: Callable[[str], None]) -> tuple[int, State]:
    """Read the newest usable checkpoint below `parent`, and its step; each one skipped is named through `say`.

    Raises: UserError if there is none.
    """
    found = steps(parent)
    for step in reversed(found):
        try:
            return step, load(parent / str(step), step)
        except CorruptCheckpoint as error:
            say(f"{error}; taking the one before")
    raise UserError(f"no {'usable ' if found else ''}checkpoint in {parent}")


def steps(parent: Path) -> list[int]:
    """The steps that have a checkpoint below `parent`, in order."""
    if not parent.is_dir():
        return []
    names = {entry.name.removesuffix(OLD) for entry in parent.iterdir() if entry.is_dir()}
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name)))


def set_aside(parent: Path, newer_than: int) -> list[Path]:
    """Rename what lies beyond a step to `<step>.bad`: it was not usable. Returns the new names."""
    moved = []
    for step in steps(parent):
        for folder in (parent / str(step), parent / f"{step}{OLD}"):
            if step > newer_than and folder.exists():
                moved.append(folder.with_name(f"{folder.name}.bad"))
                shutil.rmtree(moved[-1], ignore_errors=True)
                folder.rename(moved[-1])
    return moved


def prune(parent: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints below `parent`."""
    for step in steps(parent)[:-keep]:
        for folder in (parent / str(step), parent / f"{step}{OLD}"):
            _delete(folder)


def tidy(parent: Path) -> None:
    """Remove what a killed process left half-written; bring back what it was about to replace."""
    for entry in list(parent.iterdir()) if parent.is_dir() else []:
        if entry.name.startswith(PARTIAL) and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name.startswith(PARTIAL):
            entry.unlink(missing_ok=True)
        elif entry.name.endswith(OLD) and entry.is_dir():
            successor = entry.with_name(entry.name.removesuffix(OLD))
            if successor.exists():
                _delete(entry)
            else:
                entry.rename(successor)


def _delete(folder: Path) -> None:
    if folder.exists():
        aside = partial_name(folder)
        folder.rename(aside)  # first out of sight, so that a kill cannot leave half a checkpoint
        shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(aside: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + OLD)
    replaces = folder.exists()
    if replaces:
        folder.rename(old)
    try:
        aside.rename(folder)
    except BaseException:
        if replaces:
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    _delete(old)


class _Hashed(io.RawIOBase):
    """A file that sums up what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.bytes, self.hash = file, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.hash.update(content)
        self._file.write(content)
        self.bytes += len(content)
        return len(content)


def _write(folder: Path, name: str, fill: Callable[[_Hashed], Any]) -> dict[str, Any]:
    with open(folder / name, "xb") as file:
        hashed = _Hashed(file)
        fill(hashed)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashed.bytes, "sha256": hashed.hash.hexdigest()}


def _link(folder: Path, name: str, base: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Give the file of another checkpoint a second name; None if that cannot be done."""
    try:
        if (base / name).stat().st_size != facts["bytes"]:
            return None  # damaged since it was written
        os.link(base / name, folder / name)
    except OSError:
        return None  # no such file, or a file system without links
    return facts


def _write_groups(
    folder: Path, state: State, base: Path | None, facts: dict[str, Any], shared: Collection[str]
) -> dict[str, Any]:
    files = {}
    for group, values in state.items():
        if not _GROUP.fullmatch(group) or f"{group}.json" == MANIFEST:
            raise ValueError(f"a checkpoint cannot have a group named {group!r}")
        if _all(values, torch.Tensor):
            # clones: tied weights share memory, which the format refuses
            plain = {
                n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in values.items()
            }
            content = safetensors.save(plain)
            name = f"{group}.safetensors"
            files[name] = _write(folder, name, lambda file, content=content: file.write(content))
        elif _all(values, np.ndarray):
            (folder / group).mkdir()
            for key, array in values.items():
                if not _NAME.fullmatch(key):
                    raise ValueError(f"group {group!r} cannot have an array named {key!r}")
                name = f"{group}/{key}.npy"
                if base is not None and name in shared and name in facts:
                    linked = _link(folder, name, base, facts[name])
                    if linked is not None:
                        files[name] = linked
                        continue
                files[name] = _write(folder, name, lambda file, array=array: _write_array(file, array))
        else:
            _check_json(values, group)
            content = json.dumps(values).encode()
            name = f"{group}.json"
            files[name] = _write(folder, name, lambda file, content=content: file.write(content))
    return files


def _write_array(file: Any, array: np.ndarray) -> None:
    np.lib.format.write_array(file, array, allow_pickle=False)


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, dict) and bool(values) and all(isinstance(v, kind) for v in values.values())


def _check_json(value: Any, where: str) -> None:
    """Refuse what JSON would silently turn into something else (tuples become lists)."""
    if isinstance(value, dict):
        for name, entry in value.items():
            if not isinstance(name, str):
                raise TypeError(f"{where}: keys must be text, got {name!r}")
            _check_json(entry, f"{where}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            _check_json(entry, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"{where}: cannot be stored as JSON beside other values: {type(value).__name__}")


def _parse(name: str) -> tuple[str, str, str]:
    """Split a file name of a manifest into group, kind and entry; it can only point into the folder."""
    stem, _, kind = name.rpartition(".")
    group, slash, entry = stem.partition("/")
    named = bool(_NAME.fullmatch(entry)) if kind == "npy" else not slash and kind in ("safetensors", "json")
    if not named or not _GROUP.fullmatch(group):
        raise ValueError(f"{MANIFEST} lists an impossible file {name!r}")
    return group, kind, entry


def _manifest(folder: Path, step: int | None) -> dict[str, Any]:
    manifest = json.loads(_bounded(folder / MANIFEST), object_pairs_hook=_without_doubles)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST} is not a manifest")
    for name, facts in manifest["files"].items():
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise ValueError(f"{MANIFEST} does not describe {name!r}")
    version = manifest.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormat(
            f"{folder} has format {version}, which needs a newer chordate; this one reads {FORMAT}"
        )
    if version != FORMAT:
        raise ValueError(f"{MANIFEST} has format {manifest.get('format')!r}; this version reads {FORMAT}")
    if step is not None and manifest.get("step") != step:
        raise ValueError(f"{MANIFEST} is for step {manifest.get('step')!r}, not {step}")
    return manifest


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A damaged name may equal another one, which would then be lost without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{MANIFEST} has one name twice")
    return found


def _bounded(path: Path) -> bytes:
    if path.stat().st_size > _JSON_LIMIT:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, more than {_JSON_LIMIT}")
    return path.read_bytes()


def _read(folder: Path, name: str, facts: dict[str, Any]) -> Any:
    path = folder / name
    if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
        raise ValueError(f"{name} is missing")
    if path.stat().st_size != facts["bytes"]:
        raise ValueError(f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
            raise ValueError(f"{name} does not have the SHA-256 of the manifest")
    if name.endswith(".npy"):
        # mapping first: a header that promises more than the file holds fails before any memory is taken;
        # unlike np.load this opens neither pickles nor zip archives
        return np.lib.format.open_memmap(path, mode="r")
    return (
        safetensors.load(path.read_bytes()) if name.endswith(".safetensors") else json.loads(_bounded(path))
    )
