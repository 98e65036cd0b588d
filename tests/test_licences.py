"""What this package stands on may be used with it: permissive licences, or file-level copyleft that is left as it is (MPL-2.0)."""

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LISTED = re.compile(r"^\| \[([\w-]+)\]\(\S+\) \| ([\w.-]+) \|", re.MULTILINE)
NAMES = {
    "Apache": "Apache-2.0",
    "MIT": "MIT",
    "BSD": "BSD-3-Clause",
    "PSF": "PSF-2.0",
    "Python Software Foundation": "PSF-2.0",
}
PERMISSIVE = re.compile(r"Apache|MIT|BSD|ISC|PSF|Python Software Foundation|MPL|Zlib|HPND|CNRI|BSL-1\.0|CC0|Unlicense")
COPYLEFT = re.compile(r"\b[AL]?GPL|SSPL|Commercial|Proprietary", re.IGNORECASE)
OF_THE_ACCELERATOR = ("nvidia-", "cuda-")  # what PyTorch for GPUs brings along comes under its maker's terms


def direct() -> list[str]:
    """The packages that pyproject.toml asks users to install, with the extras that CPUs can have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(line).name for line in project["dependencies"] + extras["plots"] + extras["server"]]


def licence(name: str) -> str:
    """What a package says of itself: an SPDX expression, the classifiers, or a name."""
    metadata = distribution(name).metadata
    classifiers = [
        line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License ::")
    ]
    return metadata["License-Expression"] or "; ".join(classifiers) or (metadata["License"] or "").split("\n")[0]


def everything() -> list[str]:
    """The direct ones, and what they need here in turn."""
    found, queue = set(), direct()
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found or name.startswith(OF_THE_ACCELERATOR):
            continue
        found.add(name)
        needed = map(Requirement, distribution(name).requires or ())
        queue += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return sorted(found)


@pytest.mark.parametrize("name", everything())
def test_a_licence_goes_with_ours(name):
    text = licence(name)
    assert PERMISSIVE.search(text), f"{name} has the licence {text!r}"
    assert not COPYLEFT.search(text), f"{name} has the licence {text!r}"


def test_the_list_has_every_direct_dependency_with_its_licence():
    listed = dict(LISTED.findall((ROOT / "LICENSES.md").read_text()))
    assert set(listed) == {*direct(), "vllm"}  # which is not installed here
    for name in set(listed) - {"vllm"}:
        assert listed[name] in {value for key, value in NAMES.items() if key in licence(name)}, licence(name)
