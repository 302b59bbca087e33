#!/usr/bin/env bash
# The tests and the style check, in the same .venv that run_all.sh uses, with the engines of --ray and --slurm.
#
#     bash tests/run.sh                 # what is not marked `long`
#     bash tests/run.sh --all           # everything
#     bash tests/run.sh -k sweep        # other options go to pytest
set -euo pipefail
# shellcheck source=../environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
cd "$root"
export TOKENIZERS_PARALLELISM=false
if ! "$python" -c 'import ray, submitit' 2>/dev/null; then
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements-ray.txt -r requirements-slurm.txt
fi
marks=(-m "not long")
options=()
for option in "$@"; do
    if [ "$option" = --all ]; then marks=(); else options+=("$option"); fi
done
"$python" -m ruff check .
"$python" -m ruff format --check .
# One test a core; each keeps to its core, as two libraries that share it would only wait for each other.
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 "$python" -m pytest -n auto --maxprocesses 8 --dist worksteal \
    ${marks[@]+"${marks[@]}"} ${options[@]+"${options[@]}"}
