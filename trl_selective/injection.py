"""Puts selected expert completions into the groups of a batch: whether, which, how many, in whose place. Knows nothing of TRL.

Every decision depends on the rewards of all processes, the seed and the number of batches so far, and on nothing else: not on how many processes
there are, nor on torch's random generators, which injection leaves alone. All tensors are on the CPU: they are small.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trl_selective.experts import CompletionReader, ExpertCompletion
from trl_selective.functional.advantages import total_reward
from trl_selective.selection import (
    Candidates,
    Effect,
    GroupOutcomes,
    InjectionMemory,
    Selector,
    Trigger,
    choose,
    features,
)

REPLACEABLE = ("worst", "last")
ROUNDING = 1e-6  # by which sums and means of rewards may be off, of their size

Score = Callable[[Sequence[tuple[int, ExpertCompletion]], int], Float[Tensor, "completions funcs"]]
PolicyLogps = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[Tensor]]


@dataclass
class SampledBatch:
    """The rollouts of a batch before anything is injected. Rows are those of this process, groups those of all, numbered through.

    Attributes:
        rows: dataset rows, one per rollout.
        prompt_ids, completion_ids: their tokens.
        rewards: total rewards by group, NaN where no function scored a row.
        is_correct: which rollouts are right.
        is_guided: which of them were guided; the others are the policy's own.
        step: optimizer steps so far.
        process_index: of this process.
    """

    rows: Sequence[Mapping[str, Any]]
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    rewards: Float[Tensor, "groups generations"]
    is_correct: Bool[Tensor, "groups generations"]
    is_guided: Bool[Tensor, "groups generations"]
    step: int
    process_index: int

    @property
    def num_generations(self) -> int:
        """Rows of a group."""
        return self.rewards.size(1)

    @property
    def own_groups(self) -> range:
        """The groups of this process."""
        number = len(self.rows) // self.num_generations
        return range(self.process_index * number, (self.process_index + 1) * number)

    def first_row(self, group: int) -> int:
        """The first row of one of `own_groups`."""
        return (group - self.own_groups.start) * self.num_generations

    @cached_property
    def slots(self) -> list[list[tuple[float, bool]]]:
        """Reward, and whether it was guided, of each row of each group."""
        pairs = zip(self.rewards.tolist(), self.is_guided.tolist(), strict=True)
        return [list(zip(rewards, is_guided, strict=True)) for rewards, is_guided in pairs]

    @cached_property
    def own_means(self) -> list[float]:
        """Mean reward of the policy's own rollouts of each group, NaN where nothing scored one: the baseline."""
        return self.own_rewards().nanmean(dim=1).tolist()

    def own_rewards(self) -> Float[Tensor, "groups generations"]:
        """Total rewards of the policy's own rollouts, NaN elsewhere: what the baseline is made of."""
        return self.rewards.masked_fill(self.is_guided, torch.nan)

    @cached_property
    def success_rates(self) -> list[float]:
        """Share of the policy's own rollouts that are right, for each group."""
        own = ~self.is_guided
        return ((self.is_correct & own).sum(1).double() / own.sum(1)).tolist()


@dataclass(frozen=True)
class Choice:
    """An expert completion that was chosen for a group and scored by the user's reward functions.

    Attributes:
        group: of all groups.
        completion: what was chosen.
        selector, score: which selector had the say, and what it gave.
        rewards_per_func: what each reward function gave, NaN for None.
        features, predicted: of the completion, where a selector learns.
        row: the row of all rows of all processes whose place it takes; None if it stays out: it was no better than the group, or the batch had enough.
    """

    group: int
    completion: ExpertCompletion
    selector: str
    score: float
    rewards_per_func: list[float]
    features: list[float] | None = None
    predicted: float | None = None
    row: int | None = None


