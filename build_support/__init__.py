"""Compiles the C++ kernels of csrc/ and names the wheel. Only setup.py and the scripts use it; it is never installed.

The modules, in the order in which they build on each other:
    messages    what a build prints, and how it ends with an error
    toolchain   looks for a compiler, torch and pybind11, and says what is missing
    products    lists the shared libraries, their sources and their compiler flags
    compiling   compiles and links the products incrementally, with ninja or without it
    commands    setuptools commands that build the products, and the choice of the wheel's tag
    backend     the functions that pip calls

It uses the standard library, setuptools and filelock. It never imports torch, which would take 2 s: torch's headers and
libraries are found in torch's folder.
"""
