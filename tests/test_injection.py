"""Which completions come into which groups of a batch, in whose place, and what is remembered of it."""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.processes import Processes
from tests.training import EXPERT as EXPERT_MODEL
from tests.training import INJECTED, POLICY, expert_dataset, make_trainer
from trl_selective.experts import CompletionReader, ExpertCompletion, completion_logps
from trl_selective.injection import Choice, Injection, Injector, SampledBatch
from trl_selective.selection import (
    Always,
    Below,
    Candidates,
    Effect,
    GroupFailed,
    GroupOutcomes,
    Selector,
    Trigger,
    WithProbability,
    ZeroVariance,
    make_selector,
)

NAN = float("nan")
FAILED, SOLVED = [0.0] * 4, [1.0] * 4
TOKENIZER = AutoTokenizer.from_pretrained(POLICY)  # words between blanks; the cell n is the token n + 2
EXPERT = ["9", "9 8", "9 8 7"]


def ids(text: str) -> list[int]:
    return [*TOKENIZER(text, add_special_tokens=False)["input_ids"], 1]


def make_injector(trigger: Trigger | None = None, selector: str = "first", **changes) -> Injector:
    settings = {
        "per_group": 1,
        "per_batch": None,
        "keep_failed": False,
        "replaces": "worst",
        "reward_weights": torch.ones(1),
        "seed": 0,
        "gather": lambda part: part,
    }
    reader = CompletionReader(
        TOKENIZER,
        eos_token_ids=[1],
        max_completion_length=6,
        completions_column="expert",
        logprobs_column=None,
        sources_column=None,
        overlong="drop",
        needs_logps=False,
        render=lambda messages, add_generation_prompt: "",
    )
    return Injector(reader, trigger or GroupFailed(), make_selector(selector), **{**settings, **changes})


def make_batch(
    rewards: list[list[float]],
    *,
    prompts: list[str] | None = None,
    expert: list | None = None,
    is_guided: list[list[bool]] | None = None,
    step: int = 0,
) -> SampledBatch:
    """One process with a group for each line of `rewards`. A rollout with more than 0.5 is right."""
    prompts = prompts or [f"{group} :" for group in range(len(rewards))]
    expert = expert or [EXPERT] * len(rewards)
    size = len(rewards[0])
    rows = [{"prompt": p, "expert": texts} for p, texts in zip(prompts, expert, strict=True) for _ in range(size)]
    totals = torch.tensor(rewards)
    return SampledBatch(
        rows=rows,
        prompt_ids=[ids(row["prompt"])[:-1] for row in rows],
        completion_ids=[ids("0 1 2 3") for _ in rows],
        rewards=totals,
        is_correct=totals > 0.5,
        is_guided=torch.tensor(is_guided or [[False] * size] * len(rewards)),
        step=step,
        process_index=0,
    )


def first_cell(row: dict, completion: ExpertCompletion) -> float:
    """A completion that begins with the cell 9 is worth 0.9."""
    return (completion.token_ids[0] - 2) / 10


@dataclass
class Scorer:
    """The user's reward function on rows of a batch; keeps what it was asked."""

    batch: SampledBatch
    reward: Callable[[dict, ExpertCompletion], float] = first_cell
    calls: list[tuple[list[tuple[int, tuple[int, ...]]], int]] = field(default_factory=list)

    def __call__(self, pairs, num_rows):
        self.calls.append(([(row, completion.token_ids) for row, completion in pairs], num_rows))
        rewards = [[self.reward(self.batch.rows[row], completion)] for row, completion in pairs]
        return torch.tensor(rewards).reshape(len(pairs), 1)


def token_logps(prompt_ids, completion_ids) -> list[torch.Tensor]:
    """A policy that likes small ids."""
    return [-torch.tensor(completion, dtype=torch.float64) / 10 for completion in completion_ids]


def never(*_):
    raise AssertionError("must not be called")


def inject(injector: Injector, batch: SampledBatch, reward=first_cell, logps=never) -> Injection:
    return injector.choose(batch, Scorer(batch, reward), logps)


