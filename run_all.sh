#!/usr/bin/env bash
# CAST from data to report: stages 01 to 06, then the audit. Finished stages are skipped.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash run_all.sh PRESET|MODEL_PATH [--backend torch|flax] [--run DIR] [--dry-run] [stage options ...]
       bash run_all.sh PRESET|MODEL_PATH --ray [ADDRESS] | --slurm KEY=VALUE,... [options ...]

PRESET      smollm (a 135M model on a laptop), smollm-study (50 tuned arms of it: does the map predict the cost?),
            smollm-neurons (with NeuronTune), smollm-paper (the paper's protocol on that model), llama, qwen, mistral
            (the paper's, on a GPU), tiny (a test of the machinery)
MODEL_PATH  a folder with a model (safetensors, chat template) whose attention has a q_proj and an o_proj: README
--dry-run   only what would run: units, time and disk, from a short measured probe
--ray       units on Ray's actors: those of this machine, or of the cluster at ADDRESS (host:port, auto)
            --actors N, --gpus-per-actor N and --cpus-per-actor N say how many and how large (default: all there are)
--slurm     units as Slurm's jobs: partition=...,gpus=1,jobs=16,hours=8; with --dry-run the script

TEXT
}

if [ $# -eq 0 ]; then
    usage >&2
    exit 2
fi
preset="$1"
shift
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false
# glibc keeps what torch frees for its next array; given back, each page would be cleared anew (a twentieth of the time).
# 32 MiB is the largest first value that glibc before 2.35 takes.
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=4000000000

case " $preset $* " in *" --help "* | *" -h "*)
    usage
    exec "$python" -m stages.run.presets --help
    ;;
esac

case " $* " in *" --ray"[\ =]* | *" --slurm"[\ =]*)
    exec "$python" -m stages.scale.launch --preset "$preset" "$@"
    ;;
esac

options=()
for option in "$@"; do
    if [ "$option" = --dry-run ]; then dry_run=1; else options+=("$option"); fi
done
set -- ${options[@]+"${options[@]}"}
if [ -n "${dry_run:-}" ]; then
    exec "$python" -m stages.scale.plan --preset "$preset" "$@"
fi

run="$("$python" -m stages.run.presets --preset "$preset" "$@")"
for script in "$root"/stages/0*_*.py; do
    stage="$(basename "$script" .py)"
    "$python" -m "stages.$stage" --preset "$preset" "$@"
done
"$python" -m stages.audit "$run"
echo "report: $run/$stage/report.html"
