#!/usr/bin/env bash
# All tests and the style check, in the same .venv that run_all.sh uses, and the engines of --ray and --slurm. Options
# go to pytest: bash tests/run.sh -k sweep
set -euo pipefail
# shellcheck source=stages/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../stages/environment.sh"
cd "$root"
export TOKENIZERS_PARALLELISM=false
if ! "$python" -c 'import ray, submitit' 2>/dev/null; then
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements-ray.txt -r requirements-slurm.txt
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
# One test a core; each keeps to its core, as two libraries that share it would only wait for each other.
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 "$python" -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
