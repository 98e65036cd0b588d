"""Selective expert guidance for GRPO in TRL: an expert steps in only where it helps (MENTOR, arXiv:2510.04140)."""

import importlib
import typing

if typing.TYPE_CHECKING:
    from trl_selective.config import SelectiveGuidanceGRPOConfig
    from trl_selective.evaluation import PassAtKCallback
    from trl_selective.trainer import SelectiveGuidanceGRPOTrainer

__version__ = "0.1.0.dev0"

_MODULES = {
    "PassAtKCallback": "evaluation",
    "SelectiveGuidanceGRPOConfig": "config",
    "SelectiveGuidanceGRPOTrainer": "trainer",
}

__all__ = ["PassAtKCallback", "SelectiveGuidanceGRPOConfig", "SelectiveGuidanceGRPOTrainer"]


def __getattr__(name: str) -> typing.Any:
    """Import what is asked for when it is asked for, as TRL does: importing the package alone takes no time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
