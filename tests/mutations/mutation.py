"""A deliberate fault in the package, and the tests that should find it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE, TESTS = "trl_selective", "tests"


@dataclass(frozen=True)
class Mutation:
    """One fragment of a file replaced by another.

    Attributes:
        file: below `trl_selective/`.
        find: source text that occurs exactly once in it.
        replace: what takes its place.
        breaks: what is wrong then.
        tests: files and tests that should find it, below `tests/`, as pytest names them. When empty, the file's mirror; where there is none,
            the whole quick suite.
    """

    file: str
    find: str
    replace: str
    breaks: str
    tests: tuple[str, ...] = ()

    def tests_below(self, root: Path) -> list[str]:
        """What pytest has to run in this tree."""
        path = Path(self.file)
        mirror = (path.parent / f"test_{path.name}").as_posix()
        names = self.tests or ((mirror,) if (root / TESTS / mirror).exists() else ())
        return [f"{TESTS}/{name}" for name in names] or [TESTS]

    def apply(self, root: Path) -> None:
        """Change the file in this tree, a copy.

        Raises:
            ValueError: unless the fragment occurs exactly once.
        """
        path = root / PACKAGE / self.file
        source = path.read_text()
        if (count := source.count(self.find)) != 1:
            raise ValueError(
                f"{PACKAGE}/{self.file} has {count} times, expected once: {self.find!r}. It was to show that the tests find: {self.breaks}. "
                "Take the fragment from the file as it is now."
            )
        path.write_text(source.replace(self.find, self.replace))


def mutations(file: str, *changes: tuple[str, str, str], tests: Sequence[str] = ()) -> list[Mutation]:
    """Mutations (find, replace, what it breaks) of one file with the same tests."""
    return [Mutation(file, *change, tests=tuple(tests)) for change in changes]
