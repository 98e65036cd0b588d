"""Where guidance comes from."""

from trl_selective.experts.local import check_expert, load_expert, load_expert_tokenizer

__all__ = ["check_expert", "load_expert", "load_expert_tokenizer"]
