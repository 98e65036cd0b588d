r"""Was the answer right, and in the right form? The rewards of MENTOR (arXiv:2510.04140, section 4) for mathematics, as TRL calls rewards.

The paper adds them up as 0.9 accuracy + 0.1 format for Qwen, 0.8 + 0.2 for Llama: set `reward_weights` of the config.
"""

import re
import threading
from collections.abc import Sequence
from functools import partial

Completion = str | Sequence[dict]

BOXED = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped one, as in `\{1, 2\}`, opens and closes nothing
FULL_STOP = re.compile(r"\s*[.,]\s*}$")  # `\boxed{5.}`
CHOICE = re.compile(r"\\boxed\{[\s$(]*(?:\\(?:text|textbf|mathrm|mathbf)\{)*[\s(]*(?P<letter>[A-Za-z])(?![A-Za-z0-9])")
ONE_THOUGHT = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?P<answer>(?:(?!</?think>).)*)", re.DOTALL)


def boxed_accuracy_reward(
    completions: list[Completion], solution: list[str | float | None], **kwargs
) -> list[float | None]:
    r"""1 if the last `\boxed{}` of a completion equals the solution as a mathematical expression (Math-Verify), else 0.

    Args:
        completions: texts, or conversations whose last message is the answer.
        solution: the right answer to each, as LaTeX, plain expression or number, with or without `\boxed{}` around it.

    Returns:
        One reward per completion; None where the solution is missing or cannot be parsed, so that TRL leaves the row out.

    Example:
        >>> boxed_accuracy_reward([r"So it is \boxed{0.5}.", "It is 0.5."], solution=[r"\frac{1}{2}", r"\frac{1}{2}"])
        [1.0, 0.0]
    """
    from math_verify import LatexExtractionConfig, parse, verify

    # Math-Verify's timeouts are signals, which only the main thread receives.
    in_main_thread = threading.current_thread() is threading.main_thread()
    read = partial(
        parse,
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0)],
        parsing_timeout=5 if in_main_thread else None,
    )
    rewards: list[float | None] = []
    for completion, right in zip(completions, solution, strict=True):
        gold = [] if right is None else read(last_boxed(str(right)) or f"\\boxed{{{right}}}")
        answer = last_boxed(answer_text(completion))
        if not gold:
            rewards.append(None)
        elif answer is None:
            rewards.append(0.0)
        else:
            answer = FULL_STOP.sub("}", answer)
            rewards.append(float(verify(gold, read(answer), timeout_seconds=5 if in_main_thread else None)))
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


def last_boxed(text: str) -> str | None:
    r"""The last `\boxed{...}` of a text, up to the brace that closes it; None if there is none or it stays open."""
    boxes = [box.end() - 1 for box in BOXED.finditer(text)]
    depth = 0
    for brace in BRACE.finditer(text, boxes[-1]) if boxes else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rf"\boxed{text[boxes[-1] : brace.end()]}"
    return None
