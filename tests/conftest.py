"""What all tests share: no network, no telemetry, one thread, one seed, and every shape annotation of the package checked as it runs."""

import os

os.environ |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # tiny models are fastest so, and processes that a test starts inherit it
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}

from fnmatch import fnmatch
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]

# All but the two modules whose arguments are TRL's to check. An int is accepted where a float is asked for, as type checkers do.
modules = {module.name for module in iter_modules([ROOT / "trl_selective"])} - {"config", "trainer"}
install_import_hook(
    [f"trl_selective.{module}" for module in sorted(modules)],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture(autouse=True)
def seed():
    """No result depends on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def project_files() -> list[Path]:
    """What the repository holds, also where there is no git: all files but those that .gitignore names."""
    ignored = [
        line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    ignored.append(".git")

    def is_ignored(path: Path) -> bool:
        name = path.relative_to(ROOT).as_posix()
        return any(fnmatch(name if "/" in pattern else path.name, pattern) for pattern in ignored)

    files, folders = [], [ROOT]
    while folders:
        for path in folders.pop().iterdir():
            if not is_ignored(path):
                (folders if path.is_dir() else files).append(path)
    return sorted(files)
