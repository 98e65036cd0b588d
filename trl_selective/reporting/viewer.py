"""The guidance viewer: one HTML file that shows recorded rollouts, token by token, in any browser and without a network.

The page's own files are in `page/`. Data goes in as JSON and comes out as text nodes only; a Content-Security-Policy allows this page's style
and scripts, by their hash, and nothing else.
"""

import argparse
import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_selective.reporting.rollouts import num_recorded, read_rollouts, recorded_steps
from trl_selective.resuming import write_whole

PAGE = Path(__file__).with_name("page")
SCRIPTS = ("text.js", "cards.js", "chart.js", "main.js")
FILE_NAME = "guidance.html"
MAX_ROLLOUTS = 2000


def write_viewer(
    rollouts: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str = "Guidance",
    num_recorded_steps: int | None = None,
) -> None:
    """
    Write rollouts as a page that needs nothing else.

    Args:
        rollouts: as `read_rollouts` returns them; whole groups.
        path: file to write.
        title: name of the run.
        num_recorded_steps: steps that there are, where these are not all of them: the page says so.

    Raises:
        ValueError: if there are no rollouts.
    """
    if not rollouts:
        raise ValueError("No rollouts to show. Pass what read_rollouts returns for the output_dir of a guided run.")
    style = (PAGE / "viewer.css").read_text(encoding="utf-8")
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    data = {"title": title, "numRecordedSteps": num_recorded_steps, **_as_data(rollouts)}
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    parts = {"policy": policy, "style": style, "data": _as_json(data), "script": script}
    page = (PAGE / "viewer.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        before, after = page.split(f"<!-- {name} -->")
        page = before + part + after
    write_whole(Path(path), page)


def write_viewer_of_run(folder: str | Path, path: str | Path, max_rollouts: int = MAX_ROLLOUTS) -> list[int]:
    """
    Write the page of a run's output folder. Returns the steps that it shows.

    Args:
        folder: `output_dir` of a run.
        path: file to write.
        max_rollouts: where the run has more, the page shows steps at even distances, first and last included.

    Raises:
        ValueError: if the folder has no rollouts.
    """
    recorded = recorded_steps(folder)
    steps = _spread(recorded, max_rollouts // num_recorded(folder, recorded[0])) if recorded else []
    rollouts = read_rollouts(folder, steps)
    write_viewer(rollouts, path, title=Path(folder).resolve().name, num_recorded_steps=len(recorded))
    return steps


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the command `viewer`."""
    parser = commands.add_parser("viewer", help="write the rollouts of a run as an HTML page")
    parser.add_argument(
        "folder", type=Path, metavar="OUTPUT_DIR", help="of a run with guidance or injection, and log_completions=True"
    )
    parser.add_argument("--output", type=Path, help=f"file to write (default: OUTPUT_DIR/{FILE_NAME})")
    parser.add_argument(
        "--max_rollouts",
        type=int,
        default=MAX_ROLLOUTS,
        help="of runs with more, show evenly spaced steps (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """The command `viewer`."""
    path = arguments.output or arguments.folder / FILE_NAME
    steps = write_viewer_of_run(arguments.folder, path, arguments.max_rollouts)
    recorded = len(recorded_steps(arguments.folder))
    print(f"{path} shows {len(steps)} of {recorded} recorded steps, {steps[0]} to {steps[-1]}.")


def _spread(steps: list[int], number: int) -> list[int]:
    """At most `number` of the steps, but at least one: at even distances, first and last included."""
    if number >= len(steps):
        return steps
    if number <= 1:
        return steps[-1:]
    return [steps[round(i * (len(steps) - 1) / (number - 1))] for i in range(number)]


def _as_data(rollouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page reads: each prompt once, and of tokens what it shows."""
    prompts: dict[str, int] = {}
    rows = []
    for rollout in rollouts:
        names = ("step", "group", "row", "kind", "reward", "advantage", "source", "selector", "score")
        row = {name: rollout.get(name) for name in names if rollout.get(name) is not None}
        row["prompt"] = prompts.setdefault(rollout["prompt"], len(prompts))
        row["threshold"], row["coef"] = rollout.get("entropy_threshold"), rollout.get("guidance_coef")
        row["parts"] = {key[len("rewards/") :]: rollout[key] for key in rollout if key.startswith("rewards/")}
        if rollout.get("tokens") is None:
            row["completion"] = rollout["completion"]
        else:
            row["tokens"] = rollout["tokens"]
            row["w"], row["h"], row["a"] = (rollout[name] for name in ("guidance_weights", "entropies", "acceptance"))
            row["drawn"] = [int(drawn) for drawn in rollout["expert_drawn"]]
        rows.append(row)
    return {"prompts": list(prompts), "rollouts": rows}


def _as_json(data: Any) -> str:
    """JSON that is inert inside a script element: ASCII only, and without `<`, `>` and `&`."""
    text = json.dumps(_rounded(data), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _rounded(value: Any) -> Any:
    """Four digits are enough to look at; JSON has no NaN."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
