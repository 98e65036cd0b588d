"""Whose words does a model use? How often words occur in its completions, and which words tell two models apart (the idea of
arXiv:2510.04140, Figure 3: which words of the expert a policy adopts)."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import log, sqrt

from trl_selective.functional.diversity import n_grams

WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
PRIOR = 0.1  # weight of the assumption that both models speak alike, against one for what they said
MIN_SHARE = 0.01  # of the completions of one of two models have a word that is to tell them apart


@dataclass(frozen=True)
class WordCounts:
    """How often words occur in completions.

    Attributes:
        num_completions, num_words: how many there are.
        occurrences: word -> how often it occurs in all of them.
        completions: word -> how many of them have it.
    """

    num_completions: int
    num_words: int
    occurrences: Counter[str]
    completions: Counter[str]

    def share(self, word: str) -> float:
        """Share of the completions that have it."""
        return self.completions[word] / self.num_completions

    def per_thousand(self, word: str) -> float:
        """Occurrences per 1,000 words."""
        return 1000 * self.occurrences[word] / self.num_words if self.num_words else 0.0


def split_words(text: str) -> list[str]:
    """A word is a run of letters, digits and apostrophes, or a single other sign; upper case is lower case, and a curly apostrophe a straight one."""
    return WORD.findall(text.lower().replace("\u2019", "'"))


def as_word(text: str) -> str:
    """A word, or several in a row, as `count_words` names them.

    Raises:
        ValueError: if there is none.
    """
    words = split_words(text)
    if not words:
        raise ValueError(
            f"{text!r} is no word. Expected one such as 'verify', or several in a row such as 'let me check'."
        )
    return " ".join(words)


def count_words(texts: Iterable[str], lengths: Iterable[int] = (1,)) -> WordCounts:
    """Count all words, and all runs of so many words in a row, joined by blanks."""
    num_words, occurrences, completions, num_completions = 0, Counter[str](), Counter[str](), 0
    lengths = set(lengths)
    for text in texts:
        words = split_words(text)
        found = Counter(" ".join(map(str, gram)) for length in lengths for gram in n_grams(words, length))
        num_completions, num_words = num_completions + 1, num_words + len(words)
        occurrences.update(found)
        completions.update(found.keys())
    return WordCounts(num_completions, num_words, occurrences, completions)


def log_odds_z(policy: WordCounts, expert: WordCounts, prior: float = PRIOR) -> dict[str, float]:
    """How surely the expert uses each word more often (> 0) or less often than the policy, in standard errors.

    The log-odds ratio with an informative Dirichlet prior, over its standard deviation (Monroe, Colaresi and Quinn 2008, "Fightin' Words",
    doi:10.1093/pan/mpn018). With a word's occurrences y among the n words of a model, A = `prior` times all words of both models, and a = `prior` times
    the word's occurrences in both, it is log((y + a) / (n + A - y - a)) of the expert minus that of the policy, over
    sqrt(1 / (y_expert + a) + 1 / (y_policy + a)). The prior takes both to speak alike: it draws rare words to 0, so that they do not lead the list by
    chance, and keeps words finite that one of the two never uses. Words are taken to fall independently, which those of one completion do not: read
    it as an order, not as a test.

    Args:
        policy, expert: counts of single words.
        prior: weight of the prior, as a share of the words that were counted.
    """
    both = policy.occurrences + expert.occurrences
    if len(both) < 2:  # one word is all that either says
        return dict.fromkeys(both, 0.0)
    prior_words = prior * (policy.num_words + expert.num_words)
    z = {}
    for word, occurrences in both.items():
        of_policy, of_expert = (counts.occurrences[word] + prior * occurrences for counts in (policy, expert))
        odds = [
            log(times / (counts.num_words + prior_words - times))
            for times, counts in ((of_policy, policy), (of_expert, expert))
        ]
        z[word] = (odds[1] - odds[0]) / sqrt(1 / of_policy + 1 / of_expert)
    return z


def most_different(policy: WordCounts, expert: WordCounts, num_words: int) -> dict[str, float]:
    """The words with the largest `log_odds_z` of either sign -> that, the expert's first.

    Left out are numbers, which depend on the problem, and words that neither model has in 1 % of its completions, since one completion that repeats
    itself would bring them up.
    """
    z = {
        word: value
        for word, value in log_odds_z(policy, expert).items()
        if not word.isdigit() and max(policy.share(word), expert.share(word)) >= MIN_SHARE
    }
    largest = sorted(z, key=lambda word: -abs(z[word]))[:num_words]
    return {word: z[word] for word in sorted(largest, key=lambda word: -z[word])}
