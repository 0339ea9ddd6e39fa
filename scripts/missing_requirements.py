"""Prints the requirements of pyproject.toml that this Python does not meet, one a line.

    python scripts/missing_requirements.py [EXTRA ...]
"""
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
try:
    from packaging.requirements import Requirement
    from packaging.version import Version
except ModuleNotFoundError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.version import Version


def met(requirement: Requirement) -> bool:
    if requirement.marker and not requirement.marker.evaluate():
        return True
    try:
        # Vendors' builds of torch have versions such as 2.10.0a0+1234, which counts as 2.10.0 here.
        version = Version(metadata.version(requirement.name)).base_version
    except metadata.PackageNotFoundError:
        return requirement.name == "triton" and find_spec("triton") is not None  # torch has builds of other names
    return requirement.specifier.contains(version)


config = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
lines = [*config["build-system"]["requires"], *config["project"]["dependencies"]]
for extra in sys.argv[1:]:
    lines += config["project"]["optional-dependencies"][extra]
for line in dict.fromkeys(lines):
    if not met(Requirement(line)):
        print(line)
