"""The map of the package as a rule: imports point down only, TRL is touched in one place, importing is light."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import trl_selective

ROOT = Path(trl_selective.__file__).parents[1]
MODULES = sorted((ROOT / "trl_selective").rglob("*.py"))

# From the ground up: a module imports from its own part and from those before it.
PARTS = [
    "functional",
    "boxed_answers",
    "reward_calls",
    "reward_scale",
    "loss_inputs",
    "rollout",
    "grading",
    "grading_pool",
    "resuming",
    "intervals",
    "sampling",
    "memory",
    "experts",
    "engines",
    "selection",
    "injection",
    "guided_batch",
    "threshold",
    "state",
    "checkpoints",
    "trl_versions",
    "presets",
    "combinations",
    "config",
    "checks",
    "sharding",
    "assembly",
    "rewards",
    "evaluation",
    "reporting",
    "trainer",
    "__init__",
]


def part_of(module: str) -> str:
    """`trl_selective.sampling.kv` is in `sampling`; the names of the package itself are in `__init__`."""
    return [*module.split("."), "__init__"][1]


def imported_modules(path: Path) -> list[str]:
    """Every module that a file imports, wherever the statement stands. `from trl_selective import config` counts as `trl_selective.config`."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path.name}:{node.lineno} is a relative import: write it absolutely, so that this test can read it"
            )
            is_package = node.module == "trl_selective"
            modules += [f"{node.module}.{alias.name}" for alias in node.names] if is_package else [node.module]
    return modules


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path):
    part = path.relative_to(ROOT / "trl_selective").parts[0].removesuffix(".py")
    assert part in PARTS, (
        f"{relative(path)} is new: give it a place in PARTS, above all that it imports and below all that imports it"
    )
    inner = [module for module in imported_modules(path) if module.split(".")[0] == "trl_selective"]
    upward = [module for module in inner if part_of(module) not in PARTS[: PARTS.index(part) + 1]]
    assert not upward, f"{relative(path)} imports {upward}, which stand above it: move what it needs down"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name == "functional"], ids=relative)
def test_functional_is_torch_alone(path):
    libraries = {module.split(".")[0] for module in imported_modules(path)}
    assert libraries - sys.stdlib_module_names <= {"torch", "jaxtyping", "trl_selective"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_only_the_trainer_reaches_into_trl(path):
    modules = {module for module in imported_modules(path) if module.split(".")[0] == "trl"}
    allowed = {"trl_selective/trainer.py": modules, "trl_selective/config.py": {"trl"}}.get(relative(path), set())
    assert modules <= allowed, (
        f"{relative(path)} imports {sorted(modules - allowed)}: TRL's insides belong in trainer.py, where they are pinned"
    )


def test_importing_is_light():
    """What TRL loads for itself does not count: it imports vLLM where it is installed."""
    script = (
        "import sys, trl\n"
        "trl.GRPOConfig, trl.GRPOTrainer\n"
        "before = set(sys.modules)\n"
        "import trl_selective\n"
        "trl_selective.SelectiveGuidanceGRPOConfig, trl_selective.SelectiveGuidanceGRPOTrainer\n"
        "print(*({'matplotlib', 'vllm', 'math_verify', 'openai'} & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == [], "import these inside the functions that need them"


def test_importing_the_package_alone_loads_nothing():
    script = "import sys, trl_selective; print(*({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == []


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'trl_selective' has no attribute 'SelectiveGuidanceTrainer'"):
        trl_selective.SelectiveGuidanceTrainer  # noqa: B018


def packages() -> list[str]:
    folders = [path.parent for path in MODULES if path.name == "__init__.py"]
    return [".".join(folder.relative_to(ROOT).parts) for folder in folders]


@pytest.mark.parametrize("name", packages())
def test_all_names_what_is_exported(name):
    package = importlib.import_module(name)
    exported = {
        key for key in dir(package) if not key.startswith("_") and not isinstance(getattr(package, key), ModuleType)
    }
    assert set(getattr(package, "__all__", [])) == exported


def test_no_file_over_one_megabyte(project_files):
    large = {relative(path): path.stat().st_size for path in project_files if path.stat().st_size > 1_000_000}
    assert not large, f"{large} bytes: ship the script that makes them, or add them to .gitignore"
