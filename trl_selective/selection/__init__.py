"""Who gets an expert completion, and which one (arXiv:2504.14945 gives one to every group; selective means to decide each time)."""

from trl_selective.selection.candidates import Candidates
from trl_selective.selection.learned import GainModel, Learned, features
from trl_selective.selection.memory import Effect, InjectionMemory
from trl_selective.selection.names import SELECTORS, make_selector, make_trigger
from trl_selective.selection.selectors import (
    Diverse,
    First,
    Learnable,
    Novel,
    Pick,
    Random,
    RewardGain,
    Selector,
    Shortest,
    choose,
)
from trl_selective.selection.triggers import (
    Always,
    Below,
    GroupFailed,
    GroupOutcomes,
    Trigger,
    WithProbability,
    ZeroVariance,
)

__all__ = [
    "SELECTORS",
    "Always",
    "Below",
    "Candidates",
    "Diverse",
    "Effect",
    "First",
    "GainModel",
    "GroupFailed",
    "GroupOutcomes",
    "InjectionMemory",
    "Learnable",
    "Learned",
    "Novel",
    "Pick",
    "Random",
    "RewardGain",
    "Selector",
    "Shortest",
    "Trigger",
    "WithProbability",
    "ZeroVariance",
    "choose",
    "features",
    "make_selector",
    "make_trigger",
]
