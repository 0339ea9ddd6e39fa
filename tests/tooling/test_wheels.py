"""The checks of scripts/wheels.py refuse bad wheels. `make wheels` runs them on real ones."""
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import wheels

NEEDED = ("moduli_kernels/py.typed", "moduli_kernels/rnn/crossovers.json", "moduli_kernels/triton/penalty/dense.py")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") and shutil.which("nm") and sys.platform == "linux"), reason="needs c++ and nm on Linux")


def wheel(folder, *names, library=None):
    path = folder / "moduli_kernels-0.1.0-test.whl"
    with zipfile.ZipFile(path, "w") as opened:
        for name in names:
            opened.writestr(name, "")
        if library is not None:
            opened.write(library, "moduli_kernels/_cpu_ops.so")
    return path


def test_a_wheel_holds_its_library_and_only_the_package(tmp_path):
    assert wheels.contents(wheel(tmp_path, *NEEDED), None) == []
    assert wheels.contents(wheel(tmp_path, *NEEDED, "moduli_kernels/_cpu_ops.so"), "_cpu_ops") == [
        "moduli_kernels/_cpu_ops.so"]
    for names, kind in (
        (NEEDED, "_cpu_ops"), ((*NEEDED, "moduli_kernels/_cpu_ops.so"), None), (NEEDED[1:], None),
        ((*NEEDED, "tests/test_a.py"), None), ((*NEEDED, "moduli_kernels/_cpu_ops.so", "lib/libc10.so"), "_cpu_ops"),
    ):
        with pytest.raises(SystemExit, match="must hold"):
            wheels.contents(wheel(tmp_path, *names), kind)


def test_the_stable_shims_are_found_in_torchs_headers():
    shims = wheels.shim_symbols()
    assert "aoti_torch_get_data_ptr" in shims
    assert len(shims) > 100 and not any(name.startswith("_Z") for name in shims)


@needs_compiler
@pytest.mark.parametrize("call, stranger", [
    ('extern "C" int aoti_torch_get_data_ptr(void*, void**); int f() { return aoti_torch_get_data_ptr(0, 0); }', None),
    ('extern "C" int torch_no_shim(); int f() { return torch_no_shim(); }', "torch_no_shim"),
    ("namespace c10 { int unstable(); } int f() { return c10::unstable(); }", "_ZN3c108unstableEv"),
], ids=["shim", "not a shim", "C++"])
def test_a_library_may_call_only_stable_shims(tmp_path, call, stranger):
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text(call)
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    made = wheel(tmp_path, *NEEDED, library=library)
    if stranger is None:
        assert wheels.symbols(made, "moduli_kernels/_cpu_ops.so") == 1
    else:
        with pytest.raises(SystemExit, match=f"stable shims alone, got {stranger}"):
            wheels.symbols(made, "moduli_kernels/_cpu_ops.so")


def test_a_failing_command_is_reported_with_its_words():
    with pytest.raises(SystemExit, match="ended with 3:\nno such thing"):
        wheels.run(sys.executable, "-c", "print('no such thing'); raise SystemExit(3)")


@pytest.mark.parametrize(("change", "refused"), [
    ({}, None), ({"architecture": 100}, "sm_90 must have"), ({"STACK": 8}, "sm_90 must have"),
    ({"LOCAL": 8}, "sm_90 must have"),
])
def test_machine_code_of_every_architecture_without_stack(monkeypatch, change, refused):
    kernels = [{"case": case, "architecture": architecture, "kernel": "k", "REG": 80, "STACK": 0, "LOCAL": 0}
               for case in wheels.COMPILED for architecture in wheels.ARCHITECTURES]
    kernels[wheels.ARCHITECTURES.index(90)] |= change
    lines = map(json.dumps, kernels)
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(wheels, "run", lambda *command, **settings: "\n".join(lines) + "\n")
    if refused:
        with pytest.raises(SystemExit, match=refused):
            wheels.machine_code(Path("python"))
    else:
        lines = wheels.machine_code(Path("python")).splitlines()
        assert [each.split(":")[0] for each in lines] == ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
