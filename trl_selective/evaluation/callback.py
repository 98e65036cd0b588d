"""pass@k and diversity on held-out problems while training goes on: the curves that tell a policy that learns from one that collapses."""

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback

from trl_selective.evaluation.in_memory import Evaluation, evaluate
from trl_selective.functional.diversity import distinct_n, pairwise_overlap
from trl_selective.sharding import check_gathers, is_sharded


class PassAtKCallback(TrainerCallback):
    """Evaluates the policy on a few problems now and then, and logs `eval/pass@k` and `diversity/...` to the history and all trackers.

    Training goes on as if nothing had happened: random numbers and modes are left as they were. The main process evaluates alone while the
    others wait for it at their next step, so keep it to minutes.

    Logged are `eval/pass@k`, `diversity/distinct_correct` (different right answers to a problem), and, as means over problems,
    `diversity/distinct_2` (share of different pairs of tokens in all samples of a problem) and `diversity/pairwise_overlap` (shared pairs of
    tokens of two samples: 1 if all are alike).

    Args:
        trainer: the trainer that the callback is added to, of which it takes model, tokenizer, chat template with its
            arguments, temperature and length.
        dataset: a column `prompt`, and whatever `reward_func` asks for.
        reward_func: as TRL calls it.
        num_samples: completions of each problem.
        ks: the k of pass@k; 1 and `num_samples` by default.
        every_n_steps: evaluate before the first step and after every so many; None: whenever the trainer evaluates (`eval_strategy`).
        max_completion_length, temperature: those of training by default.
        batch_size: completions generated at once.
        seed: of the sampling, the same each time, so that curves show the policy rather than luck.
        correct_above: a completion is right when its reward exceeds this.
        answer_key: right answers with equal keys count as the same.

    Raises:
        ValueError: if parameters are sharded over processes and cannot be put together for it, or if it would never run.

    Example:
        >>> trainer.add_callback(PassAtKCallback(trainer, heldout, path_reward, num_samples=8, every_n_steps=10))
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        reward_func: Callable,
        *,
        num_samples: int = 8,
        ks: Sequence[int] | None = None,
        every_n_steps: int | None = None,
        max_completion_length: int | None = None,
        temperature: float | None = None,
        batch_size: int = 64,
        seed: int = 0,
        correct_above: float = 0.5,
        answer_key: Callable[[str], Hashable] = str.strip,
    ) -> None:
        _check(trainer, every_n_steps)
        self.trainer, self.dataset, self.reward_func, self.every_n_steps = trainer, dataset, reward_func, every_n_steps
        args = trainer.args
        self.settings: dict[str, Any] = {
            "num_samples": num_samples,
            "ks": sorted({1, num_samples}) if ks is None else ks,
            "max_completion_length": max_completion_length or args.max_completion_length,
            "temperature": args.temperature if temperature is None else temperature,
            "batch_size": batch_size,
            "seed": seed,
            "correct_above": correct_above,
            "answer_key": answer_key,
            # None: the tokenizer's own template.
            "chat_template_kwargs": {
                "chat_template": getattr(trainer, "chat_template", None),
                **getattr(trainer, "chat_template_kwargs", {}),
            },
        }

    def on_train_begin(self, args, state, control, **kwargs):
        if self.every_n_steps and state.global_step == 0:
            self._run(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if self.every_n_steps and state.global_step % self.every_n_steps == 0:
            self._run(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        if not self.every_n_steps:
            self._run(args, state, control)

    def _run(self, args, state, control) -> None:
        with self._policy() as model:
            if not state.is_world_process_zero:
                return
            tokenizer = self.trainer.processing_class
            result = evaluate(model, tokenizer, self.dataset, self.reward_func, description=None, **self.settings)
        metrics = as_metrics(result)
        # Not `trainer.log`: that of GRPO would end the averages over `logging_steps` that it is collecting.
        state.log_history.append({**metrics, "step": state.global_step})
        is_due = control.should_log  # the handler takes ours for the trainer's own
        self.trainer.callback_handler.on_log(args, state, control, metrics)
        control.should_log = is_due

    def _policy(self):
        """The policy, all of it; where each process has a part, they put it together."""
        if is_sharded(self.trainer.accelerator):
            return self.trainer.whole_policy()
        return nullcontext(self.trainer.accelerator.unwrap_model(self.trainer.model))


def as_metrics(result: Evaluation) -> dict[str, float]:
    """What is logged. Diversity that there are no pairs for is left out."""
    metrics = {
        **{f"eval/pass@{k}": value for k, value in result.pass_at_k.items()},
        "diversity/distinct_correct": result.distinct_correct,
        "diversity/distinct_2": _mean([distinct_n(samples, 2) for samples in result.completion_ids]),
        "diversity/pairwise_overlap": _mean([pairwise_overlap(samples, 2) for samples in result.completion_ids]),
    }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _check(trainer: Trainer, every_n_steps: int | None) -> None:
    check_gathers(trainer.accelerator, trainer.args.ds3_gather_for_generation, "PassAtKCallback")
    if is_sharded(trainer.accelerator) and not hasattr(trainer, "whole_policy"):
        raise ValueError(
            f"PassAtKCallback samples on the main process alone, which has only its share of the parameters under FSDP2 or ZeRO-3, and a "
            f"{type(trainer).__name__} cannot put them together. Use SelectiveGuidanceGRPOTrainer, which is GRPOTrainer while its guidance is off, "
            "or DDP or ZeRO-2, or evaluate checkpoints with recipes/evaluate.py."
        )
    if every_n_steps is not None and every_n_steps < 1:
        raise ValueError(
            f"every_n_steps must be at least 1, or None for each evaluation of the trainer, got {every_n_steps}."
        )
    if every_n_steps is None and trainer.args.eval_strategy == "no":
        raise ValueError(
            'PassAtKCallback would never run: every_n_steps is None and eval_strategy is "no". Set one of the two.'
        )
