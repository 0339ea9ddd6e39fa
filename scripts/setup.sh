#!/usr/bin/env bash
# Makes this source tree ready, then runs Python with the arguments given:
#     scripts/setup.sh -m pytest
# The Makefile calls it, and documents the variables PYTHON, TORCH and MODULI_KERNELS_BUILD.
#
#   1. It finds a Python >= 3.10: $PYTHON, or else python3.
#   2. If that Python has torch >= 2.10 and all other requirements, it is used as it is, without network.
#   3. Or else .venv is made, and pip installs this project with its requirements there. If the Python has torch, .venv
#      borrows it; or else pip first installs $TORCH in .venv. Nothing is ever installed outside .venv.
#   4. The C++ kernels are compiled in place, where a source has changed.
# If step 3 was interrupted, the next call does it again. A failure is one sentence.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

ASKED_TORCH=${TORCH:-}
TORCH=${TORCH:-torch==2.13.0}
BUILD=${MODULI_KERNELS_BUILD:-auto}
EXTRAS="test examples${MODULI_KERNELS_EXTRAS:+ $MODULI_KERNELS_EXTRAS}"   # extras of pyproject.toml
BUILD_TOOLS="setuptools>=77 ninja pybind11"   # pip builds without isolation, so they must be there before
NEEDED_GB=4   # for torch's CPU build, the tools and pip's temporary files; torch's CUDA build takes more
LOG=build/setup.log
UNFINISHED=.venv/moduli-setup-unfinished   # holds the id of the process that sets up; it stays if that is killed
DONE=.venv/moduli-setup-done               # holds the Python and the torch that .venv was made with
BASE_DONE=build/setup-done                 # holds the Python whose torch is known to import

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { printf 'setup failed: %s\n' "$*" >&2; exit 1; }

# ---- Checks before anything is written ----------------------------------------------------------------

find_python() {
    local asked=${PYTHON:-python3} version
    version=$("$asked" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || fail \
        "Python 3.10 or newer is needed, but '$asked' does not run; install it or set PYTHON=python3.11"
    "$asked" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail \
        "Python 3.10 or newer is needed, but '$asked' is Python $version; name a newer one: PYTHON=python3.11"
    BASE=$("$asked" -c 'import sys; print(sys.executable)')
}

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

check_disk() {
    local free_kb
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "${free_kb:-0}" -ge $((NEEDED_GB * 1024 * 1024)) ] || fail \
        "about $NEEDED_GB GB of free disk are needed to install torch, but $PWD has $((free_kb / 1024)) MB"
}

# ---- What a Python has --------------------------------------------------------------------------------

imports_torch() {
    "$1" -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)' 2>/dev/null
}

lacks_nothing() {   # reads metadata only: importing torch takes 2 s
    local missing
    # shellcheck disable=SC2086
    missing=$("$1" scripts/missing_requirements.py $EXTRAS 2>/dev/null) && [ -z "$missing" ]
}

base_is_ready() {
    lacks_nothing "$BASE" || return 1
    [ "$(cat "$BASE_DONE" 2>/dev/null)" = "$BASE" ] && return
    imports_torch "$BASE" || return 1
    check_compiler
    say "using $BASE, which has torch"
    echo "$BASE" >"$BASE_DONE"
}

venv_is_whole() {   # made to its end, with the Python and torch that are asked for
    [ -e "$DONE" ] && [ ! -e "$UNFINISHED" ] && .venv/bin/python -c '' 2>/dev/null &&
        { [ -z "${PYTHON:-}" ] || grep -qxF "python: $BASE" "$DONE"; } &&
        { [ -z "$ASKED_TORCH" ] || grep -qxF "torch: $ASKED_TORCH" "$DONE"; }
}

# ---- .venv --------------------------------------------------------------------------------------------

remove_venv() {   # removes a .venv that this script made, and no other
    local maker
    [ -e "$DONE" ] || [ -e "$UNFINISHED" ] || fail \
        "there is a .venv that make did not create; activate it and install torch, or move it away"
    if [ -e "$UNFINISHED" ]; then
        maker=$(cat "$UNFINISHED")
        if [ -n "$maker" ] && kill -0 "$maker" 2>/dev/null; then
            fail "process $maker is already setting up .venv; wait for it, or end it, then run make again"
        fi
        say "removing the unfinished .venv of an interrupted set-up"
    else
        say "removing the .venv that was made with another Python or torch"
    fi
    rm -rf .venv
}