@dataclass
class Injection:
    """What was decided for a batch, by all processes.

    Attributes:
        choices: completions that were chosen and scored, those that stay out included.
        effects: what came of earlier injections, for the prompts that came back.
        fired: name of each trigger -> share of the groups that it fired for.
        num_read, num_overlong: completions that were read, and those that were too long.
    """

    choices: list[Choice]
    effects: list[Effect]
    fired: dict[str, float]
    num_read: int
    num_overlong: int

    @property
    def injected(self) -> list[Choice]:
        """The choices that take the place of a rollout."""
        return [choice for choice in self.choices if choice.row is not None]


@dataclass
class Survey:
    """What the processes tell one another about their groups: keys of the prompts, numbers of completions, and how many were read."""

    prompts: list[str]
    num_candidates: list[int]
    num_read: int
    num_overlong: int


@dataclass
class Injector:
    """Decides and remembers. Every process has one, and all of them call `choose` together.

    Args:
        reader: reads the completions of a dataset row.
        trigger: which groups may get any.
        selector: which completions they get.
        per_group: most completions injected into a group.
        per_batch: the same for all groups together; None for any number. The groups with the lowest mean reward come first.
        keep_failed: inject also what is no better than the mean of the group's own rollouts. Such rows only make sense inside a baseline.
        replaces: whose place is taken: "worst", the row with the lowest reward (of equals, a guided one first, then the last one), or "last".
        reward_weights: one weight per reward function.
        seed: of all random decisions.
        gather: joins the lists of all processes, in their order.
    """

    reader: CompletionReader
    trigger: Trigger
    selector: Selector
    per_group: int
    per_batch: int | None
    keep_failed: bool
    replaces: str
    reward_weights: Float[Tensor, "funcs"]
    seed: int
    gather: Callable[[list], list]
    num_batches: int = field(default=0, init=False)
    memory: InjectionMemory = field(default_factory=InjectionMemory, init=False)

    def choose(self, batch: SampledBatch, score: Score, policy_logps: PolicyLogps) -> Injection:
        """Choose completions for the groups that the trigger fires for.

        Args:
            batch: the rollouts.
            score: rewards of completions for rows of this process, `score([(row, completion), ...], num_rows)`. All processes call it together
                with the same `num_rows`, the largest number of completions that any of them has; where that is 0, none does.
            policy_logps: log pi_theta of each token of completions, given the ids of prompts and completions. If the selector
                needs it for any group, all processes call it together, each with rows of its own, or none.
        """
        streams = [random.Random(f"{self.seed} {self.num_batches} {group}") for group in range(len(batch.rewards))]
        outcomes = GroupOutcomes(
            rewards=batch.own_rewards(),
            is_correct=batch.is_correct & ~batch.is_guided,
            noise=torch.tensor([stream.random() for stream in streams], dtype=torch.float64),
            step=batch.step,
        )
        completions, survey = self._survey(batch, self.trigger(outcomes).tolist())
        effects = self._effects(survey.prompts, batch.success_rates, outcomes.is_scored.tolist())
        wanted = [min(self.per_group, number) for number in survey.num_candidates]
        candidates = {
            group: self._candidates(batch, group, found, survey.prompts[group], streams[group])
            for group, found in completions.items()
            if wanted[group]
        }
        if self.selector.needs_logps and any(wanted):
            self._add_logps(batch, candidates, policy_logps)
        if self.selector.learners():
            for found in candidates.values():
                found.features = features(found)

        to_score = survey.num_candidates if self.selector.needs_gains else wanted
        size = len(batch.own_groups)
        num_rows = max(sum(to_score[start : start + size]) for start in range(0, len(to_score), size))
        choices: list[Choice] = []
        if num_rows:
            choices = self._pick(batch, candidates, wanted, lambda pairs: score(pairs, num_rows))
            choices = self._capped(self.gather(self._place(batch, choices)), outcomes)
        self._remember(choices, survey.prompts, batch.success_rates)
        self.num_batches += 1
        return Injection(
            choices=choices,
            effects=effects,
            fired={part.name: part(outcomes).double().mean().item() for part in self.trigger.parts()},
            num_read=survey.num_read,
            num_overlong=survey.num_overlong,
        )

    def _survey(
        self, batch: SampledBatch, is_triggered: list[bool]
    ) -> tuple[dict[int, list[ExpertCompletion]], Survey]:
        """The completions of this process's groups, and what all processes have to know of theirs."""
        num_read, num_overlong = self.reader.num_read, self.reader.num_overlong
        rows = {group: batch.rows[batch.first_row(group)] for group in batch.own_groups}
        completions: dict[int, list[ExpertCompletion]] = {group: [] for group in rows}
        triggered = [group for group in rows if is_triggered[group]]
        completions |= zip(triggered, self.reader.read_all([rows[group] for group in triggered]), strict=True)
        survey = Survey(
            prompts=[_key(row["prompt"]) for row in rows.values()],
            num_candidates=[len(found) for found in completions.values()],
            num_read=self.reader.num_read - num_read,
            num_overlong=self.reader.num_overlong - num_overlong,
        )
        surveys = self.gather([survey])
        return completions, Survey(
            prompts=[prompt for each in surveys for prompt in each.prompts],
            num_candidates=[number for each in surveys for number in each.num_candidates],
            num_read=sum(each.num_read for each in surveys),
            num_overlong=sum(each.num_overlong for each in surveys),
        )

    def _effects(self, prompts: list[str], success_rates: list[float], is_scored: list[bool]) -> list[Effect]:
        """What came of earlier injections into these prompts. Selectors that learn learn from it."""
        effects = []
        for prompt, success_rate, scored in zip(prompts, success_rates, is_scored, strict=True):
            effects += self.memory.effects_on(prompt, success_rate) if scored else []
        for learner in self.selector.learners():
            for effect in effects:
                if effect.features is not None and effect.predicted is not None:
                    seen = torch.tensor(effect.features, dtype=torch.float64)
                    learner.model.update(seen, effect.predicted, effect.change)
        return effects

    def _candidates(
        self,
        batch: SampledBatch,
        group: int,
        completions: list[ExpertCompletion],
        prompt: str,
        stream: random.Random,
    ) -> Candidates:
        """What a selector may look at."""
        first = batch.first_row(group)
        own = {slot: reward for slot, (reward, is_guided) in enumerate(batch.slots[group]) if not is_guided}
        return Candidates(
            completions=completions,
            rollouts=[batch.completion_ids[first + slot] for slot in own],
            rewards=list(own.values()),
            success_rate=batch.success_rates[group],
            num_prompt_tokens=len(batch.prompt_ids[first]),
            noise=[stream.random() for _ in completions],
            times_injected=[self.memory.times_injected(prompt, completion.key) for completion in completions],
        )

    def _add_logps(self, batch: SampledBatch, candidates: dict[int, Candidates], policy_logps: PolicyLogps) -> None:
        """Mean log-probability per token of all candidates, in one go."""
        prompts = [
            batch.prompt_ids[batch.first_row(group)] for group, found in candidates.items() for _ in found.completions
        ]
        texts = [completion.token_ids for found in candidates.values() for completion in found.completions]
        means = iter([logps.double().mean().item() for logps in policy_logps(prompts, texts)])
        for found in candidates.values():
            found.logps = [next(means) for _ in found.completions]

    def _pick(
        self,
        batch: SampledBatch,
        candidates: dict[int, Candidates],
        wanted: list[int],
        score: Callable[[list[tuple[int, ExpertCompletion]]], Float[Tensor, "completions funcs"]],
    ) -> list[Choice]:
        """The choices of this process's groups with their rewards. Every candidate is scored if the selector asks for it, else what is chosen."""

        def score_at(places: list[tuple[int, int]]) -> dict[tuple[int, int], list[float]]:
            pairs = [(batch.first_row(group), candidates[group].completions[index]) for group, index in places]
            return dict(zip(places, score(pairs).tolist(), strict=True))

        if self.selector.needs_gains:
            rewards = score_at([(group, index) for group, found in candidates.items() for index in range(len(found))])
            for group, found in candidates.items():
                given = torch.tensor([rewards[group, index] for index in range(len(found))])
                totals = total_reward(given, self.reward_weights).tolist()
                found.gains = [_gain(total, batch.own_means[group]) for total in totals]
        picks = [
            (group, pick)
            for group, found in candidates.items()
            for pick in choose(self.selector, found, wanted[group])
        ]
        if not self.selector.needs_gains:
            rewards = score_at([(group, pick.index) for group, pick in picks])
        return [
            Choice(
                group,
                candidates[group].completions[pick.index],
                pick.selector,
                pick.score,
                rewards[group, pick.index],
                *self._prediction(candidates[group], pick.index),
            )
            for group, pick in picks
        ]

    def _prediction(self, found: Candidates, index: int) -> tuple[list[float] | None, float | None]:
        """Features and prediction of a candidate, None where no selector learns."""
        if found.features is None:
            return None, None
        seen = found.features[index]
        return seen.tolist(), (seen @ self.selector.learners()[0].model.coefficients).item()

    def _place(self, batch: SampledBatch, choices: list[Choice]) -> list[Choice]:
        """Give each choice that helps the row that can best be spared."""
        if not choices:
            return []
        given = torch.tensor([choice.rewards_per_func for choice in choices])
        totals = total_reward(given, self.reward_weights).tolist()
        spare = {choice.group: self._spare_slots(batch, choice.group) for choice in choices}
        placed = []
        for choice, total in zip(choices, totals, strict=True):
            row, gain = None, _gain(total, batch.own_means[choice.group])
            if gain > 0 or (self.keep_failed and not math.isnan(gain)):
                row = choice.group * batch.num_generations + spare[choice.group].pop(0)
            placed.append(replace(choice, row=row))
        return placed

    def _capped(self, choices: list[Choice], outcomes: GroupOutcomes) -> list[Choice]:
        """The choices of all processes, of which no more than a batch may have come in: those of the neediest groups."""
        need = list(zip(outcomes.rewards.nanmean(dim=1).tolist(), outcomes.noise.tolist(), strict=True))
        placed = [number for number, choice in enumerate(choices) if choice.row is not None]
        first = set(sorted(placed, key=lambda number: need[choices[number].group])[: self.per_batch])
        return [choice if number in first else replace(choice, row=None) for number, choice in enumerate(choices)]

    def _spare_slots(self, batch: SampledBatch, group: int) -> list[int]:
        """The slots of a group in the order in which they make room."""
        slots = reversed(range(batch.num_generations))
        if self.replaces == "last":
            return list(slots)
        return sorted(slots, key=lambda slot: _spared_first(*batch.slots[group][slot]))

    def _remember(self, choices: list[Choice], prompts: list[str], success_rates: list[float]) -> None:
        for choice in choices:
            if choice.row is not None:
                prompt, success_rate = prompts[choice.group], success_rates[choice.group]
                self.memory.record(prompt, choice.completion.key, success_rate, choice.features, choice.predicted)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON can hold it; equal on all processes."""
        return {
            "num_batches": self.num_batches,
            "memory": self.memory.state_dict(),
            "learners": [learner.model.state_dict() for learner in self.selector.learners()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: if it belongs to other selectors.
        """
        learners = self.selector.learners()
        if len(state["learners"]) != len(learners):
            raise ValueError(f"{len(state['learners'])} selectors that learn, expected {len(learners)}")
        self.num_batches = int(state["num_batches"])
        self.memory.load_state_dict(state["memory"])
        for learner, learnt in zip(learners, state["learners"], strict=True):
            learner.model.load_state_dict(learnt)


def _gain(total: float, mean: float) -> float:
    """How far a total reward exceeds the mean of a group: 0 where the two differ by rounding, as the mean of equal rewards may from them."""
    return 0.0 if math.isclose(total, mean, rel_tol=ROUNDING) else total - mean


def _spared_first(reward: float, is_guided: bool) -> tuple[float, bool]:
    """Sorts what nothing scored first, then low rewards, of equal ones those of guided rollouts."""
    return (-math.inf if math.isnan(reward) else reward, not is_guided)


def _key(prompt: Any) -> str:
    """A short name for a prompt, the same in every process and run."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).hexdigest()[:16]
