# make setup   .venv from requirements.lock        make test   lint, types and the whole suite
# make demo    train, evaluate, report: minutes    make lint   lint and types alone
# make lock    requirements.lock, made anew        make clean  away with .venv and caches
#
# Needs make and Python 3.11 or newer (`PY=/usr/bin/python3.12 make setup` names one); uv is fetched where it is missing.

CANDIDATES := $(or $(PY),python3 python3.13 python3.12 python3.11)
# The redirections make this go through a shell, so that its builtin `command` is found by every make.
PYTHON = $(shell for p in $(CANDIDATES); do "$$p" -c 'import sys; print(sys.executable) if sys.version_info >= (3, 11) \
	else sys.exit(1)' 2>/dev/null </dev/null && break; done)
FOUND = $(or $(PYTHON),$(error diptych needs Python 3.11 or newer, and none of these is one: $(CANDIDATES); \
	install one, or name it: make PY=/path/to/python3))
UV := $(or $(shell command -v uv 2>/dev/null),.boot/bin/uv)
# Without it uv would try to download a Python that it thinks is lacking.
export UV_PYTHON_DOWNLOADS = never

.PHONY: setup demo test lint lock clean

setup: .venv/.ok

demo: .venv/.ok
	.venv/bin/diptych demo

test: .venv/.ok
	.venv/bin/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

lint: .venv/.ok
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ty check

.venv/.ok: requirements.lock pyproject.toml | $(UV)
	[ -x .venv/bin/python ] || { rm -rf .venv && $(UV) venv -q --no-project --python $(FOUND) .venv; }
	$(UV) pip sync -q --python .venv --require-hashes requirements.lock
	$(UV) pip install -q --python .venv --no-deps --editable .
	touch $@

# pip where there is one; a venv where pip is missing or guarded; Debian keeps the venv's makings apart.
.boot/bin/uv:
	$(FOUND) -m pip install -q --target .boot uv || { rm -rf .boot; \
	$(FOUND) -m venv .boot && .boot/bin/python -m pip install -q uv; } || { rm -rf .boot; \
	echo "uv could not be installed: install uv, pip or your system's python3-venv, and see that a registry answers" >&2; \
	exit 1; }

# Reads [tool.uv] in pyproject.toml, so no --no-config; python-version: the lock serves every Python from the oldest on.
lock: | $(UV)
	$(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --extra starter --extra dev \
	--custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:
	rm -rf .venv .boot .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
