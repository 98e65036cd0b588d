"""What was injected into which prompt, and what came of it: known when the prompt comes back."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Effect:
    """What came of one injection.

    Attributes:
        features: of the completion when it was injected; None if nothing learns from them.
        predicted: the change that was predicted then.
        change: of the prompt's success rate since, in [-1, 1].
    """

    features: list[float] | None
    predicted: float | None
    change: float


@dataclass
class InjectionMemory:
    """Remembers injections by prompt. Every process holds the same memory.

    Attributes:
        injected: prompt -> completion -> how often it was injected.
        pending: prompt -> injections whose outcome is not known yet: success rate at the time, features and prediction.
    """

    injected: dict[str, dict[str, int]] = field(default_factory=dict)
    pending: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def times_injected(self, prompt: str, completion: str) -> int:
        """How often this completion was injected into groups of this prompt."""
        return self.injected.get(prompt, {}).get(completion, 0)

    def record(
        self,
        prompt: str,
        completion: str,
        success_rate: float,
        features: list[float] | None = None,
        predicted: float | None = None,
    ) -> None:
        """Remember an injection.

        Args:
            prompt, completion: their keys.
            success_rate: share of the group's own rollouts that were right.
            features, predicted: of the completion, where a selector learns.
        """
        times = self.injected.setdefault(prompt, {})
        times[completion] = times.get(completion, 0) + 1
        entry = {"success_rate": success_rate, "features": features, "predicted": predicted}
        self.pending.setdefault(prompt, []).append(entry)

    def effects_on(self, prompt: str, success_rate: float) -> list[Effect]:
        """The prompt has come back: what became of what was injected into it the last time."""
        return [
            Effect(entry["features"], entry["predicted"], success_rate - entry["success_rate"])
            for entry in self.pending.pop(prompt, [])
        ]

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {"injected": self.injected, "pending": self.pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.injected = {
            prompt: {key: int(n) for key, n in times.items()} for prompt, times in state["injected"].items()
        }
        self.pending = {
            prompt: [
                {
                    "success_rate": float(entry["success_rate"]),
                    "features": entry["features"],
                    "predicted": entry["predicted"],
                }
                for entry in entries
            ]
            for prompt, entries in state["pending"].items()
        }
