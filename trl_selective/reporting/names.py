"""Names of models and datasets that may be published: those of the Hub. A place on this machine is nobody else's business."""

import os
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

DATA_FILES = (".json", ".jsonl", ".csv", ".parquet")


def hub_id(name: str | None) -> str | None:
    """`name` where it is the id of a repository on the Hub; None for a place or file of this machine, or for nothing."""
    if not name or os.path.exists(name) or os.path.splitext(name)[1] in DATA_FILES:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def shown_name(name: str) -> str:
    """`name`; of a folder or file of this machine only the last part, for its place says nothing elsewhere."""
    return Path(name).resolve().name if Path(name).exists() else name
