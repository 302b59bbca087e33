# Makes .venv from requirements.txt if it is missing or stale. Sourced by run_all.sh and tests/run.sh; sets `root`
# and `python`. Stale: requirements.txt or the interpreter's version is not the one that .venv was made from.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$root/.venv/bin/python"

make_environment() {
    local base="${PYTHON:-python3}" wanted
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: $base is not Python 3.11 or newer: install one, or name it by PYTHON=..." >&2
        exit 2
    fi
    wanted="$("$base" -c '
import hashlib, pathlib, sys
print(hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes() + sys.version.encode()).hexdigest())' \
        "$root/requirements.txt")"
    if [ "$(cat "$root/.venv/made-from" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    (
        # Two starts at once: the second waits, then finds it made. (macOS has no flock; there it is left to the user.)
        if command -v flock >/dev/null; then flock 9; fi
        if [ "$(cat "$root/.venv/made-from" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
        echo "[environment] installing requirements.txt into .venv (once)"
        rm -rf "$root/.venv"
        "$base" -m venv "$root/.venv"
        # Python compiles what it imports anyway; pip would compile all of it, which takes as long as the rest.
        if ! "$python" -m pip install --quiet --no-compile --disable-pip-version-check -r "$root/requirements.txt"; then
            echo "error: the packages of requirements.txt could not be installed (network?): start again" >&2
            exit 2
        fi
        echo "$wanted" >"$root/.venv/made-from"
    ) 9>"$root/.venv.lock" || exit 2
}

make_environment

# Compiling the packages anew takes longer than a small stage does, so what Python compiles is kept, below .venv; also
# for who asks for no bytecode beside sources (many containers do).
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX="$root/.venv/bytecode"
