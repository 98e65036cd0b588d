"""Guided rollouts of a policy in a vLLM engine: it writes until a coin shows heads, the expert draws that token, and it writes on."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trl_selective.engines.asking import Asking, AskingHere, AskingThere, Question
from trl_selective.engines.coin import EXPERT, POLICY, Coin, position_seeds
from trl_selective.engines.engine import Engine, Request, check_flips
from trl_selective.engines.reading import ReadingExpert, check_reader
from trl_selective.experts import completion_laws, completion_logps, evaluation_mode
from trl_selective.functional.mixed_policy import entropy, finite_log, probability_of, token_probs
from trl_selective.rollout import GuidedRollout
from trl_selective.sampling import RemoteExpert
from trl_selective.sampling.remote import scored
from trl_selective.sampling.sampler import check_request


@dataclass
class Row:
    """A row that is being written: its prompt, what was drawn, and by whom."""

    prompt: list[int]
    max_length: int
    ids: list[int] = field(default_factory=list)
    by_expert: list[bool] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        return self.prompt + self.ids

    def extend(self, ids: Sequence[int], by_expert: bool) -> None:
        self.ids += ids
        self.by_expert += [by_expert] * len(ids)

    def is_done(self, eos_token_ids: Collection[int]) -> bool:
        return bool(self.ids) and (len(self.ids) >= self.max_length or self.ids[-1] in eos_token_ids)


class VllmCoinSampler:
    """Draws from pi_mix by flipping a coin for every token, as `CoinSampler` does, with the policy's half in a vLLM engine.

    The engine flips the coins, since it has the law that w follows from (`Coin`). A request ends where its coin shows heads; the expert draws
    that token, and the row goes on behind it, out of the engine's prefix cache. Rows do not wait for each other. A local expert reads when a
    quarter of the rows wait for it, and then for all of these; one behind a server is asked while the engine goes on.

    The record is made afterwards, by one forward of the policy over the finished rows, and one of the expert where it `scores`: engines do not
    say H, and what they would say of a forced token is no probability of the policy. So H, w and the probabilities are those of `policy` as the
    trainer computes it, while tokens are drawn as the engine computes it; TRL treats the rows that it samples with vLLM in the same way.

    Args:
        engine: has the weights of `policy`, and flips coins.
        policy: the same model here.
        expert: a model, which scores; or one that is not in this process.
        coin: how coins are flipped; its threshold is that of `sample`.
        expert_vocab_size: ids from here on have pi* = 0; None for the coin's `vocab_size`.
        pad_token_id, first_token_from_expert: as for `GuidedSampler`.

    Raises:
        ValueError: if the engine does not flip coins, or if a local expert's cache cannot have holes.
    """

    def __init__(
        self,
        engine: Engine,
        policy: nn.Module,
        expert: nn.Module | RemoteExpert,
        coin: Coin,
        *,
        expert_vocab_size: int | None = None,
        pad_token_id: int = 0,
        first_token_from_expert: bool = False,
    ):
        if isinstance(expert, nn.Module):
            check_reader(expert)
        check_flips(engine, coin)
        self.engine, self.policy, self.expert, self.coin = engine, policy, expert, coin
        self.expert_vocab_size = min(coin.vocab_size, expert_vocab_size or coin.vocab_size)
        self.pad_token_id, self.first_token_from_expert = pad_token_id, first_token_from_expert

    @torch.no_grad()
    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        entropy_threshold: float,
        max_completion_length: int,
        eos_token_ids: Collection[int],
        temperature: float = 1.0,
    ) -> GuidedRollout:
        """Draw one completion for each prompt; arguments and errors as for `GuidedSampler.sample`, but all rows are guided. A text ends where
        the engine's context does."""
        check_request(prompt_ids, entropy_threshold, max_completion_length, temperature)
        coin = replace(self.coin, threshold=float(entropy_threshold))
        rows = [Row(list(ids), min(max_completion_length, self.engine.max_model_len - len(ids))) for ids in prompt_ids]
        asking = self._asking(rows, temperature)
        writing = Writing(self.engine, asking, rows, coin, temperature, eos_token_ids)
        with _generators_as_they_were(self.policy):
            writing.run(self.first_token_from_expert)
        return self._record(rows, coin, temperature)

    def _asking(self, rows: list[Row], temperature: float) -> Asking:
        if not isinstance(self.expert, nn.Module):
            return AskingThere(self.expert, temperature)
        return AskingHere(
            ReadingExpert(
                self.expert,
                [row.prompt for row in rows],
                max_completion_length=max(row.max_length for row in rows),
                vocab_size=self.expert_vocab_size,
                pad_token_id=self.pad_token_id,
                temperature=temperature,
            )
        )

    # ---- Record ------------------------------------------------------------------------------------------------------------------------

    def _record(self, rows: list[Row], coin: Coin, temperature: float) -> GuidedRollout:
        prompts, completions = [row.prompt for row in rows], [row.ids for row in rows]

        def read(logits: Tensor, token_ids: Tensor) -> Tensor:
            probs = token_probs(coin.restrict(logits), temperature)
            prob = probability_of(token_ids, probs)
            return torch.stack([finite_log(prob), entropy(probs)], dim=-1)

        with evaluation_mode(self.policy):
            laws = completion_laws(self.policy, prompts, completions, read)
        weights = [coin.weight(law[:, 1]) for law in laws]
        if self.first_token_from_expert:
            for weight in weights:
                weight[0] = 1.0
        num_asked = sum(sum(row.by_expert) for row in rows)
        num_first = len(rows) if self.first_token_from_expert else 0
        rollout = GuidedRollout(
            completion_ids=completions,
            sampling_per_token_logps=[
                torch.where(weight == 0, law[:, 0], math.nan).tolist()
                for weight, law in zip(weights, laws, strict=True)
            ],
            policy_per_token_logps=[law[:, 0].tolist() for law in laws],
            guidance_weights=[weight.tolist() for weight in weights],
            entropies=[law[:, 1].tolist() for law in laws],
            expert_drawn=[row.by_expert for row in rows],
            policy_forwards=sum(map(len, completions)) - num_first,
            expert_forwards=num_asked,
            is_scored=False,
        )
        if isinstance(self.expert, nn.Module):
            score: Callable = partial(
                completion_logps, self.expert, temperature=temperature, vocab_size=self.expert_vocab_size
            )
        elif self.expert.scores:
            score = self.expert.completion_logps
        else:
            return rollout
        return scored(rollout, prompts, score, self.expert_vocab_size)