def rows_of(injection: Injection) -> list[int | None]:
    return [choice.row for choice in injection.choices]


def texts_of(injection: Injection) -> list[str]:
    return [TOKENIZER.decode(choice.completion.token_ids[:-1]) for choice in injection.choices]


# ---- Whether and how many --------------------------------------------------------------------------------------------------------------


def test_groups_that_need_it_get_one():
    injection = inject(make_injector(), make_batch([FAILED, SOLVED, [0.0, 1.0, 0.0, 0.0], FAILED]))
    assert [choice.group for choice in injection.injected] == [0, 3]
    assert rows_of(injection) == [3, 15]
    (first, _) = injection.choices
    assert first == Choice(0, ExpertCompletion((11, 1)), "first", 0.0, rewards_per_func=first.rewards_per_func, row=3)
    assert first.rewards_per_func == pytest.approx([0.9])


@pytest.mark.parametrize(("per_group", "expected"), [(1, [3, 7]), (2, [3, 2, 7]), (3, [3, 2, 1, 7])])
def test_at_most_so_many_per_group_and_no_more_than_there_are(per_group, expected):
    batch = make_batch([FAILED, FAILED, FAILED], expert=[EXPERT, ["9"], []])
    assert rows_of(inject(make_injector(per_group=per_group), batch)) == expected


@pytest.mark.parametrize(
    ("per_group", "per_batch", "expected"),
    [
        (1, 1, {2: 1}),
        (1, 2, {2: 1, 0: 1}),
        (1, 9, {2: 1, 0: 1, 1: 1}),
        (2, 3, {2: 2, 0: 1}),
        (2, 5, {2: 2, 0: 2, 1: 1}),
    ],
)
def test_at_most_so_many_per_batch_and_the_neediest_first(per_group, per_batch, expected):
    # means 0.1, 0.2, 0; the last group is the poorest and not triggered, for nothing scored it
    batch = make_batch([[0.0, 0.0, 0.0, 0.4], [0.2] * 4, [0.0] * 4, [NAN] * 4])
    injection = inject(make_injector(per_group=per_group, per_batch=per_batch), batch)
    assert Counter(choice.group for choice in injection.injected) == expected


def test_guided_rollouts_do_not_make_a_group_less_needy():
    guided = [[False, False, True, True]] * 2
    batch = make_batch([[0.0, 0.0, 1.0, 1.0], [0.1, 0.0, 0.0, 0.0]], is_guided=guided)
    injection = inject(make_injector(per_batch=1), batch)
    assert [choice.group for choice in injection.injected] == [0]


def test_of_equally_needy_groups_any_may_come_first():
    injector, counts = make_injector(per_batch=1), Counter()
    for _ in range(300):
        (choice,) = inject(injector, make_batch([FAILED] * 3)).injected
        counts[choice.group] += 1
    assert all(70 < counts[group] < 130 for group in range(3))  # 100 each, 4 standard deviations are 33


def test_where_nothing_is_triggered_nothing_is_read_nor_scored():
    injector = make_injector(per_group=2)
    malformed = make_batch([SOLVED, SOLVED], expert=[3, {"no": "list"}])
    injection = injector.choose(malformed, never, never)
    assert (injection.choices, injection.num_read) == ([], 0)
    with pytest.raises(ValueError, match="has 3 of type int"):  # which would have been seen
        inject(injector, make_batch([FAILED, SOLVED], expert=[3, []]))


def test_where_nothing_is_left_to_inject_nothing_is_scored():
    for expert in (None, [], ["9 8 7 6 5 4 3"]):  # the last one is too long
        for selector in ("first", "reward_gain", "learnable", "learned"):
            injector = make_injector(selector=selector)
            assert injector.choose(make_batch([FAILED], expert=[expert]), never, never).choices == []


