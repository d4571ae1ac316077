"""Short runs repeat what is pinned, to a tolerance that another processor meets."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.regressions.traces import FOLDER, POLICIES, RUNS, TABULAR, trace

RELATIVE, ABSOLUTE = 2e-3, 2e-5  # fp32 sums in another order, amplified by some dozens of updates


@pytest.mark.parametrize("name", [*RUNS, *TABULAR, *POLICIES])
def test_trace_is_as_pinned(name: str) -> None:
    pinned = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    found = trace(name)
    assert found["updates"] == pinned["updates"]
    # step, return, length: where rewards are real numbers they follow the rounding of the actions
    np.testing.assert_allclose(found["episodes"], pinned["episodes"], rtol=1e-4, atol=0)
    assert found["weights"].keys() == pinned["weights"].keys()
    assert found.keys() == pinned.keys()
    for key in found.keys() - {"updates", "episodes"}:
        assert found[key] == pytest.approx(pinned[key], rel=RELATIVE, abs=ABSOLUTE), key


def test_another_seed_is_noticed() -> None:
    """The tolerance is far finer than what a change of the algorithm does."""
    pinned = json.loads((FOLDER / "dqn-mlp-cartpole.json").read_text(encoding="utf-8"))
    found = trace("dqn-mlp-cartpole", seed=2)
    for key in ("loss", "q", "grad_norm", "weights"):
        assert found[key] != pytest.approx(pinned[key], rel=RELATIVE, abs=ABSOLUTE), key
