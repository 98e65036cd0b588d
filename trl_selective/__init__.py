"""Selective expert guidance for GRPO in TRL: an expert steps in only where it helps (MENTOR, arXiv:2510.04140)."""

from trl_selective.config import SelectiveGuidanceGRPOConfig
from trl_selective.trainer import SelectiveGuidanceGRPOTrainer

__version__ = "0.1.0.dev0"

__all__ = ["SelectiveGuidanceGRPOConfig", "SelectiveGuidanceGRPOTrainer"]
