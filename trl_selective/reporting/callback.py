"""A picture of the run in its output folder, for everyone who trains."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_selective.reporting.dynamics import FILE
from trl_selective.reporting.plots import plot_training_dynamics


def save_training_dynamics(log_history: Sequence[Mapping], output_dir: str | Path) -> str | None:
    """Save the picture of a run in its output folder. Returns why there is none, where there is none."""
    path = Path(output_dir, FILE)
    try:
        plot_training_dynamics({path.resolve().parent.name: log_history}, path)
    except Exception as error:  # noqa: BLE001  no matplotlib, nothing logged, a full disk: no reason to lose a run
        return str(error)
    return None


class TrainingDynamicsCallback(TrainerCallback):
    """Saves `training_dynamics.png` to the output folder when training ends, on the main process. Training never fails for it."""

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero and (problem := save_training_dynamics(state.log_history, args.output_dir)):
            logging.getLogger(__name__).warning("No %s: %s", FILE, problem)
