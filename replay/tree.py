"""Observations and actions of Dict and Tuple spaces: trees of arrays, and what is done to all their leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[Any, ...]


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Each leaf with the keys that lead to it, in order."""
    if isinstance(tree, dict):
        for name, part in tree.items():
            yield from leaves(part, (*path, name))
    elif isinstance(tree, tuple):
        for k, part in enumerate(tree):
            yield from leaves(part, (*path, k))
    else:
        yield path, tree


def rows(tree: Any) -> int:
    """How many rows the leaves have."""
    return len(next(leaves(tree))[1])


def joined(tree: Any) -> Any:
    """Leaves (T, N, ...) as (T N, ...)."""
    return mapped(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), tree)


def filled(tree: Any, values: Iterator[Any]) -> Any:
    """The shape of `tree` with other leaves, in the order of `leaves`."""
    if isinstance(tree, dict):
        return {name: filled(part, values) for name, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(filled(part, values) for part in tree)
    return next(values)


def mapped(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function` of the leaves that stand at the same place of each tree."""
    if isinstance(tree, dict):
        return {name: mapped(function, part, *(o[name] for o in others)) for name, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(mapped(function, part, *(o[k] for o in others)) for k, part in enumerate(tree))
    return function(tree, *others)