def test_overlong_completions_are_counted_and_left_out():
    batch = make_batch([FAILED, FAILED, SOLVED], expert=[["9 8 7 6 5 4 3", "9"], ["9 9"], ["9"] * 5])
    injector = make_injector()
    injection = inject(injector, batch)
    assert texts_of(injection) == ["9", "9 9"]
    assert (injection.num_read, injection.num_overlong) == (3, 1)
    again = inject(injector, batch)
    assert (again.num_read, again.num_overlong) == (3, 1)  # of this batch


def test_the_shares_of_the_triggers():
    trigger = GroupFailed() & (ZeroVariance() | Below(0.1))
    injection = inject(
        make_injector(trigger), make_batch([FAILED, SOLVED, [0.4, 0.0, 0.0, 0.0], [0.4] * 4, [NAN] * 4])
    )
    assert [choice.group for choice in injection.injected] == [0, 2, 3]
    assert injection.fired == {"group_failed": 3 / 5, "zero_variance": 3 / 5, "below": 2 / 5}


def test_triggers_see_the_policys_own_rollouts_and_the_step():
    seen: list[GroupOutcomes] = []

    class Watching(Trigger):
        def fires(self, outcomes):
            seen.append(outcomes)
            return torch.zeros(2, dtype=torch.bool)

    guided = [[False, False, False, True]] * 2
    make_injector(Watching()).choose(
        make_batch([[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, NAN, 0.0]], is_guided=guided, step=7), never, never
    )
    torch.testing.assert_close(
        seen[0].rewards, torch.tensor([[0.0, 0.0, 0.0, NAN], [1.0, 0.0, NAN, NAN]]), equal_nan=True
    )
    assert seen[0].is_correct.tolist() == [[False] * 4, [True, False, False, False]]
    assert seen[0].step == 7
    # so that a group which only guidance rescued is still a failed one
    injection = inject(make_injector(), make_batch([[0.0, 0.0, 0.0, 1.0]], is_guided=guided[:1]))
    assert len(injection.injected) == 1


# ---- In whose place --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "is_guided", "expected"),
    [
        ([0.3, 0.1, 0.2, 0.4], [0, 0, 0, 0], [1, 2]),
        ([0.0, 0.0, 0.4, 0.0], [0, 0, 0, 0], [3, 1]),  # the last of equals
        ([0.0, 0.0, 0.0, 0.0], [0, 1, 0, 0], [1, 3]),  # a guided one first
        ([0.0, 0.0, 0.0, 0.0], [0, 0, 1, 1], [3, 2]),
        ([0.0, 0.4, 0.0, 0.4], [0, 1, 0, 1], [2, 0]),  # but only of equals
        ([0.0, NAN, 0.4, 0.0], [0, 0, 0, 0], [1, 3]),  # without a reward it is worth least
        ([0.0, NAN, NAN, 0.0], [0, 1, 0, 0], [1, 2]),
        ([-1.0, 0.0, -2.0, 0.0], [0, 0, 0, 0], [2, 0]),
    ],
)
def test_the_worst_make_room(rewards, is_guided, expected):
    batch = make_batch([SOLVED, rewards], is_guided=[[False] * 4, [flag == 1 for flag in is_guided]])
    assert rows_of(inject(make_injector(per_group=2), batch)) == [4 + slot for slot in expected]


def test_or_the_last_make_room():
    batch = make_batch([SOLVED, [0.0, 0.0, 0.1, 0.4]], is_guided=[[False] * 4, [True, False, False, False]])
    assert rows_of(inject(make_injector(per_group=2, replaces="last"), batch)) == [7, 6]


def test_a_completion_that_is_no_better_than_the_group_stays_out():
    # 0.4 against means of 0.3, 0.4 and 0.5; 0.9 against the same
    batch = make_batch([[0.3] * 4, [0.4] * 4, [0.5] * 4] * 2, expert=[["4"]] * 3 + [["9"]] * 3)
    injector = make_injector()
    injection = inject(injector, batch)
    assert [choice.group for choice in injection.choices] == [0, 1, 2, 3, 4, 5]
    assert rows_of(injection) == [3, None, None, 15, 19, 23]
    assert [choice.group for choice in injection.injected] == [0, 3, 4, 5]
    # what stays out is not remembered either
    assert [len(times) for times in injector.memory.injected.values()] == [1, 1, 1, 1]

    kept = inject(make_injector(keep_failed=True), batch)
    assert rows_of(kept) == [3, 7, 11, 15, 19, 23]


