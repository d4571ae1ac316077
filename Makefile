# Every target that needs Python packages makes .venv first; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

# a plain path entry: a finder would lose the package `runs` to any folder of that name where a command is run
EDITABLE = --config-settings editable_mode=compat

.PHONY: pong install test lint format bench faults regressions figures clean

pong: .venv/run       ## train DQN on Pong, the main job
	$(BIN)/python -m agents.run dqn --env ALE/Pong $(ARGS)

test: .venv/dev       ## everything but slow and GPU-only tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

lint: .venv/dev       ## format, rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/dev     ## rewrite files in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/bench    ## speed and memory against Stable-Baselines3, sb3-contrib and skrl; leave the machine alone meanwhile
	$(BIN)/python -m tests.bench $(ARGS)

faults: .venv/dev     ## kill, damage and starve runs in every way; about a quarter of an hour
	$(BIN)/python -m tests.faults $(ARGS)

regressions: .venv/dev  ## rewrite the pinned traces; read the diff before you commit it
	$(BIN)/python -m tests.regressions

figures: .venv/run    ## the pictures of README.md, from the committed runs
	$(BIN)/python -m agents.figures

install: .venv/run    ## the packages a user needs

# The CPU build of torch is asked for by its exact version first: a range would be answered with a far larger build.
.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e .
	touch $@

.venv/dev: .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e ".[dev]"
	touch $@

.venv/bench: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e ".[dev,bench,mujoco]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