class Writing:
    """One call of `VllmCoinSampler.sample`: rows that the engine writes, rows that wait for the expert, rows that are done."""

    def __init__(
        self,
        engine: Engine,
        asking: Asking,
        rows: list[Row],
        coin: Coin,
        temperature: float,
        eos_token_ids: Collection[int],
    ):
        self.engine, self.asking, self.rows, self.coin = engine, asking, rows, coin
        self.temperature, self.eos_token_ids = temperature, frozenset(eos_token_ids)
        self.seeds = torch.randint(2**62, (len(rows),))
        self.live = dict.fromkeys(range(len(rows)))  # in order

    def run(self, first_token_from_expert: bool) -> None:
        """Write all rows to their ends, and leave nothing behind, also after an error."""
        try:
            for number in list(self.live):
                (self._ask if first_token_from_expert else self._go_on)(number)
            while self.live:
                for number, ids in self.engine.poll(patient=not self.asking.is_busy):
                    self._take(number, ids)
                for number, token in self.asking.answers(list(self.live), patient=not self.engine.is_busy):
                    self.rows[number].extend([token], by_expert=True)
                    self._go_on(number)
        finally:
            self.engine.abort()

    def _go_on(self, number: int) -> None:
        """Let the policy write on, unless the row is done."""
        row = self.rows[number]
        if row.is_done(self.eos_token_ids):
            del self.live[number]
            return
        left, seed = row.max_length - len(row.ids), self._seed(number, POLICY)
        self.engine.submit(
            Request(number, row.text, left, seed=seed, coin_seed=int(self.seeds[number])),
            self.coin,
            self.temperature,
            {*self.eos_token_ids, self.coin.sentinel},
        )

    def _take(self, number: int, ids: list[int]) -> None:
        """What the policy has written. Behind it, its coin may show heads."""
        if not ids:
            raise RuntimeError(
                "The policy's engine ended a request without a token, as one that was aborted. Its log may say why."
            )
        is_heads = ids[-1] == self.coin.sentinel
        self.rows[number].extend(ids[:-1] if is_heads else ids, by_expert=False)
        (self._ask if is_heads else self._go_on)(number)

    def _ask(self, number: int) -> None:
        self.asking.waiting.append(Question(number, self.rows[number].text, self._seed(number, EXPERT)))

    def _seed(self, number: int, purpose: int) -> int:
        """For the next token of this row."""
        position = torch.tensor([len(self.rows[number].text)])
        return int(position_seeds(self.seeds[number : number + 1], position, purpose))


@contextmanager
def _generators_as_they_were(policy: nn.Module) -> Iterator[None]:
    """An engine in this process takes numbers from torch's generators in each of its steps, whose count depends on how fast others answer."""
    device = next(policy.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def choose_sentinel(
    head_size: int, vocab_size: int, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int]
) -> int:
    """An id that the policy's head has and that no completion needs: padding of the head if there is any, which costs nothing; else the
    token for padding, or the one that begins a text, which guided rows then never draw.

    Args:
        head_size: of the policy.
        vocab_size: ids that policy and expert share.
        tokenizer: of the policy.
        eos_token_ids: that end a completion.

    Raises:
        ValueError: if there is none.
    """
    if head_size > vocab_size:
        return vocab_size
    for token in (tokenizer.pad_token_id, tokenizer.bos_token_id):
        if token is not None and token not in eos_token_ids:
            return token
    raise ValueError(
        f"Guided rollouts with vLLM need a token that no completion contains, but all {head_size} ids of the policy's head are tokens, and "
        f"pad_token {tokenizer.pad_token!r} and bos_token {tokenizer.bos_token!r} of its tokenizer end completions or are missing. Give the "
        "tokenizer a `pad_token` of its own, such as one of its reserved tokens."
    )
