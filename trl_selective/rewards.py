r"""Was the answer right, and in the right form? The rewards of MENTOR (arXiv:2510.04140, section 4) for mathematics, as TRL calls rewards.

The paper adds them up as 0.9 accuracy + 0.1 format for Qwen, 0.8 + 0.2 for Llama: set `reward_weights` of the config.
"""

import re
import threading
from collections.abc import Sequence

from trl_selective.boxed_answers import is_equal, last_boxed

Completion = str | Sequence[dict]

# A letter alone, or before a bracket, a full stop, a colon, or words in a `\\text` of their own.
CHOICE = re.compile(
    r"\\boxed\{(?:[\s$(\[{*]|\\[,;:! {]|\\(?:text\w*|math\w+|boldsymbol|fbox|bf)\b|(?:option|answer|choice)\b\s*:?)*"
    r"(?P<letter>[A-Z])(?=\s*(?:[)\].:}*$]|\\(?:text|quad|[\])} ,;])))",
    re.IGNORECASE,
)
ONE_THOUGHT = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?P<answer>(?:(?!</?think>).)*)", re.DOTALL)


def boxed_accuracy_reward(
    completions: list[Completion], solution: list[str | float | None], **kwargs
) -> list[float | None]:
    r"""1 if the last `\boxed{}` of a completion equals the solution as a mathematical expression (Math-Verify; see `boxed_answers`), else 0.

    Args:
        completions: texts, or conversations whose last message is the answer.
        solution: the right answer to each, as LaTeX, plain expression or number, with or without `\boxed{}` around it.

    Returns:
        One reward per completion; None where the solution is missing or cannot be parsed, so that TRL leaves the row out.

    Example:
        >>> boxed_accuracy_reward([r"So it is \boxed{0.5}.", "It is 0.5."], solution=[r"\frac{1}{2}", r"\frac{1}{2}"])
        [1.0, 0.0]
    """
    # Math-Verify's timeouts are signals, which only the main thread receives.
    timeout = 5 if threading.current_thread() is threading.main_thread() else None
    rewards: list[float | None] = []
    for completion, right in zip(completions, solution, strict=True):
        is_right = None
        if right is not None:
            box = last_boxed(str(right)) or f"\\boxed{{{right}}}"
            is_right = is_equal(box, last_boxed(answer_text(completion)), timeout)
        rewards.append(None if is_right is None else float(is_right))
    return rewards


def boxed_choice_reward(completions: list[Completion], solution: list[str | None], **kwargs) -> list[float | None]:
    r"""1 if the last `\boxed{}` of a completion names the right option of a multiple-choice question, else 0.

    Args:
        completions: texts, or conversations whose last message is the answer.
        solution: the letter of each.

    Returns:
        One reward per completion; None where the solution is missing.

    Example:
        >>> boxed_choice_reward([r"\boxed{B}", r"\boxed{\text{(B) } 4}", r"\boxed{Because}"], solution=["B", "B", "B"])
        [1.0, 1.0, 0.0]
    """
    boxes = [last_boxed(answer_text(completion)) for completion in completions]
    letters = [CHOICE.match(box) if box else None for box in boxes]
    return [
        None if right is None else float(letter is not None and letter["letter"].upper() == right.strip().upper())
        for letter, right in zip(letters, solution, strict=True)
    ]


def think_boxed_format_reward(completions: list[Completion], **kwargs) -> list[float]:
    r"""1 for `<think>...</think>` followed by an answer in `\boxed{}`, with nothing before and no second thought, else 0.

    Example:
        >>> think_boxed_format_reward([r"<think>1 + 1</think> \boxed{2}", r"\boxed{2}"])
        [1.0, 0.0]
    """
    thoughts = [ONE_THOUGHT.fullmatch(_with_thought(completion)) for completion in completions]
    return [float(thought is not None and last_boxed(thought["answer"]) is not None) for thought in thoughts]


def _with_thought(completion: Completion) -> str:
    """The text of a completion as it was written: a tokenizer with a response template takes the thought out of it."""
    thought = None if isinstance(completion, str) or not completion else completion[-1].get("reasoning_content")
    text = answer_text(completion)
    return text if thought is None else f"<think>{thought}</think>{text}"


def answer_text(completion: Completion) -> str:
    """The text of a completion: itself, or the content of its last message (empty if there is none)."""
    if isinstance(completion, str):
        return completion
    return (completion[-1]["content"] if completion else None) or ""
