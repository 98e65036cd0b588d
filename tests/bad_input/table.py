"""All cases, in the order of the page."""

from pathlib import Path

from tests.bad_input import rewards, settings
from tests.bad_input.case import Case

PAGE = Path(__file__).parents[2] / "ERRORS.md"

SECTIONS: dict[str, tuple[str, list[Case]]] = {
    **settings.SECTIONS,
    **rewards.SECTIONS,
}
