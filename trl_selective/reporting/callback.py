"""A picture of the run in its output folder, for everyone who trains."""

import logging
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_selective.reporting.dynamics import FILE
from trl_selective.reporting.plots import plot_training_dynamics


class TrainingDynamicsCallback(TrainerCallback):
    """Saves `training_dynamics.png` to the output folder when training ends, on the main process. Training never fails for it."""

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir, FILE)
        try:
            plot_training_dynamics({path.resolve().parent.name: state.log_history}, path)
        except Exception as error:  # noqa: BLE001  a picture is no reason to lose a run that has just ended
            logging.getLogger(__name__).warning("No %s: %s", FILE, error)
