"""The expert's side of a rollout in which rows go their own pace: the rows that wait for a token, and when the expert is asked for them."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from trl_selective.engines.reading import ReadingExpert
from trl_selective.experts.daemon_pool import DaemonPool
from trl_selective.sampling import RemoteExpert
from trl_selective.sampling.remote import SEEDS

ASKED_AT_ONCE = 0.25  # of the rows that are still written: so many wait before a local expert reads


@dataclass(frozen=True)
class Question:
    """Which token comes next?

    Attributes:
        row: whose.
        text: its token ids so far.
        seed: 63 bits, of the draw.
    """

    row: int
    text: Sequence[int]
    seed: int


@runtime_checkable
class Asking(Protocol):
    """The rows that wait for the expert.

    Attributes:
        waiting: their questions, if they were not asked yet.
        is_busy: whether any row waits.
    """

    waiting: list[Question]

    @property
    def is_busy(self) -> bool: ...

    def answers(self, live: Sequence[int], patient: bool) -> list[tuple[int, int]]:
        """Rows and tokens that the expert has drawn.

        Args:
            live: rows that are still written.
            patient: there is nothing else to do than to wait.
        """


class AskingHere:
    """A local expert. It reads at once for as many rows as wait, and waits itself until these are some."""

    def __init__(self, expert: ReadingExpert):
        self.expert, self.waiting = expert, list[Question]()

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting)

    def answers(self, live: Sequence[int], patient: bool) -> list[tuple[int, int]]:
        if not self.waiting or (len(self.waiting) < ASKED_AT_ONCE * len(live) and not patient):
            return []
        asked, self.waiting = self.waiting, []
        self.expert.keep(live)
        rows = [question.row for question in asked]
        return list(zip(rows, self.expert.draw(rows, [q.text for q in asked], [q.seed for q in asked]), strict=True))


class AskingThere:
    """An expert that is not in this process. It is asked in the background, for all rows that wait whenever it has answered for the last ones."""

    def __init__(self, expert: RemoteExpert, temperature: float):
        self.expert, self.temperature, self.waiting = expert, temperature, list[Question]()
        self._pool = DaemonPool(1, "ask-expert")
        self._asked: tuple[list[int], Future[list[int]]] | None = None

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self._asked)

    def answers(self, live: Sequence[int], patient: bool) -> list[tuple[int, int]]:
        answered = []
        if self._asked is not None and (patient or self._asked[1].done()):
            rows, future = self._asked
            self._asked = None
            answered = list(zip(rows, future.result(), strict=True))
        if self.waiting and self._asked is None:
            asked, self.waiting = self.waiting, []
            texts, seeds = [q.text for q in asked], [q.seed % SEEDS for q in asked]
            future = self._pool.submit(self.expert.draw, texts, seeds, self.temperature)
            self._asked = [q.row for q in asked], future
        return answered
