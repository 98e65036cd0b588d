"""Groups to choose completions for."""

from collections.abc import Sequence

from trl_selective.experts import ExpertCompletion
from trl_selective.selection import Candidates


def completion(*token_ids: int, source: str | None = None) -> ExpertCompletion:
    return ExpertCompletion(token_ids, source=source)


def candidates(
    *texts: Sequence[int], rollouts: Sequence[Sequence[int]] = ((90, 91, 92, 93),), sources=None, **fields
) -> Candidates:
    """A group of failed `rollouts` that may get `texts`."""
    sources = sources or [None] * len(texts)
    completions = [completion(*text, source=source) for text, source in zip(texts, sources, strict=True)]
    settings = {
        "rewards": [0.0] * len(rollouts),
        "success_rate": 0.0,
        "num_prompt_tokens": 10,
        "noise": [0.5] * len(texts),
        "times_injected": [0] * len(texts),
    }
    return Candidates(completions, rollouts, **{**settings, **fields})