@pytest.mark.parametrize("selector", ["first", "reward_gain"])
@pytest.mark.parametrize("size", range(2, 17))
def test_a_completion_that_exceeds_the_group_by_rounding_stays_out(size, selector):
    """All have the same reward, whose mean in float32 is below it for many a size of a group. One ten-thousandth more is no rounding."""
    weights = torch.tensor([0.9, 0.1])
    reward = (weights @ torch.tensor([0.2, 0.0])).item()
    injector = make_injector(Always(), selector, reward_weights=weights)
    batch = make_batch([[reward] * size])
    injection = injector.choose(batch, lambda pairs, num_rows: torch.tensor([[0.2, 0.0]] * len(pairs)), never)
    assert injection.injected == []
    injection = injector.choose(batch, lambda pairs, num_rows: torch.tensor([[0.2001, 0.0]] * len(pairs)), never)
    assert len(injection.injected) == 1


def test_a_better_one_takes_the_place_that_a_failed_one_leaves():
    batch = make_batch([[0.0, 0.0, 0.0, 0.4]], expert=[["0", "9"]])
    assert rows_of(inject(make_injector(per_group=2), batch)) == [None, 2]
    assert rows_of(inject(make_injector(per_group=2, keep_failed=True), batch)) == [2, 1]


@pytest.mark.parametrize("keep_failed", [False, True])
def test_a_completion_that_nothing_scored_stays_out(keep_failed):
    injection = inject(make_injector(keep_failed=keep_failed), make_batch([FAILED]), reward=lambda *_: NAN)
    assert rows_of(injection) == [None]


def test_guided_rollouts_are_no_part_of_the_mean():
    """0.4 against the policy's mean of 0.2. With the guided ones it would be 0.47."""
    guided = [[False] * 4 + [True] * 2]
    batch = make_batch([[0.5, 0.3, 0.0, 0.0, 1.0, 1.0]], expert=[["4"]], is_guided=guided)
    for selector in ("first", "reward_gain"):
        injection = inject(make_injector(selector=selector), batch)
        assert rows_of(injection) == [3]
    assert injection.choices[0].score == pytest.approx(0.2)  # the gain


def test_rewards_are_weighed():
    """1 from the first function and 0 from the second, or the other way round, against a mean of 0.4."""
    for weights, row in {(1.0, 0.1): 3, (0.1, 1.0): None, (-1.0, 1.0): None}.items():
        injector = make_injector(reward_weights=torch.tensor(weights))
        injection = injector.choose(make_batch([[0.4] * 4]), lambda pairs, n: torch.tensor([[1.0, 0.0]]), never)
        assert rows_of(injection) == [row]
        assert injection.choices[0].rewards_per_func == [1.0, 0.0]
    injector = make_injector(reward_weights=torch.tensor([1.0, 1.0]))
    injection = injector.choose(make_batch([[0.4] * 4]), lambda pairs, n: torch.tensor([[0.9, NAN]]), never)
    assert rows_of(injection) == [3]  # only the functions that scored it count


@dataclass(frozen=True)
class Shown(Selector):
    """Keeps what it was shown."""

    shown: list[Candidates]
    name = "shown"

    def scores(self, candidates: Candidates) -> list[float]:
        self.shown.append(candidates)
        return [0.0] * len(candidates)


def test_selectors_are_shown_the_policys_own_rollouts_of_the_group():
    batch = make_batch([[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]], is_guided=[[False, False, True], [False, False, True]])
    batch.completion_ids = [[10 * group + slot, 1] for group in range(2) for slot in range(3)]
    shown: list[Candidates] = []
    inject(replace(make_injector(Always()), selector=Shown(shown)), batch)
    assert [candidates.rollouts for candidates in shown] == [[[0, 1], [1, 1]], [[10, 1], [11, 1]]]
    assert [candidates.rewards for candidates in shown] == [pytest.approx([0.1, 0.2]), pytest.approx([0.4, 0.5])]


