"""The command `words`: which words of the expert did the policy adopt? (The idea of arXiv:2510.04140, Figure 3.)"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trl_selective.reporting.inputs import NAMED, add_output, named_paths
from trl_selective.reporting.markdown import padded_table
from trl_selective.reporting.samples import EXPECTED, read_completions
from trl_selective.reporting.word_plots import Role, Usage, plot_words
from trl_selective.reporting.words import WordCounts, as_word, count_words, most_different

# The paper found that the policy adopts words such as the first two, and not the next two.
WORDS = (
    "verify", "check", "okay", "wait", "however", "alternatively", "maybe", "hmm", "let me", "therefore", "assume", "first",
)  # fmt: skip
POINTS = 20  # counts over training: steps are put together, since those of one step are too few to be a rate


def read_usage(name: str, role: Role, path: Path, lengths: set[int]) -> Usage:
    """Count the words of one model.

    Raises:
        ValueError: if it is policy or expert, and the completions are of many steps.
    """
    completions = read_completions(path)
    if isinstance(completions, list):
        return Usage(name, role, [count_words(completions, lengths)])
    if role != "trained":
        raise ValueError(
            f"{path} has the rollouts of a whole training, but --{role} is one model. Give its samples, e.g. of recipes/evaluate.py."
        )
    parts = [part.tolist() for part in np.array_split(sorted(completions), min(POINTS, len(completions)))]
    counts = [count_words((text for step in part for text in completions[step]), lengths) for part in parts]
    return Usage(name, role, counts, [(part[0], part[-1]) for part in parts])


def table(usages: Sequence[Usage], words: Sequence[str], z: Mapping[str, float]) -> str:
    """Both rates of each word, one column per model, or two for one that was watched while it learned; and the word's z if it has one."""
    columns = [column for usage in usages for column in _columns(usage)]
    rows = [
        [word]
        + ([f"{z[word]:+.1f}"] if z else [])
        + [f"{100 * counts.share(word):.1f} ({counts.per_thousand(word):.2f})" for _, counts in columns]
        for word in words
    ]
    return padded_table(["word", *(["z"] if z else []), *(name for name, _ in columns)], rows)


def _columns(usage: Usage) -> list[tuple[str, WordCounts]]:
    if usage.steps is None:
        return [(usage.name, usage.counts[0])]
    named = [
        (f"{usage.name}, steps {first}-{last}", counts)
        for (first, last), counts in zip(usage.steps, usage.counts, strict=True)
    ]
    return named if len(named) == 1 else [named[0], named[-1]]


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "words",
        help="which words of the expert were adopted",
        description="Count words in completions of policy, expert and trained models: the share of completions that have them, and occurrences per "
        "1,000 words. Rollouts that a run logged give the curve over its training; guided and injected ones do not count. Prints a table.",
        epilog=f"{EXPECTED}.",
    )
    parser.add_argument("--policy", metavar="PATH", help="completions of the policy before training")
    parser.add_argument("--expert", metavar="PATH", help="completions of the expert")
    parser.add_argument(
        "--trained", nargs="+", default=(), metavar="PATH", help=f"completions of trained models: {NAMED}"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--words",
        nargs="+",
        default=WORDS,
        metavar="WORD",
        help=f"or several in a row, such as 'let me' (default: {', '.join(WORDS)})",
    )
    which.add_argument(
        "--most_different",
        type=int,
        metavar="N",
        help="the N words whose rates in policy and expert differ most surely: by z, the log-odds ratio "
        "with a prior over its standard deviation; z > 0 is a word of the expert",
    )
    add_output(parser, "words.png")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    words = [as_word(word) for word in arguments.words]
    z: dict[str, float] = {}
    if arguments.most_different is None:
        usages = _read_all(arguments, lengths={1, *(len(word.split()) for word in words)})
    else:
        usages = _read_all(arguments, lengths={1})
        z = _most_different(usages, arguments.most_different)
        words = list(z)
    if not any(counts.occurrences[word] for usage in usages for counts in usage.counts for word in words):
        raise ValueError(
            f"No completion has any of the words {words}. Name others with --words, or let --most_different find them."
        )
    print(f"Completions with the word, % (occurrences per 1,000 words)\n\n{table(usages, words, z)}\n")
    plot_words(usages, words, arguments.output)
    print(f"Wrote {arguments.output}")


def _most_different(usages: Sequence[Usage], num_words: int) -> dict[str, float]:
    counts = {usage.role: usage.counts[-1] for usage in usages}
    if num_words < 1 or not {"policy", "expert"} <= set(counts):
        raise ValueError(
            f"--most_different compares --policy and --expert, and takes a number of at least 1. Got {num_words}, and completions of {sorted(counts)}."
        )
    return most_different(counts["policy"], counts["expert"], num_words)


def _read_all(arguments: argparse.Namespace, lengths: set[int]) -> list[Usage]:
    given: list[tuple[Role, str]] = [("trained", path) for path in arguments.trained]
    if arguments.expert:
        given.insert(0, ("expert", f"expert={arguments.expert}"))
    if arguments.policy:
        given.insert(0, ("policy", f"policy={arguments.policy}"))
    if not given:
        raise ValueError(f"Whose words? Give --policy, --expert or --trained. {EXPECTED}.")
    paths = named_paths([argument for _, argument in given])
    return [
        read_usage(name, role, path, lengths) for (role, _), (name, path) in zip(given, paths.items(), strict=True)
    ]
