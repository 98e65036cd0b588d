"""The coin of guided sampling inside an inference engine: with probability w the engine stops and leaves the token to the expert.

It is `sampling/coin.py` cut in two. w depends on the policy alone, which the engine has; so it flips the coin there. On tails it draws the token
from the policy, as ever. On heads it is made to draw the *sentinel*, an id that is no token of the law and ends the request. The expert then draws
that token, wherever it is, and the request goes on behind it. By total probability each token has the law (1 - w) pi_theta + w pi*
(arXiv:2510.04140, Eq. 6), and nothing but token ids is exchanged.

Coins are numbers of a text position: a hash of the row's seed and the position, so that they are the same whichever request, batch or engine
comes to it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trl_selective.functional.mixed_policy import WEIGHTINGS, entropy, token_probs

COIN, POLICY, EXPERT = range(3)  # what the numbers of a position are for
PREFIX = "coin_"  # of the arguments that a request carries


@dataclass(frozen=True)
class Coin:
    """How the coins of a request are flipped.

    Attributes:
        weighting: a name in `WEIGHTINGS`.
        threshold: gamma_p >= 0, nats.
        max_weight: upper bound of w.
        vocab_size: ids from here on are no tokens of the law.
        sentinel: the id that says heads; no token of the law either.
    """

    weighting: str
    threshold: float
    max_weight: float
    vocab_size: int
    sentinel: int

    def __post_init__(self):
        if self.weighting not in WEIGHTINGS:
            raise ValueError(
                f"{PREFIX}weighting must be one of {sorted(WEIGHTINGS)}, got {self.weighting!r}. An engine knows no others."
            )
        if not (self.threshold >= 0 and 0 <= self.max_weight <= 1 and self.vocab_size > 0 and self.sentinel >= 0):
            raise ValueError(
                f"Expected {PREFIX}threshold >= 0, {PREFIX}max_weight in [0, 1], {PREFIX}vocab_size > 0 and {PREFIX}sentinel >= 0, got {self}."
            )

    def arguments(self, seed: int) -> dict[str, Any]:
        """What a request carries, so that its coins are flipped; `seed` is that of its row."""
        return {PREFIX + name: value for name, value in {**asdict(self), "seed": seed}.items()}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any] | None) -> tuple["Coin", int] | None:
        """Coin and seed of a request with these extra arguments; None for one that carries no coin.

        Raises:
            ValueError: if it carries half a coin.
        """
        given = {name: value for name, value in (arguments or {}).items() if name.startswith(PREFIX)}
        if not given:
            return None
        types = {PREFIX + field.name: field.type for field in fields(cls)} | {f"{PREFIX}seed": int}
        if given.keys() != types.keys():
            raise ValueError(f"A guided request carries {sorted(types)}, got {sorted(given)}.")
        kinds = {float: (int, float)}
        wrong = [
            name
            for name, kind in types.items()
            if isinstance(given[name], bool) or not isinstance(given[name], kinds.get(kind, kind))  # type: ignore[arg-type]
        ]
        if wrong:
            raise ValueError(
                f"{wrong[0]} must be of type {types[wrong[0]].__name__}, got {given[wrong[0]]!r}."  # type: ignore[union-attr]
            )
        seed = given.pop(f"{PREFIX}seed")
        return cls(**{name.removeprefix(PREFIX): value for name, value in given.items()}), seed

    def restrict(self, logits: Float[Tensor, "*batch head"]) -> Float[Tensor, "*batch head"]:
        """Logits of the policy's law: -inf for ids that are no tokens of it."""
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill((ids >= self.vocab_size) | (ids == self.sentinel), -torch.inf)

    def weight(self, entropies: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The guidance weight w."""
        return WEIGHTINGS[self.weighting](entropies, self.threshold, self.max_weight)

    def flip(
        self,
        logits: Float[Tensor, "rows head"],
        temperature: float,
        seeds: Int[Tensor, "rows"],
        positions: Int[Tensor, "rows"],
    ) -> Float[Tensor, "rows head"]:
        """Logits that draw from the policy where the coin shows tails, and the sentinel where it shows heads.

        Args:
            logits: of the policy, before temperature.
            temperature: > 0, at which the engine draws.
            seeds: of the rows.
            positions: of the tokens to be drawn, counted from the start of the text.
        """
        logits = self.restrict(logits)
        weight = self.weight(entropy(token_probs(logits, temperature)))
        is_heads = uniforms_of(position_seeds(seeds, positions, COIN)) < weight
        is_sentinel = torch.arange(logits.shape[-1], device=logits.device) == self.sentinel
        sentinel_alone = torch.where(is_sentinel, 0.0, -torch.inf).to(logits.dtype)
        return torch.where(is_heads.unsqueeze(-1), sentinel_alone, logits)


def position_seeds(seeds: Int[Tensor, "rows"], positions: Int[Tensor, "rows"], purpose: int) -> Int[Tensor, "rows"]:
    """Pseudorandom 63-bit numbers, by row and text position: SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195), whose states
    are the positions."""
    state = seeds + (3 * positions + purpose + 1) * _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(state ^ _shifted(state, 31), 1)


def uniforms_of(seeds: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """Uniforms in [0, 1) in float64, of 63-bit numbers."""
    return (seeds >> 10).double() * 2.0**-53


def _signed(constant: int) -> int:
    """A 64-bit constant as int64 has it."""
    return constant - 2**64


def _shifted(state: Int[Tensor, "rows"], bits: int) -> Int[Tensor, "rows"]:
    """Shifted to the right, zeros coming in."""
    return (state >> bits) & (2 ** (64 - bits) - 1)