# ---- Which -----------------------------------------------------------------------------------------------------------------------------


def test_only_what_is_chosen_is_scored():
    batch = make_batch([FAILED, SOLVED, FAILED])
    scorer = Scorer(batch)
    injection = make_injector(per_group=2, selector="shortest").choose(batch, scorer, never)
    expected = [(0, (11, 1)), (0, (11, 10, 1)), (8, (11, 1)), (8, (11, 10, 1))]  # the first row of each group
    assert scorer.calls == [(expected, 4)]
    assert texts_of(injection) == ["9", "9 8"] * 2


def test_the_largest_gain_is_found_by_scoring_all_once():
    batch = make_batch([FAILED, SOLVED, [0.2] * 4], expert=[["0", "7", "9", "8"], EXPERT, ["1", "2"]])
    scorer = Scorer(batch)
    injection = make_injector(selector="reward_gain").choose(batch, scorer, never)
    every = [(0, (2, 1)), (0, (9, 1)), (0, (11, 1)), (0, (10, 1)), (8, (3, 1)), (8, (4, 1))]
    assert scorer.calls == [(every, 6)]
    assert texts_of(injection) == ["9"]  # nothing in the third group is better than 0.2
    assert injection.choices[0].score == pytest.approx(0.9)
    assert injection.choices[0].rewards_per_func == pytest.approx([0.9])


@pytest.mark.parametrize("selector", ["reward_gain", "first"])
def test_a_group_that_gets_nothing_leaves_its_share_to_the_next(selector):
    """The neediest one has no completion that is better, the next one has."""
    batch = make_batch([FAILED, [0.1] * 4, [0.2] * 4], expert=[["0"], ["9"], ["9"]])
    injection = inject(make_injector(selector=selector, per_batch=1), batch)
    assert [(choice.group, choice.row) for choice in injection.injected] == [(1, 7)]
    assert injection.choices[-1].row is None  # the batch has enough


def test_a_fallback_takes_over_where_nothing_is_better():
    batch = make_batch([[0.2] * 4, [0.2] * 4], expert=[["1", "0"], ["1", "9"]])
    injection = inject(make_injector(selector="reward_gain | shortest", keep_failed=True), batch)
    assert texts_of(injection) == ["1", "9"]
    assert [choice.selector for choice in injection.choices] == ["shortest", "reward_gain"]


def test_the_most_learnable_is_the_likeliest_per_token_under_the_policy():
    policy = AutoModelForCausalLM.from_pretrained(POLICY).eval()
    batch = make_batch([FAILED, SOLVED, FAILED], expert=[["D 14 R", "14", "14 14 14 14"], EXPERT, ["~", "U 2"]])
    asked = []

    def policy_logps(prompt_ids, completion_ids):
        asked.append((prompt_ids, completion_ids))
        return completion_logps(policy, prompt_ids, completion_ids)

    injection = inject(make_injector(selector="learnable"), batch, logps=policy_logps)
    ((prompts, completions),) = asked  # in one go, and only for groups that were triggered
    assert prompts == [ids("0 :")[:-1]] * 3 + [ids("2 :")[:-1]] * 2
    assert [list(completion) for completion in completions] == [
        ids(t) for t in ("D 14 R", "14", "14 14 14 14", "~", "U 2")
    ]
    for choice, texts in zip(injection.choices, (batch.rows[0]["expert"], batch.rows[8]["expert"]), strict=True):
        prompt = batch.prompt_ids[choice.group * 4]
        means = [completion_logps(policy, [prompt], [ids(text)])[0].mean().item() for text in texts]
        assert choice.score == pytest.approx(max(means), abs=1e-4)
        assert list(choice.completion.token_ids) == ids(texts[means.index(max(means))])


