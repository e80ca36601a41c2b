#!/bin/sh
# Makes LAVIS's own environment: setup.sh [PATH], by default benchmarks/.lavis. setup.sh --lock renews the lock.
# Wants uv (named by $UV, on the PATH, or in .boot/bin) and Python 3.11 (named by $PY): torch 2.15 has no earlier one,
# tokenizers 0.13 no later one.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
uv=${UV:-$(command -v uv || echo "$here/../../.boot/bin/uv")}
python=${PY:-3.11}
export UV_PYTHON_DOWNLOADS=never
[ -x "$uv" ] || { echo "setup.sh: no uv; install it or name it: UV=/path/to/uv $0" >&2; exit 2; }

if [ "${1:-}" = --lock ]; then
    cd "$here"
    exec "$uv" pip compile -q --no-config --universal --python-version 3.11 --generate-hashes \
        --custom-compile-command "benchmarks/lavis/setup.sh --lock" --override overrides.txt \
        --excludes excludes.txt requirements.in -o requirements.lock
fi

env=${1:-$here/../.lavis}
[ -x "$env/bin/python" ] || "$uv" venv -q --no-project --python "$python" "$env"
"$uv" pip sync -q --no-config --python "$env" --require-hashes "$here/requirements.lock"
"$env/bin/python" -W ignore -c "import lavis.models.blip2_models.blip2_qformer"  # or nothing was gained
echo "LAVIS's Python: $env/bin/python"
