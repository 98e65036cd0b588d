"""All cases, in the order of the page."""

from pathlib import Path

from tests.bad_input import checkpoints, command_line, datasets, models, rewards, scripts, servers, settings
from tests.bad_input.case import Case

PAGE = Path(__file__).parents[2] / "ERRORS.md"

SECTIONS: dict[str, tuple[str, list[Case]]] = {
    **settings.SECTIONS,
    **command_line.SECTIONS,
    **datasets.SECTIONS,
    **models.SECTIONS,
    **servers.SECTIONS,
    **rewards.SECTIONS,
    **checkpoints.SECTIONS,
    **scripts.SECTIONS,
}
