"""Prints, one per line, the requirements of pyproject.toml that this Python does not meet, but for torch.

Usage: python scripts/missing_requirements.py extra ...   (the project's own dependencies are always read)
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
except ModuleNotFoundError:
    from pip._vendor.packaging.requirements import Requirement


def met(requirement: Requirement) -> bool:
    if requirement.marker and not requirement.marker.evaluate():
        return True
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:  # torch's own builds of Triton go by other names
        return requirement.name == "triton" and find_spec("triton") is not None


def main(extras: list[str]) -> None:
    config = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    project = config["project"]
    lines = [*config["build-system"]["requires"], *project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    for line in dict.fromkeys(lines):
        requirement = Requirement(line)
        if requirement.name != "torch" and not met(requirement):
            print(requirement)


main(sys.argv[1:])
