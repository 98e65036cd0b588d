"""Each selector finds the completion that is known to be best, and combinations mean what they say."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import permutations

import pytest
import torch

from tests.selection.groups import candidates
from trl_selective.selection import (
    Diverse,
    First,
    Learnable,
    Novel,
    Random,
    RewardGain,
    Selector,
    Shortest,
    choose,
)

NAN, NO = float("nan"), -math.inf
GROUP = ([1, 2, 3, 4], [1, 2, 3, 5])  # its own rollouts

# For each selector the texts, with the best one first, and what else it has to know.
BEST_FIRST = {
    First(): ([[1], [2], [3]], {}),
    Random(): ([[1], [2], [3]], {"noise": [0.9, 0.8, 0.1]}),
    Shortest(): ([[1, 2], [1, 2, 3], [1, 2, 3, 4]], {}),
    Learnable(): ([[1], [2], [3]], {"logps": [-0.5, -0.6, -9.0]}),
    # trigrams shared with a rollout: none of 2; 123 of {123, 234, 237}: 1/3 (or of {123, 235, 237}); both of a rollout's two
    Novel(): ([[7, 8, 9, 6], [1, 2, 3, 7], [1, 2, 3, 4]], {}),
    # new bigrams in the group: 78 and 89; 38 and 89 beside 23; none, since 12, 23 and 34 are there
    Diverse(): ([[7, 8, 9], [2, 3, 8], [2, 3, 4]], {}),
    RewardGain(): ([[1], [2], [3]], {"gains": [0.9, 0.2, 0.1]}),
}


@pytest.mark.parametrize("selector", BEST_FIRST, ids=lambda selector: selector.name)
def test_the_best_is_found_wherever_it_stands(selector):
    texts, fields = BEST_FIRST[selector]
    for order in [(0, 1, 2)] if isinstance(selector, First) else permutations(range(3)):
        shuffled = {name: [values[index] for index in order] for name, values in fields.items()}
        group = candidates(*(texts[index] for index in order), rollouts=GROUP, **shuffled)
        picks = choose(selector, group, 3)
        assert [order[pick.index] for pick in picks] == [0, 1, 2]
        assert {pick.selector for pick in picks} == {selector.name}


@pytest.mark.parametrize("selector", [*BEST_FIRST, First() & Shortest(), Novel() | First()], ids=lambda s: s.name)
@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_as_many_as_asked_for_and_each_once(selector, number):
    group = candidates([1, 2], [3, 4], [5, 6], noise=[0.3, 0.1, 0.2], logps=[-1.0, -2.0, -3.0], gains=[0.3, 0.2, 0.1])
    picks = choose(selector, group, number)
    assert len({pick.index for pick in picks}) == len(picks) == min(number, 3)
    assert group.chosen == [pick.index for pick in picks]


def test_of_equals_the_first():
    for selector in (Shortest(), Novel(), Diverse()):
        assert [pick.index for pick in choose(selector, candidates([5, 6, 7], [8, 9, 10]), 2)] == [0, 1]


def test_random_is_uniform():
    counts = Counter(
        choose(Random(), candidates([1], [2], [3], noise=torch.rand(3).tolist()), 1)[0].index for _ in range(3000)
    )
    assert sorted(counts) == [0, 1, 2]
    assert all(
        abs(count - 1000) < 110 for count in counts.values()
    )  # 4 standard deviations of sqrt(3000 * 1/3 * 2/3) = 26


def test_scores_in_numbers():
    group = candidates([7, 8, 9, 6], [1, 2, 3, 7], [1, 2, 3, 4], [1, 2], rollouts=GROUP)
    # {123, 234} and {123, 237} share 1 of 3; a text without trigrams shares none of a rollout's
    assert Novel().scores(group) == pytest.approx([1.0, 2 / 3, 0.0, 1.0])
    # of {123, 237} one is new; a text without trigrams has nothing new
    assert group.share_of_new(3) == pytest.approx([1.0, 1 / 2, 0.0, 0.0])
    assert Shortest().scores(group) == [-4.0, -4.0, -4.0, -2.0]
    # the group has 6 bigrams, 4 of them distinct: (4 + 3) / 9, (4 + 1) / 9, 4 / 9, 4 / 7
    assert Diverse().scores(group) == pytest.approx([7 / 9, 5 / 9, 4 / 9, 4 / 7])


def test_the_length_of_the_n_grams():
    group = candidates([4, 3, 2, 1], [1, 2, 9, 9], rollouts=[[1, 2, 3, 4]])
    assert Novel(n=1).scores(group) == pytest.approx([0.0, 1 - 2 / 5])
    assert Novel(n=2).scores(group) == pytest.approx([1.0, 1 - 1 / 5])
    assert group.share_of_new(1) == pytest.approx([0.0, 1 / 3])  # of {1, 2, 9} the last
    assert group.share_of_new(2) == pytest.approx([1.0, 2 / 3])  # of {12, 29, 99} the last two
    assert Diverse(n=1).scores(group) == pytest.approx([4 / 8, 5 / 8])


def test_short_texts_are_no_error():
    group = candidates([1], [2], rollouts=[[1], [3]])
    assert Novel().scores(group) == [0.0, 0.0]  # no trigrams: nothing new about them
    assert Diverse().scores(group) == [0.0, 0.0]
    assert Novel(n=1).scores(group) == [0.0, 1.0]


def test_novelty_counts_what_was_injected_into_the_prompt_before():
    texts = [1, 2, 3, 4], [7, 8, 9, 6]
    assert [pick.index for pick in choose(Novel(), candidates(*texts, rollouts=[[1, 2, 3]]), 1)] == [1]
    before = candidates(*texts, rollouts=[[1, 2, 3]], times_injected=[0, 2])
    assert Novel().scores(before) == pytest.approx([1 - 1 / 2, 0.0])
    assert [pick.index for pick in choose(Novel(), before, 1)] == [0]


@pytest.mark.parametrize("selector", [Novel(), Diverse()], ids=lambda selector: selector.name)
def test_the_second_one_differs_from_the_first(selector):
    group = candidates([7, 8, 9, 6], [7, 8, 9, 6], [7, 8, 9, 6, 7, 8, 9], [1, 2, 3, 7, 5, 6], rollouts=GROUP)
    first, second = choose(selector, group, 2)
    assert (first.index, second.index) == (0, 3)


def test_what_is_no_better_than_the_group_is_refused():
    group = candidates([1], [2], [3], [4], gains=[0.0, -0.2, NAN, 0.1])
    assert RewardGain().scores(group) == [NO, NO, NO, 0.1]
    assert [(pick.index, pick.score) for pick in choose(RewardGain(), group, 4)] == [(3, 0.1)]
    assert choose(RewardGain(), candidates([1], gains=[0.0]), 1) == []


# ---- Combinations ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed(Selector):
    """These scores."""

    values: tuple[float, ...]
    label: str = "fixed"

    @property
    def name(self) -> str:
        return self.label

    def scores(self, candidates):
        return list(self.values)


def three():
    return candidates([1], [2], [3])


def test_both_add_up_ranks_and_not_scores():
    # ranks 1, 1/2, 0 and 0, 1, 1/2, however far apart the scores are
    both = Fixed((1e6, 2.0, 1.0)) & Fixed((0.01, 0.03, 0.02))
    assert both.scores(three()) == [1.0, 1.5, 0.5]
    # of equals each beats half: ranks 3/4, 3/4, 0
    assert (Fixed((5.0, 5.0, 1.0)) & Fixed((1.0, 2.0, 3.0))).scores(three()) == [0.75, 1.25, 1.0]
    assert (Fixed((5.0, 5.0, 5.0)) & Fixed((1.0, 2.0, 3.0))).scores(three()) == [0.5, 1.0, 1.5]
    assert (Fixed((7.0,)) & Fixed((7.0,))).scores(candidates([1])) == [0.0]


def test_what_either_refuses_both_refuse():
    both = Fixed((NO, 2.0, 1.0)) & Fixed((9.0, NO, 1.0))
    assert both.scores(three()) == [NO, NO, 1.0]  # rank 1/2 among 1, 2 and one refused; rank 1/2 likewise
    assert [pick.index for pick in choose(both, three(), 3)] == [2]
    assert choose(Fixed((NO, NO, 1.0)) & Fixed((1.0, 1.0, NO)), three(), 3) == []


def test_both_is_symmetric_and_may_be_nested():
    a, b, c = Fixed((1.0, 2.0, 3.0)), Fixed((3.0, 1.0, 2.0)), Fixed((NO, 5.0, 4.0))
    assert (a & b).scores(three()) == (b & a).scores(three())
    assert (a & b & c).name == "fixed & fixed & fixed"
    assert (a & b & c).scores(three())[0] == NO


def test_a_fallback_is_the_second_where_the_first_refuses_all():
    left, right = Fixed((NO, 1.0, NO), "left"), Fixed((3.0, 2.0, 1.0), "right")
    picks = choose(left | right, three(), 3)
    # the left one has its say until nothing that it takes is left over
    assert [(pick.index, pick.score, pick.selector) for pick in picks] == [
        (1, 1.0, "left"),
        (0, 3.0, "right"),
        (2, 1.0, "right"),
    ]
    refuses = Fixed((NO,) * 3, "refuses")
    assert [pick.selector for pick in choose(refuses | right, three(), 2)] == ["right", "right"]
    assert choose(refuses | refuses, three(), 2) == []
    assert [pick.selector for pick in choose(refuses | (refuses | right), three(), 1)] == ["right"]
    assert [pick.selector for pick in choose((refuses | refuses) | right, three(), 1)] == ["right"]


def test_a_fallback_inside_of_both():
    """Ranks are those of the one that has its say."""
    both = (Fixed((NO,) * 3, "refuses") | Fixed((1.0, 2.0, 3.0), "takes")) & Fixed((3.0, 1.0, 2.0))
    assert both.scores(three()) == [1.0, 0.5, 1.5]


def test_a_fallback_says_who_decides():
    selector = RewardGain() | Shortest()
    better, worse = candidates([1, 1], [2], gains=[0.5, 0.1]), candidates([1, 1], [2], gains=[-0.5, -0.1])
    assert choose(selector, better, 1)[0].selector == "reward_gain"
    assert (choose(selector, worse, 1)[0].selector, worse.chosen) == ("shortest", [1])


@pytest.mark.parametrize("scores", [(1.0,), (1.0, NAN, 2.0), ()])
def test_scores_that_are_none_are_named(scores):
    with pytest.raises(
        ValueError, match=r"The selector 'fixed' returned .* for 3 completions, expected a score for each"
    ):
        choose(Fixed(scores), three(), 1)


def test_a_selector_of_ones_own_has_the_name_of_its_class():
    class Longest(Selector):
        def scores(self, candidates):
            return [float(len(completion.token_ids)) for completion in candidates.completions]

    (pick,) = choose(Longest(), candidates([1], [1, 2], [3]), 1)
    assert (pick.index, pick.selector) == (1, "Longest")
    assert (Longest() & First()).name == "Longest & first"
    with pytest.raises(TypeError, match="abstract"):
        Selector()
