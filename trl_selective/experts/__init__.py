"""Where guidance comes from."""

from trl_selective.experts.completions import CompletionReader, ExpertCompletion
from trl_selective.experts.local import check_expert, load_expert, load_expert_tokenizer
from trl_selective.experts.scoring import completion_logps

__all__ = [
    "CompletionReader",
    "ExpertCompletion",
    "check_expert",
    "completion_logps",
    "load_expert",
    "load_expert_tokenizer",
]
