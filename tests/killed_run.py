"""A run of two processes with mixed and injected rows, one of which kills itself at a chosen moment.

    torch.distributed.run --nproc_per_node=2 tests/killed_run.py FOLDER STEPS MOMENT CALL RANK

It goes on from the last whole checkpoint in FOLDER, if there is any checkpoint. At MOMENT `never`, it runs to its end.
"""

import functools
import os
import signal
import sys
from functools import partialmethod

import torch
from task import path_reward
from transformers.trainer_callback import TrainerState

from tests.processes import leave
from tests.training import expert_dataset, make_trainer

MOMENTS = ("generation", "reward", "backward", "weights", "checkpoint", "state")
FOLDER, STEPS, MOMENT, CALL, RANK = sys.argv[1:] if len(sys.argv) == 6 else [""] * 5


class Deadly:
    """A function that kills its process when it is called for the `CALL`-th time."""

    def __init__(self, function, last_words=lambda *args: None):
        functools.update_wrapper(self, function)
        self.function, self.last_words, self.calls = function, last_words, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == int(CALL) and os.environ["RANK"] == RANK:
            self.last_words(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.function(*args, **kwargs)


def half_of_a_state(state, path: str) -> None:
    with open(path, "w") as file:
        file.write('{"epoch": 0.5, "global_')


def main() -> None:
    trainer = make_trainer(
        FOLDER,
        max_steps=int(STEPS),
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=8,
        reward_funcs=Deadly(path_reward) if MOMENT == "reward" else path_reward,
        train_dataset=expert_dataset(64),
        entropy_threshold_init=None,
        guidance_weight_max=0.9,
        guided_importance_correction="token_truncate",
        num_guided_generations=1,
        num_injected_completions=1,
        injection_trigger="always",
        injection_selector="learned",
    )
    if MOMENT == "generation":
        trainer._sampler.sample = Deadly(trainer._sampler.sample)
    elif MOMENT == "backward":
        trainer.accelerator.backward = Deadly(trainer.accelerator.backward)
    elif MOMENT == "weights":
        trainer.save_model = Deadly(trainer.save_model)
    elif MOMENT == "checkpoint":  # optimizer, scheduler, and the random numbers of either process
        torch.save = Deadly(torch.save)
    elif MOMENT == "state":
        TrainerState.save_to_json = partialmethod(Deadly(TrainerState.save_to_json, half_of_a_state))
    trainer.train(resume_from_checkpoint=any(name.startswith("checkpoint-") for name in os.listdir(FOLDER)))
    leave()


if __name__ == "__main__":
    main()
