"""A short guided run that does not depend on how many processes share it. `python -m tests.several_processes FOLDER JSON`, alone or under torchrun.

Every row of the whole batch has its own random numbers, whichever process draws it; `per_device_train_batch_size` in the JSON is that of one
process. Other entries are settings of the run. Each process leaves a record in FOLDER.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tests.processes import leave
from tests.training import GUIDED, INJECTED, expert_dataset, length_reward, make_trainer
from trl_selective import PassAtKCallback, SelectiveGuidanceGRPOTrainer
from trl_selective.sampling import live_rows

NAMES = ["loss", "reward", "guidance/entropy_threshold", "guidance/weight", "guidance/expert_drawn", "guidance/rescued_groups"]  # fmt: skip
SETTINGS = {
    **INJECTED,
    **GUIDED,
    "num_guided_generations": 1,
    "injection_selector": "first",
    "injection_trigger": "always",
    "max_injected_per_batch": 3,
    "gradient_accumulation_steps": 2,
    "guidance_coef": 0.7,
    "learning_rate": 1e-4,
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
counts: Counter[str] = Counter()


def num_held(parameter: torch.Tensor) -> int:
    """Numbers of a parameter that are in this process."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3; what it gathers for a forward is no part of it
        return parameter.numel() or parameter.ds_tensor.numel()
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


class Counted(SelectiveGuidanceGRPOTrainer):
    """Counts what processes tell one another and hold after sampling, and keeps the rollouts."""

    def __init__(self, *args, **kwargs):
        self.batches, self.held = [], []
        super().__init__(*args, **kwargs)
        if self.num_guided_generations:
            summed = self._threshold.sum_over_processes
            self._threshold.sum_over_processes = lambda tensor: counts.update(["thresholds"]) or summed(tensor)

    def _calculate_rewards(self, *args, **kwargs):
        counts["rewards"] += 1
        return super()._calculate_rewards(*args, **kwargs)

    def _apply_guidance(self, output, batch):
        self.batches.append(batch)
        self.held.append(sum(map(num_held, self.model.parameters())))
        return super()._apply_guidance(output, batch)


def noise_by_row(num_rows: int, num_positions: int, device: torch.device) -> torch.Tensor:
    """The numbers of the rows of this process, out of those of all processes."""
    counts["rollouts"] += 1
    state = PartialState()
    every = torch.rand(
        num_rows * state.num_processes, num_positions, 3, dtype=torch.float64,
        generator=torch.Generator().manual_seed(counts["rollouts"]),
    )  # fmt: skip
    return every[state.process_index * num_rows :][:num_rows].to(device)


def full_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of all processes together, where each holds a part."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}


def be_accelerators() -> None:
    """Accelerate shards on accelerators alone: tell it that these processes are such, and talk through gloo. All else is as it is there."""
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def main(folder: Path, settings: dict) -> None:
    live_rows.position_noise = noise_by_row
    if settings.pop("on_accelerators", False):
        be_accelerators()
        settings["use_cpu"] = False
    init = {"peft_config": LoraConfig(**LORA)} if settings.pop("lora", False) else {}
    resume = settings.pop("resume_from_checkpoint", None)
    counts["rollouts"] = settings.pop("steps_done", 0)
    num_short = settings.pop("num_short_completions", 1)
    is_watched = settings.pop("watched", False)
    ends_at_once = settings.pop("ends_at_once", [])  # processes whose rollouts end with their first token
    dataset = expert_dataset(32, num_completions=2).map(
        lambda row: {"expert_completions": [row["expert_completions"][0], *["U U"] * num_short]}
    )
    run = {**SETTINGS, **settings}
    expert = {"expert_model": None} if run.get("expert_model_shares_base") else {}
    trainer = make_trainer(
        folder,
        trainer_class=Counted,
        settings=run,
        reward_funcs=length_reward,
        train_dataset=dataset,
        init=init,
        **expert,
    )
    rank = trainer.accelerator.process_index
    if rank in ends_at_once:
        trainer.eos_token_ids = trainer.generation_config.eos_token_id = list(range(trainer.model.config.vocab_size))
    if is_watched:
        heldout = dataset.select(range(4))
        trainer.add_callback(PassAtKCallback(trainer, heldout, length_reward, num_samples=4, every_n_steps=1))
    if trainer.accelerator.state.deepspeed_plugin is not None:  # ZeRO-3 is to divide tiny parameters, too
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    trainer.train(resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    logs = {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in NAMES}
    record = {
        "logs": logs,
        "counts": counts,
        "pass_at_4": [entry["eval/pass@4"] for entry in trainer.state.log_history if "eval/pass@4" in entry],
        "lengths": [[len(ids) for ids in batch.completion_ids] for batch in trainer.batches],
        "injected": [
            [(c.row, c.completion.token_ids) for c in (batch.injection.injected if batch.injection else ())]
            for batch in trainer.batches
        ],
        "held": [*trainer.held, sum(map(num_held, model.parameters()))],
        "drawn": [sum(map(sum, batch.rollout.expert_drawn)) if batch.rollout else 0 for batch in trainer.batches],
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(record))
    torch.save(full_parameters(model), folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
