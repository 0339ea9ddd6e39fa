"""The functions that pip, build and cibuildwheel call to build this package: those of setuptools.

A build front end does not put the project's folder on Python's path, except for the package that holds the build
backend (`backend-path` in pyproject.toml). The backend is named here so that setup.py can import this package.
"""
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist",
    "get_requires_for_build_wheel", "prepare_metadata_for_build_editable", "prepare_metadata_for_build_wheel",
]