def test_novelty_remembers_what_was_injected_into_the_prompt():
    texts = ["9 8 7 6 5", "9 8 7 6 4", "10 11 12 13 14"]
    injector = make_injector(selector="novel")
    batch = make_batch([FAILED], expert=[texts])
    taken = [texts_of(inject(injector, batch))[0] for _ in range(2)]
    # both of the first two are all new; then the third one, which has nothing of what was injected
    assert taken == [texts[0], texts[2]]
    elsewhere = make_batch([FAILED], expert=[texts], prompts=["another :"])
    assert texts_of(inject(injector, elsewhere)) == [texts[0]]


# ---- Chance ----------------------------------------------------------------------------------------------------------------------------


def random_texts(injector: Injector, num_batches: int = 20) -> list[str]:
    batch = make_batch([FAILED, FAILED], expert=[[str(cell) for cell in range(1, 30)]] * 2)
    return [text for _ in range(num_batches) for text in texts_of(inject(injector, batch))]


def test_chance_follows_the_seed_the_batch_and_the_group():
    first, again, other = (random_texts(make_injector(selector="random", seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) > 10
    assert first[::2] != first[1::2]


def test_the_frequency_is_that_of_the_trigger():
    injector = make_injector(WithProbability(0.3))
    number = sum(len(inject(injector, make_batch([FAILED] * 10)).injected) for _ in range(100))
    assert abs(number - 300) < 58  # 4 standard deviations of sqrt(1000 * 0.3 * 0.7) = 14.5


@pytest.mark.parametrize("selector", ["random", "learned | random"])
def test_the_generators_that_sample_rollouts_are_left_alone(selector):
    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state())

    before, injector = states(), make_injector(WithProbability(0.5), selector)
    for _ in range(5):
        inject(injector, make_batch([FAILED] * 4))
    assert states() == before


# ---- Memory ----------------------------------------------------------------------------------------------------------------------------


def test_an_effect_when_the_prompt_comes_back():
    injector = make_injector(Always(), per_group=2)
    first = make_batch([[1.0, 0.0, 0.0, 0.0], FAILED], prompts=["p :", "q :"])
    assert inject(injector, first).effects == []
    # another prompt, and "p" with 3 of 4 right: 0.75 - 0.25, for both that were injected
    injection = inject(injector, make_batch([FAILED, [1.0, 1.0, 1.0, 0.0]], prompts=["r :", "p :"], expert=[[], []]))
    assert injection.effects == [Effect(None, None, 0.5)] * 2
    # nothing was injected into it since
    injection = inject(injector, make_batch([SOLVED, FAILED], prompts=["p :", "q :"], expert=[[], []]))
    assert injection.effects == [Effect(None, None, 0.0)] * 2  # those of "q"


def test_an_effect_is_about_the_policys_own_rollouts():
    guided = [[False, False, True, True]]
    injector = make_injector(Always(), replaces="last")
    inject(injector, make_batch([[0.0, 0.0, 1.0, 1.0]], is_guided=guided))
    injection = inject(injector, make_batch([[1.0, 0.0, 0.0, 0.0]], is_guided=guided, expert=[[]]))
    assert injection.effects == [Effect(None, None, 0.5)]  # from 0 of 2 to 1 of 2


def test_an_effect_waits_for_a_group_that_was_scored():
    injector = make_injector(Below(0.5))
    inject(injector, make_batch([[1.0, 0.0, 0.0, 0.0]]))
    assert inject(injector, make_batch([[NAN] * 4])).effects == []
    assert inject(injector, make_batch([SOLVED])).effects == [Effect(None, None, 0.75)]


def test_prompts_are_told_apart_by_all_they_say():
    conversations = [[{"role": "user", "content": text}] for text in ("a", "b")]
    injector = make_injector(Always(), replaces="last")
    batch = make_batch([FAILED, FAILED])
    prompts = [row["prompt"] for row in batch.rows]
    for row, prompt in zip(batch.rows, [p for p in conversations for _ in range(4)], strict=True):
        row["prompt"] = prompt
    inject(injector, batch)
    reordered = [[{"content": "b", "role": "user"}], "b"]
    for row, prompt in zip(batch.rows, [p for p in reordered for _ in range(4)], strict=True):
        row["prompt"] = prompt
    assert len(inject(injector, batch).effects) == 1  # the same message; the text is another prompt
    assert len(set(prompts)) == 2


def test_the_learned_selector_learns_from_effects():
    injector = make_injector(selector="learned")
    (learner,) = injector.selector.learners()
    choice = inject(injector, make_batch([FAILED])).choices[0]
    assert choice.features is not None
    assert choice.predicted == 0.0  # nothing is known yet
    assert learner.model.num_outcomes == 0
    injection = inject(injector, make_batch([[1.0, 1.0, 0.0, 0.0]]))
    assert injection.effects == [Effect(choice.features, 0.0, 0.5)]
    assert learner.model.num_outcomes == 1
    seen = torch.tensor(choice.features, dtype=torch.float64)
    torch.testing.assert_close(learner.model.moment, 0.5 * seen)
    torch.testing.assert_close(learner.model.precision, torch.eye(len(seen)).double() + seen.outer(seen))


def test_what_others_chose_teaches_as_well():
    injector = make_injector(selector="shortest | learned")
    assert inject(injector, make_batch([FAILED])).choices[0].selector == "shortest"
    inject(injector, make_batch([SOLVED]))
    assert injector.selector.learners()[0].model.num_outcomes == 1


def test_over_many_batches_the_learned_selector_finds_what_pays():
    """Prompts come back solved after the short completion, and as they were after the long one."""
    injector, taken = make_injector(selector="learned"), []
    for number in range(30):
        prompts = [f"{number} {group} :" for group in range(2)]
        injection = inject(injector, make_batch([FAILED] * 2, prompts=prompts, expert=[["10", "9 8 7 6 5"]] * 2))
        taken += texts_of(injection)
        outcomes = [SOLVED if text == "10" else FAILED for text in texts_of(injection)]
        inject(injector, make_batch(outcomes, prompts=prompts, expert=[[]] * 2))
    assert taken[0] == "9 8 7 6 5"  # it had to find out
    assert taken[20:].count("10") >= 38


# ---- State -----------------------------------------------------------------------------------------------------------------------------

SELECTORS = [
    "random",
    "shortest",
    "novel & random",
    "diverse",
    "reward_gain | random",
    "learnable",
    "learned",
    "learned & learnable",
]


def random_batches(number: int, num_groups: int = 6) -> list[SampledBatch]:
    """Batches in which prompts come back and rewards are anything."""
    chance = random.Random(5)
    cells = range(1, 20)
    batches = []
    for step in range(number):
        prompts = [f"{chance.choice(range(8))} :" for _ in range(num_groups)]
        expert = {
            prompt: [
                " ".join(str(random.Random(f"{prompt}{text}{place}").choice(cells)) for place in range(1 + text))
                for text in range(int(prompt[0]) % 5)
            ]
            for prompt in prompts
        }
        rewards = [[chance.choice([0.0, 0.0, 0.0, 0.3, 1.0]) for _ in range(4)] for _ in prompts]
        guided = [[False, False, False, True]] * num_groups
        batches.append(
            make_batch(rewards, prompts=prompts, expert=[expert[p] for p in prompts], is_guided=guided, step=step)
        )
    return batches


def run(injector: Injector, batches: list[SampledBatch]) -> list[Injection]:
    return [inject(injector, batch, logps=token_logps) for batch in batches]


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_resumed_run_decides_as_if_it_had_never_stopped(selector):
    def fresh():
        return make_injector(WithProbability(0.8), selector, per_group=2, per_batch=5)

    batches = random_batches(12)
    straight, stopped, resumed = fresh(), fresh(), fresh()
    expected = run(straight, batches)
    assert run(stopped, batches[:6]) == expected[:6]
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert run(resumed, batches[6:]) == expected[6:]
    assert resumed.state_dict() == straight.state_dict()
    if selector not in ("shortest", "diverse", "learnable"):  # where what came before has a say
        assert run(fresh(), batches[6:]) != expected[6:]
    assert any(injection.effects for injection in expected)


def test_a_state_of_other_selectors_is_refused():
    state = make_injector(selector="learned").state_dict()
    with pytest.raises(ValueError, match="1 selectors that learn, expected 0"):
        make_injector(selector="random").load_state_dict(state)
    with pytest.raises(ValueError, match="0 selectors that learn, expected 1"):
        make_injector(selector="learned").load_state_dict(make_injector().state_dict())


# ---- Processes -------------------------------------------------------------------------------------------------------------------------


def part_of(batch: SampledBatch, rank: int, num_processes: int) -> SampledBatch:
    size = len(batch.rows) // num_processes
    own = slice(rank * size, (rank + 1) * size)
    return replace(
        batch,
        rows=batch.rows[own],
        prompt_ids=batch.prompt_ids[own],
        completion_ids=batch.completion_ids[own],
        process_index=rank,
    )


def test_the_groups_of_a_process():
    batch = make_batch([FAILED] * 6)
    assert batch.own_groups == range(6)
    second = part_of(batch, 1, 2)
    assert second.own_groups == range(3, 6)
    assert [second.first_row(group) for group in second.own_groups] == [0, 4, 8]


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("selector", SELECTORS)
def test_the_number_of_processes_changes_no_decision(selector, num_processes):
    batches = random_batches(8)

    def fresh(gather):
        trigger = GroupFailed() | WithProbability(0.5)
        return make_injector(trigger, selector, per_group=2, per_batch=5, gather=gather)

    alone = fresh(lambda part: part)
    expected = run(alone, batches)
    assert sum(len(injection.injected) for injection in expected) > 10

    processes = Processes(num_processes)

    def work(rank):
        injector, calls, injections = fresh(processes.gather_for(rank)), [], []
        for batch in batches:
            own = part_of(batch, rank, num_processes)
            scorer = Scorer(own)
            injections.append(injector.choose(own, scorer, token_logps))
            calls.append(scorer.calls)
        return injections, calls, injector.state_dict()

    results = processes.run(work)
    for injections, _, state in results:
        assert injections == expected
        assert state == alone.state_dict()
    # All call the reward functions together, with the number of rows that the busiest of them has.
    is_uneven = False
    for calls in zip(*(calls for _, calls, _ in results), strict=True):
        assert len({len(call) for call in calls}) == 1
        for together in zip(*calls, strict=True):
            sizes = [len(pairs) for pairs, _ in together]
            assert {num_rows for _, num_rows in together} == {max(sizes)}
            assert max(sizes) > 0
            is_uneven |= len(set(sizes)) > 1
    assert is_uneven


def test_a_failing_process_is_seen():
    """So that the test above cannot pass by accident."""
    processes = Processes(2)

    def work(rank):
        if rank:
            raise KeyError("broken")
        return processes.gather_for(rank)([rank])

    with pytest.raises((KeyError, RuntimeError)):
        processes.run(work)


# ---- Accelerators ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"injection_trigger": "always", "injection_selector": "reward_gain", "injection_advantage": "group"},
        {
            "injection_trigger": "with_probability",
            "injection_selector": "learned & learnable",
            "max_injected_per_batch": 3,
        },
        {
            "injection_trigger": "group_failed & below",
            "injection_selector": "novel",
            "injection_correction": "truncated",
        },
    ],
    ids=["luffy", "learned", "truncated"],
)
def test_training_on_an_accelerator(tmp_path, settings):
    """Rewards and probabilities come from the accelerator, and decisions are made on the CPU."""
    expert = EXPERT_MODEL if "injection_correction" in settings else None
    trainer = make_trainer(
        tmp_path,
        settings=INJECTED,
        train_dataset=expert_dataset(16),
        use_cpu=False,
        init={"expert_model": expert},
        **settings,
    )
    assert trainer.accelerator.device.type != "cpu"
    trainer.train()
    rows = [entry["guidance/injection/rows"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(rows) == INJECTED["max_steps"]
    assert max(rows) > 0
