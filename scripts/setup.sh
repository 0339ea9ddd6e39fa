#!/usr/bin/env bash
# Makes this source tree ready to run, then runs the Python it found or made with the arguments given:
#     scripts/setup.sh -m pytest
# Called by the Makefile, which documents the variables PYTHON, TORCH and MODULI_KERNELS_BUILD.
#
#   1. A Python >= 3.10: $PYTHON, else python3.
#   2. If it imports torch >= 2.10, it is used as it is. Else .venv is made with it and torch installed there.
#   3. What pyproject.toml asks for and is missing is installed; if nothing is missing, no network is needed.
#   4. The C++ kernels are compiled in place (again only where a source has changed).
# Steps 2 and 3 are skipped while their stamp agrees with the files they depend on. A failure is one sentence.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

TORCH=${TORCH:-torch==2.13.0}
BUILD=${MODULI_KERNELS_BUILD:-auto}
EXTRAS="test examples ${MODULI_KERNELS_EXTRAS:-}"   # of pyproject.toml; more for some commands of the Makefile
NEEDED_GB=4   # torch's CPU build, the tools and room for pip to unpack them; its CUDA build takes more
LOG=build/setup.log
VENV_UNFINISHED=.venv/moduli-setup-unfinished   # the process that sets up; stays behind if that is killed
VENV_DONE=.venv/moduli-setup-done   # line 1: what it was made from; line 2: the Python it was made with
BASE_DONE=build/setup-done          # the same for a Python that had torch

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { printf 'setup failed: %s\n' "$*" >&2; exit 1; }

# ---- 1. Python ----------------------------------------------------------------------------------------

find_python() {
    local asked=${PYTHON:-python3} version
    version=$("$asked" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || fail \
        "Python 3.10 or newer is needed, but '$asked' does not run; install it or set PYTHON=python3.11"
    "$asked" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail \
        "Python 3.10 or newer is needed, but '$asked' is Python $version; name a newer one: PYTHON=python3.11"
    BASE=$("$asked" -c 'import sys; print(sys.executable)')
}

# ---- Checks before anything is written ----------------------------------------------------------------

check_compiler() {
    [ "$BUILD" = python ] && return
    local cxx=${CXX:-} probe
    for probe in c++ g++ clang++; do
        [ -z "$cxx" ] && command -v "$probe" >/dev/null 2>&1 && cxx=$probe
    done
    [ -n "$cxx" ] || fail \
        "no C++ compiler was found; install g++ or clang++ (or do without: MODULI_KERNELS_BUILD=python)"
    probe=$(mktemp -d) || fail "no temporary file can be written; is the disk full?"
    printf '#include <vector>\nint main() { return std::vector<int>().size(); }\n' >"$probe/a.cpp"
    # CXX may hold options, hence no quotes
    $cxx -std=c++20 "$probe/a.cpp" -o "$probe/a" >"$probe/log" 2>&1
    local result=$? first
    first=$(head -n 1 "$probe/log")
    rm -rf "$probe"
    [ $result -eq 0 ] || fail \
        "the C++ compiler '$cxx' cannot compile a small C++20 program ($first); install g++ 10 or newer"
}

check_venv() {
    "$BASE" -c 'import venv, ensurepip' 2>/dev/null || fail \
        "Python's venv module is missing for $BASE; install it (Debian and Ubuntu: apt install python3-venv)"
}

check_disk() {
    local free_kb
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "${free_kb:-0}" -ge $((NEEDED_GB * 1024 * 1024)) ] || fail \
        "about $NEEDED_GB GB of free disk are needed to install torch, but $PWD has $((free_kb / 1024)) MB"
}

# ---- 2 and 3. Packages --------------------------------------------------------------------------------

has_torch() {
    "$1" - 2>/dev/null <<'PY'
import sys
try:
    import torch
except Exception:
    sys.exit(1)
sys.exit(tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10))
PY
}

pip_install() {   # pip_install PYTHON what...   (progress is shown on a terminal; all else goes to the log)
    local python=$1 show=/dev/null
    shift
    [ -t 2 ] && show=/dev/stderr
    local pip=("$python" -m pip --no-input --disable-pip-version-check --log "$LOG")
    "${pip[@]}" --version >/dev/null 2>&1 || fail "pip is missing for $python; install it and run make again"
    "${pip[@]}" install "$@" >"$show" 2>/dev/null && return
    local reason="no network, or no such package?"
    grep -q "No space left" "$LOG" && reason="the disk is full"
    grep -q "externally-managed" "$LOG" && reason="the system owns this Python: use a virtual environment"
    fail "pip could not install $* for $python ($reason); its messages are in $LOG"
}

