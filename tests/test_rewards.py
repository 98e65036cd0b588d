"""The paper's rewards, by example."""

import threading

import pytest

from trl_selective.rewards import boxed_accuracy_reward, boxed_choice_reward, think_boxed_format_reward


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        (r"So \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
        (r"So \boxed{0.5}", r"$\frac{1}{2}$", 1.0),
        (r"So \boxed{x^2 + 2x + 1}", r"\boxed{(x+1)^2}", 1.0),
        (r"\boxed{3}", "4", 0.0),
        (r"First \boxed{3}, no: \boxed{4}", "4", 1.0),  # the last box counts
        (r"First \boxed{4}, no: \boxed{3}", "4", 0.0),
        ("The answer is 4.", "4", 0.0),  # no box
        (r"\boxed{4", "4", 0.0),  # a box that stays open: cut off
        ("", "4", 0.0),
        (r"\boxed{}", "4", 0.0),
        (r"\boxed{4}", "", None),  # nothing to compare with
        (r"\boxed{4}", None, None),
        (r"\boxed{4}", 4, 1.0),  # a column of numbers
        (r"\boxed{4.5}", 4.5, 1.0),
        (r"\boxed{4.}", "4", 1.0),  # a full stop inside the box
        (r"\boxed{(1, 2),}", "(1, 2)", 1.0),
    ],
)
def test_accuracy(completion, solution, reward):
    assert boxed_accuracy_reward([completion], solution=[solution]) == [reward]


def test_conversations_are_graded_by_their_last_message():
    chat = [{"role": "assistant", "content": r"<think>2+2</think>\boxed{4}"}]
    assert boxed_accuracy_reward([chat], solution=["4"], prompts=["2+2?"]) == [1.0]
    assert think_boxed_format_reward([chat]) == [1.0]
    for silent in ([], [{"role": "assistant", "content": None}]):
        assert boxed_accuracy_reward([silent], solution=["4"]) == [0.0]
        assert think_boxed_format_reward([silent]) == [0.0]


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        (r"\boxed{B}", "B", 1.0),
        (r"\boxed{b}", "B", 1.0),
        (r"\boxed{\textbf{(B)}}", "B", 1.0),
        (r"\boxed{\text{B. } 4}", "B", 1.0),
        (r"\boxed{ (B) }", " B ", 1.0),
        (r"\boxed{A}, no: \boxed{B}", "B", 1.0),
        (r"\boxed{A}", "B", 0.0),
        (r"\boxed{B) mitosis}", "B", 1.0),
        (r"\boxed{B \text{ mitosis}}", "B", 1.0),
        (r"\boxed{\text{Option B}}", "B", 1.0),
        (r"\boxed{Answer: B}", "B", 1.0),
        (r"\boxed{[B]}", "B", 1.0),
        (r"\boxed{\{B\}}", "B", 1.0),
        (r"\boxed{\textit{B}}", "B", 1.0),
        (r"\boxed{\boldsymbol{B}}", "B", 1.0),
        (r"\boxed{{\bf B}}", "B", 1.0),
        (r"\boxed{**B**}", "B", 1.0),
        (r"\boxed{Both}", "B", 0.0),  # a word, not a letter
        (r"\boxed{\text{A plant}}", "A", 0.0),
        (r"\boxed{I think B}", "I", 0.0),
        (r"\boxed{A, B}", "A", 0.0),
        (r"\boxed{A or B}", "A", 0.0),
        (r"\boxed{C-H bond}", "C", 0.0),
        (r"\boxed{C^2}", "C", 0.0),
        (r"\boxed{E = mc^2}", "E", 0.0),
        (r"\boxed{\frac{1}{2}}", "F", 0.0),
        ("The answer is B.", "B", 0.0),  # no box
        (r"\boxed{B", "B", 0.0),
        (r"\boxed{B}", None, None),
    ],
)
def test_choices(completion, solution, reward):
    assert boxed_choice_reward([completion], solution=[solution]) == [reward]


def test_accuracy_outside_the_main_thread():
    """Where signals, and with them Math-Verify's timeouts, do not exist."""
    rewards = []
    thread = threading.Thread(target=lambda: rewards.extend(boxed_accuracy_reward([r"\boxed{2}"], solution=["2"])))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def test_a_missing_solution_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        boxed_accuracy_reward(["a", "b"], solution=["1"])


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>why</think> so \\boxed{1}", 1.0),
        ("\n<think>line\nline</think>\n\\boxed{1}\n", 1.0),
        ("<think></think>\\boxed{1}", 1.0),
        ("\\boxed{1}", 0.0),
        ("<think>why \\boxed{1}", 0.0),
        ("<think>\\boxed{1}</think>", 0.0),  # the answer must follow the thoughts
        ("Hm. <think>why</think> \\boxed{1}", 0.0),
        ("<think>a</think><think>b</think>\\boxed{1}", 0.0),
        ("<think>a<think>b</think>\\boxed{1}", 0.0),
        ("<think>a</think> 1", 0.0),
        ("<think>a</think> \\boxed{1", 0.0),
        (
            [{"role": "assistant", "reasoning_content": "why", "content": "so \\boxed{1}"}],
            1.0,
        ),  # as response templates have it
        ([{"role": "assistant", "reasoning_content": "why", "content": ""}], 0.0),
        ([{"role": "assistant", "content": "\\boxed{1}"}], 0.0),
        ([], 0.0),
    ],
)
def test_format(completion, reward):
    assert think_boxed_format_reward([completion]) == [reward]
