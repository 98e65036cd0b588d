"""Selective expert guidance for GRPO in TRL: an expert steps in only where it helps (MENTOR, arXiv:2510.04140)."""

import importlib
import typing

if typing.TYPE_CHECKING:
    from trl_selective.config import SelectiveGuidanceGRPOConfig
    from trl_selective.trainer import SelectiveGuidanceGRPOTrainer

__version__ = "0.1.0.dev0"

__all__ = ["SelectiveGuidanceGRPOConfig", "SelectiveGuidanceGRPOTrainer"]


def __getattr__(name: str) -> typing.Any:
    """Import what is asked for when it is asked for, as TRL does: importing the package alone takes no time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "config" if name.endswith("Config") else "trainer"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