install_missing() {   # install_missing PYTHON
    local missing
    # shellcheck disable=SC2086
    missing=$("$1" scripts/missing_requirements.py $EXTRAS) || fail \
        "the requirements in pyproject.toml could not be compared with what $1 has; is its pip complete?"
    [ -z "$missing" ] && return
    say "installing what $1 lacks: $(echo $missing)"
    local requirements=()
    while IFS= read -r line; do requirements+=("$line"); done <<<"$missing"
    pip_install "$1" "${requirements[@]}"
}

stamp_key() { { cat pyproject.toml scripts/setup.sh; echo "$TORCH $EXTRAS"; } | cksum; }

clear_venv() {   # removes a .venv that this script made and that cannot be used, and no other
    local maker
    [ -e .venv ] || return
    if [ ! -e "$VENV_DONE" ]; then
        [ -e "$VENV_UNFINISHED" ] || fail \
            "there is a .venv that make did not create; activate it and install torch, or move it away"
        maker=$(cat "$VENV_UNFINISHED")
        if [ -n "$maker" ] && kill -0 "$maker" 2>/dev/null; then
            fail "process $maker is already setting up .venv; wait for it, or end it, then run make again"
        fi
        say "removing the unfinished .venv of an interrupted set-up"
        rm -rf .venv
    elif [ -n "${PYTHON:-}" ] && [ "$(sed -n 2p "$VENV_DONE")" != "$BASE" ]; then
        say "removing the .venv that was made with $(sed -n 2p "$VENV_DONE")"
        rm -rf .venv
    fi
}

prepare_venv() {
    clear_venv
    check_venv
    check_compiler
    rm -f "$LOG"
    if [ -e .venv ]; then
        say "bringing .venv up to date with pyproject.toml (log: $LOG)"
        echo $$ >"$VENV_UNFINISHED" && BASE=$(sed -n 2p "$VENV_DONE") && rm "$VENV_DONE"
    else
        check_disk
        say "creating .venv and installing $TORCH and the tools into it: once, a few minutes (log: $LOG)"
        { mkdir .venv && echo $$ >"$VENV_UNFINISHED"; } || fail "the folder .venv cannot be written in $PWD"
        "$BASE" -m venv .venv >>"$LOG" 2>&1 || fail "the virtual environment could not be made; see $LOG"
    fi
    # shellcheck disable=SC2086   # TORCH may hold several arguments for pip
    pip_install .venv/bin/python $TORCH
    has_torch .venv/bin/python || fail \
        "$TORCH is not a torch >= 2.10 that imports here; see: .venv/bin/python -c 'import torch'"
    install_missing .venv/bin/python
    { stamp_key && echo "$BASE"; } >"$VENV_DONE.new"
    mv "$VENV_DONE.new" "$VENV_DONE" && rm "$VENV_UNFINISHED"
}

venv_is_ready() {
    [ "$(sed -n 1p "$VENV_DONE" 2>/dev/null)" = "$(stamp_key)" ] && [ ! -e "$VENV_UNFINISHED" ] &&
        { [ -z "${PYTHON:-}" ] || [ "$(sed -n 2p "$VENV_DONE")" = "$BASE" ]; }
}

base_is_ready() {
    [ "$(cat "$BASE_DONE" 2>/dev/null)" = "$(stamp_key) $BASE" ] &&
        "$BASE" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
}

prepare() {
    PY=$BASE
    base_is_ready && return
    if venv_is_ready; then
        PY=$PWD/.venv/bin/python
        return
    fi
    if has_torch "$BASE"; then
        check_compiler
        rm -f "$LOG"
        say "using $BASE, which has torch"
        install_missing "$BASE"
        echo "$(stamp_key) $BASE" >"$BASE_DONE"
    else
        prepare_venv
        PY=$PWD/.venv/bin/python
    fi
}

# ---- 4. Kernels ---------------------------------------------------------------------------------------

build_kernels() {
    [ "$BUILD" = auto ] && BUILD=cpu   # here a missing compiler is an error: see check_compiler
    MODULI_KERNELS_BUILD=$BUILD "$PY" setup.py -q build_ext --inplace || exit 1
}

trap 'exit 130' INT TERM   # else an interrupted pip would be reported as one without network
mkdir -p build 2>/dev/null || fail "the folder $PWD cannot be written"
find_python
prepare
build_kernels
[ $# -eq 0 ] && exit 0
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$PY" "$@"