make_venv() {
    "$BASE" -c 'import venv, ensurepip' 2>/dev/null || fail \
        "Python's venv module is missing for $BASE; install it (Debian and Ubuntu: apt install python3-venv)"
    check_compiler
    local torch_folder
    if imports_torch "$BASE"; then
        torch_folder=$("$BASE" -c '
from importlib.util import find_spec
from pathlib import Path
print(Path(find_spec("torch").origin).parents[1])')
        say "creating .venv, which borrows the torch of $BASE, and installing the tools into it (log: $LOG)"
    else
        check_disk
        say "creating .venv and installing $TORCH and the tools into it: once, a few minutes (log: $LOG)"
    fi
    { mkdir .venv && echo $$ >"$UNFINISHED"; } || fail "the folder .venv cannot be written in $PWD"
    "$BASE" -m venv .venv >>"$LOG" 2>&1 || fail "the virtual environment could not be made; see $LOG"
    [ -z "${torch_folder:-}" ] || echo "$torch_folder" >"$(echo .venv/lib/python*/site-packages)/borrowed_torch.pth"
}

pip_install() {   # pip_install DESCRIPTION ARGUMENTS...   (shows pip's progress on a terminal, and keeps a log)
    local what=$1 show=/dev/null reason="no network, or no such package?"
    shift
    [ -t 2 ] && show=/dev/stderr
    .venv/bin/python -m pip --no-input --disable-pip-version-check --log "$LOG" install "$@" >"$show" 2>/dev/null &&
        return
    grep -q "No space left" "$LOG" && reason="the disk is full"
    [ -e "$DONE" ] && rm "$UNFINISHED"   # .venv was whole before, and pip changes nothing before it has all packages
    fail "pip could not install $what for .venv/bin/python ($reason); its messages are in $LOG"
}

fill_venv() {
    echo $$ >"$UNFINISHED"
    # shellcheck disable=SC2086   # TORCH and BUILD_TOOLS may hold several arguments for pip
    imports_torch .venv/bin/python || pip_install "$TORCH" $TORCH
    imports_torch .venv/bin/python || fail \
        "$TORCH is not a torch >= 2.10 that imports here; see: .venv/bin/python -c 'import torch'"
    # With this constraint, pip fails where a requirement would have it replace torch.
    .venv/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >.venv/torch.txt
    # shellcheck disable=SC2086
    pip_install "$BUILD_TOOLS" $BUILD_TOOLS --constraint .venv/torch.txt
    MODULI_KERNELS_BUILD=python pip_install "the requirements in pyproject.toml" \
        --no-build-isolation --constraint .venv/torch.txt -e ".[${EXTRAS// /,}]"   # step 4 compiles
    [ -e "$DONE" ] || printf 'python: %s\ntorch: %s\n' "$BASE" "$TORCH" >"$DONE"
    rm "$UNFINISHED"
}

prepare_venv() {
    if [ -e .venv ]; then
        venv_is_whole || remove_venv
    fi
    if [ -e .venv ]; then
        lacks_nothing .venv/bin/python && return
        rm -f "$LOG"
        say "bringing .venv up to date with pyproject.toml (log: $LOG)"
    else
        rm -f "$LOG"
        make_venv
    fi
    fill_venv
}

# ---- The steps ----------------------------------------------------------------------------------------

trap 'exit 130' INT TERM   # or else an interrupted pip would be reported as one without network
mkdir -p build 2>/dev/null || fail "the folder $PWD cannot be written"
find_python
if base_is_ready; then
    PY=$BASE
else
    prepare_venv
    PY=$PWD/.venv/bin/python
fi
export PATH="${PY%/*}:$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[ "$BUILD" = auto ] && BUILD=cpu   # here a missing compiler is an error: see check_compiler
MODULI_KERNELS_BUILD=$BUILD "$PY" setup.py -q build_ext --inplace || exit 1
[ $# -eq 0 ] && exit 0
exec "$PY" "$@"
