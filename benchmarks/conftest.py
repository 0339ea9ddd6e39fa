"""Options of `pytest benchmarks`, its two settings of malloc, and the JSON record of the run.

At every step, glibc's malloc maps a gradient of tens of MB anew and gives it back to the system. Each new gradient then
costs a page fault for every 4 KB (tens of ms at n = 4096), for ours and every peer alike, so that one would time the
system's fault handler. Therefore the run starts pytest twice as a child, since malloc reads its settings at the start
of a process:

    retained    freed memory is kept for the next request, as PyTorch's CPU tuning guide has it by preloading tcmalloc
                or jemalloc. The goals are for these times.
    default     glibc without settings, for some cases.
"""
from __future__ import annotations

import os
import pathlib
import platform
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.harness import records
from moduli_kernels.env_report import environment

RETAINED = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184",
            "MALLOC_TOP_PAD_": "67108864"}
ALLOCATOR, RECORD = "MODULI_KERNELS_BENCHMARKS_ALLOCATOR", "MODULI_KERNELS_BENCHMARKS_RECORD"
GPU_RECORD = "MODULI_KERNELS_BENCHMARKS_GPU_RECORD"
DEADLINE = "MODULI_KERNELS_BENCHMARKS_DEADLINE"  # seconds since 1970; later cases on a GPU are left out
GLIBC = platform.libc_ver()[0] == "glibc"


def pytest_addoption(parser):
    group = parser.getgroup("moduli_kernels benchmarks")
    group.addoption("--quick", action="store_true", help="small sizes and 3 rounds: does everything work? No figures.")
    group.addoption("--threads", type=int, default=None, help="threads for all contestants (default: all cores)")


def pytest_cmdline_main(config):
    """Runs a child for each setting of malloc. In a child it returns None, and pytest goes on as usual."""
    if ALLOCATOR in os.environ or config.option.collectonly or config.option.help or config.option.version:
        return None
    settings = {"retained": RETAINED, "default": {}} if GLIBC else {"default": {}}
    name = records.QUICK if config.option.quick else time.strftime("%Y%m%d-%H%M%S.json")
    found = {RECORD: records.RESULTS / records.machine(environment()) / name}
    if torch.cuda.is_available():
        found[GPU_RECORD] = records.RESULTS / records.gpu_machine(torch.cuda.get_device_name()) / name
    if config.option.quick:
        for record in found.values():
            record.unlink(missing_ok=True)
    worst = 0
    for name, variables in settings.items():
        print(f"\nmalloc: {name} " + " ".join(f"{key}={value}" for key, value in variables.items()), flush=True)
        status = subprocess.call(
            [sys.executable, "-m", "pytest", *config.invocation_params.args], cwd=config.invocation_params.dir,
            env=os.environ | variables | {ALLOCATOR: name} | {key: str(record) for key, record in found.items()})
        if status not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            worst = worst or status
        if status == pytest.ExitCode.INTERRUPTED:
            break
    for record in found.values():
        if record.exists():
            print(f"\nrecord: {os.path.relpath(record)}; python -m benchmarks.report --run FILE shows it")
    return worst


def pytest_collection_modifyitems(config, items):
    """Keeps the cases that are run under this child's malloc."""
    allocator = os.environ.get(ALLOCATOR)  # unset where items are only listed
    chosen = [item for item in items if allocator is None or allocator in allocators_of(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def allocators_of(item) -> tuple[str, ...]:
    """Returns the settings of malloc under which an item is run."""
    if not GLIBC:
        return ("default",)
    return item.callspec.params["case"].allocators if item.originalname == "test_penalty" else ("retained",)


@pytest.fixture(scope="session")
def quick(request) -> bool:
    """Whether sizes and rounds are small."""
    return request.config.option.quick


@pytest.fixture
def in_time():
    """Skips a benchmark on a GPU when the time of `make gpu` is up, and frees the GPU's memory after each."""
    if time.time() > float(os.environ.get(DEADLINE, "inf")):
        pytest.skip("the run's time is up; PART=bench alone has more")
    yield
    torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def threads(request):
    """Gives all contestants the same number of threads, before anything is compiled: compiled code keeps the number."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(request.config.option.threads or cores)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def save(threads, quick):
    """Returns save(list name, entry), which adds an entry to the run's JSON file."""
    header = {"environment": environment(), "threads": threads, "quick": quick,
              "started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "retained": RETAINED}
    allocator = os.environ.get(ALLOCATOR, "default")

    def add(list_name: str, entry: dict) -> None:
        if RECORD in os.environ:
            records.append(pathlib.Path(os.environ[RECORD]), header, list_name, {"allocator": allocator} | entry)

    return add


@pytest.fixture(scope="session")
def save_gpu(quick):
    """Returns the same as `save`, for the GPU's file."""
    header = records.gpu_header(quick)

    def add(list_name: str, entry: dict) -> None:
        if GPU_RECORD in os.environ:
            records.append(pathlib.Path(os.environ[GPU_RECORD]), header, list_name, entry)

    return add
