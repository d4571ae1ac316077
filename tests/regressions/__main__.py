"""Rewrite every pinned trace; the diff is there to be read."""

import json

from tests.regressions.traces import FOLDER, POLICIES, RUNS, TABULAR, trace

for name in [*RUNS, *TABULAR, *POLICIES]:
    (FOLDER / f"{name}.json").write_text(json.dumps(trace(name), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {name}.json")
