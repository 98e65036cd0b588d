"""GRPO whose rollouts an expert may guide. The only file that touches TRL's private names, each pinned in tests/test_trl_contract.py.

Nothing of TRL is copied: every override does its part before or after `super()`. Read them as a table of contents; the mathematics is in
`functional/`, the sampling in `sampling/`.
"""

import copy
import inspect
import json
import os
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from trl_selective.config import GUIDANCE_FIELDS, SelectiveGuidanceGRPOConfig
from trl_selective.experts import check_expert, load_expert
from trl_selective.experts.local import load_expert_tokenizer
from trl_selective.functional.advantages import guided_advantages, on_policy_advantages
from trl_selective.functional.importance import guided_importance_weight
from trl_selective.functional.thresholds import EntropyHistogram
from trl_selective.reporting.metrics import (
    importance_ratio,
    policy_metrics,
    reward_metrics,
    rollout_metrics,
    rollout_sums,
)
from trl_selective.rollout import GuidedRollout
from trl_selective.sampling import make_sampler

STATE_FILE = "guidance_state.json"


@dataclass
class GuidedBatch:
    """What one generation batch of one process collects on its way through the hooks.

    Attributes:
        coef: alpha of this batch.
        entropy_threshold: gamma_p of this batch, nats.
        is_guided: for each local row.
        completion_ids: of all local rows, in order.
        rollout: the record of the guided rows.
        rewards_per_func: (rows of all processes, functions), NaN where a function returned None.
    """

    coef: float
    entropy_threshold: float
    is_guided: list[bool]
    completion_ids: list[list[int]] | None = None
    rollout: GuidedRollout | None = None
    rewards_per_func: torch.Tensor | None = None


class SelectiveGuidanceGRPOTrainer(GRPOTrainer):
    """
    GRPO in which an expert guides some rollouts of each prompt, token by token, where the policy is uncertain.

    Implements mixed-policy rollouts and mixed-policy GRPO of MENTOR ([arXiv:2510.04140](https://huggingface.co/papers/2510.04140), Eq. 6-11).
    With `num_guided_generations=0`, the default, it is [`~trl.GRPOTrainer`], bit for bit. Evaluation is never guided.

    Args:
        model, reward_funcs, args, ...:
            As for [`~trl.GRPOTrainer`], with its names, order and defaults. `args` is a [`SelectiveGuidanceGRPOConfig`]; with a plain
            [`~trl.GRPOConfig`] there is no guidance.
        expert_model (`str` or [`~transformers.PreTrainedModel`], *optional*, keyword-only):
            The expert: Hub id, local path, or model (which is frozen in place). Defaults to `args.expert_model_name_or_path`.
        expert_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*, keyword-only):
            The expert's tokenizer, only compared with the policy's. Defaults to the one beside the expert's weights.

    Raises:
        ValueError: before training, if the settings cannot work; the message says what to change.

    Example:

    ```python
    from trl_selective import SelectiveGuidanceGRPOConfig, SelectiveGuidanceGRPOTrainer

    trainer = SelectiveGuidanceGRPOTrainer(
        model="Qwen/Qwen2.5-3B",
        expert_model="open-r1/OpenR1-Qwen-7B",
        reward_funcs=accuracy_reward,
        args=SelectiveGuidanceGRPOConfig(num_generations=8, num_guided_generations=4),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "selective-guidance"]
    _name = "MENTOR"
    _paper = {
        "title": "Selective Expert Guidance for Effective and Diverse Exploration in Reinforcement Learning of LLMs",
        "id": "2510.04140",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{jiang2025selective,
                title        = {{Selective Expert Guidance for Effective and Diverse Exploration in Reinforcement Learning of LLMs}},
                year         = 2025,
                eprint       = {arXiv:2510.04140},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs=None,
        args: SelectiveGuidanceGRPOConfig | None = None,
        *trl_args,
        expert_model: str | PreTrainedModel | None = None,
        expert_processing_class: PreTrainedTokenizerBase | None = None,
        **trl_kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = SelectiveGuidanceGRPOConfig(f"{name.split('/')[-1]}-GRPO")
        # A plain GRPOConfig has no guidance: a script that only swaps the trainer class runs unchanged.
        self.num_guided_generations = getattr(args, "num_guided_generations", 0)
        if expert_model is None:
            expert_model = getattr(args, "expert_model_name_or_path", None)
        if self.num_guided_generations:
            bound = inspect.signature(GRPOTrainer.__init__).bind(
                self, model, reward_funcs, args, *trl_args, **trl_kwargs
            )
            self._check_supported(bound.arguments, expert_model)
        elif expert_model is not None:
            warnings.warn(
                "An expert is given, but without effect: num_guided_generations is 0. Set it in a SelectiveGuidanceGRPOConfig.",
                stacklevel=2,
            )

        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)

        self._batch: GuidedBatch | None = None  # while a guided batch is generated and scored
        self._on_policy_mask: torch.Tensor | None = None  # while the loss of a micro-batch is computed
        if self.num_guided_generations:
            self._set_up_guidance(expert_model, expert_processing_class)

    # ---- Set-up ------------------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _check_supported(arguments: dict, expert_model) -> None:
        if expert_model is None:
            raise ValueError(
                "num_guided_generations > 0 needs an expert, got none. Pass `expert_model` to the trainer or set `expert_model_name_or_path`, "
                "or set num_guided_generations=0 for plain GRPO."
            )
        if expert_model is arguments["model"]:
            raise ValueError(
                "expert_model is the very object that is trained, which freezing it would stop. Load it a second time, or pass its path."
            )
        for name in ("tools", "rollout_func", "environment_factory"):
            if arguments.get(name):
                raise ValueError(
                    f"`{name}` cannot be combined with num_guided_generations > 0: guided rollouts are single completions drawn by the "
                    f"trainer itself. Drop `{name}` or set num_guided_generations=0."
                )

    def _set_up_guidance(self, expert_model, expert_processing_class) -> None:
        args = self.args
        if self._is_vlm:
            raise ValueError(
                "num_guided_generations > 0 needs a text model, got a processor with images. Set it to 0 to train this model."
            )
        self.reward_range = args.reward_range or self.reward_weights.abs().sum().item()
        self.expert_model = load_expert(
            expert_model,
            self.accelerator.device,
            revision=args.expert_model_revision,
            init_kwargs={"trust_remote_code": True, **(args.expert_model_init_kwargs or {})}
            if args.trust_remote_code
            else args.expert_model_init_kwargs,
        )
        tokenizer = expert_processing_class or load_expert_tokenizer(self.expert_model)
        self._sampler = make_sampler(
            args.guided_sampler,
            self._initial_policy() if args.mixture_policy == "initial" else self.model,
            self.expert_model,
            draft_length=args.draft_length,
            max_draft_length=args.max_draft_length,
            weighting=args.guidance_weighting,
            max_weight=args.guidance_weight_max,
            vocab_size=check_expert(self.expert_model, tokenizer, self._tokenizer, self.eos_token_ids),
            pad_token_id=self._tokenizer.pad_token_id,
            expert_first_token=args.expert_first_token,
        )
        self._entropy_threshold: float | None = args.entropy_threshold_init
        self._entropies = self._new_histogram()
        if args.preset is not None:
            settings = ", ".join(f"{name}={getattr(args, name)!r}" for name in sorted(GUIDANCE_FIELDS))
            self.accelerator.print(f"preset {args.preset!r}: {settings}")

    def _initial_policy(self) -> PreTrainedModel:
        """A frozen copy of the policy as it is now."""
        policy = copy.deepcopy(self.model)
        for module in policy.modules():
            module.__dict__.pop("forward", None)  # TRL's fused head, whose closure still refers to the trained model
        return policy.requires_grad_(False).eval()

    def _new_histogram(self, counts: torch.Tensor | None = None) -> EntropyHistogram:
        return EntropyHistogram(vocab_size=self.model.config.get_text_config().vocab_size, counts=counts)

    # ---- Rollouts ----------------------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        self._batch = self._plan_batch(len(inputs))
        if self._batch is None:
            return super()._generate_and_score_completions(inputs)
        try:
            output = super()._generate_and_score_completions(inputs)
            return self._apply_guidance(output, self._batch)
        finally:
            self._batch = None

    def _plan_batch(self, num_rows: int) -> GuidedBatch | None:
        """Decide whether this batch is guided: in training, while alpha > 0, once there is a threshold."""
        if not self.num_guided_generations or not self.model.training:
            return None
        coef = self._guidance_coef()
        self._metrics["train"]["guidance/coef"].append(coef)
        if coef == 0:
            return None
        threshold = self._update_threshold()
        if threshold is None:
            return None
        self._metrics["train"]["guidance/entropy_threshold"].append(threshold)
        num_on_policy = self.num_generations - self.num_guided_generations
        is_guided = [row % self.num_generations >= num_on_policy for row in range(num_rows)]
        return GuidedBatch(coef, threshold, is_guided)

    def _guidance_coef(self) -> float:
        """alpha at this step."""
        return self.args.guidance_coef_schedule(self.state.max_steps)(self.state.global_step)

    def _update_threshold(self) -> float | None:
        """gamma_p from the entropies seen since the last batch, the same on all processes."""
        if self.args.guidance_weighting == "constant":
            return 0.0
        measured = self._new_histogram(self._gathered_counts()).quantile(self.args.entropy_quantile)
        if measured is not None:
            self._entropy_threshold = max(measured, self.args.entropy_threshold_floor)
            self._entropies = self._new_histogram()
        return self._entropy_threshold

    def _gathered_counts(self) -> torch.Tensor:
        return self.accelerator.reduce(self._entropies.counts.to(self.accelerator.device), reduction="sum")

    def _generate_single_turn(self, *args, **kwargs):
        if self._batch is None:
            return super()._generate_single_turn(*args, **kwargs)
        call = inspect.signature(super()._generate_single_turn).bind(*args, **kwargs)
        prompts = list(zip(call.arguments["prompt_ids"], self._batch.is_guided, strict=True))
        call.arguments["prompt_ids"] = [ids for ids, is_guided in prompts if not is_guided]
        call.arguments["num_generations"] = self.num_generations - self.num_guided_generations
        on_policy, logprobs = super()._generate_single_turn(*call.args, **call.kwargs)
        self._batch.rollout = self._sample_guided([ids for ids, is_guided in prompts if is_guided])

        sources = iter(on_policy), iter(self._batch.rollout.completion_ids)
        self._batch.completion_ids = [next(sources[is_guided]) for _, is_guided in prompts]
        return self._batch.completion_ids, logprobs

    def _sample_guided(self, prompt_ids: list[list[int]]) -> GuidedRollout:
        """Mixed-policy rollouts of the current policy, which is sampled in the mode and with the weights that TRL samples it."""
        options = {"gather_deepspeed3_params": self.args.ds3_gather_for_generation}
        if "gradient_checkpointing_kwargs" in inspect.signature(unwrap_model_for_generation).parameters:  # TRL >= 1.16
            options["gradient_checkpointing_kwargs"] = self.args.gradient_checkpointing_kwargs
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator, **options) as policy,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            if self.args.mixture_policy == "current":
                self._sampler.policy = policy
            return self._sampler.sample(
                prompt_ids,
                entropy_threshold=self._batch.entropy_threshold,
                max_completion_length=self.max_completion_length,
                eos_token_ids=self.eos_token_ids,
                temperature=self.temperature,
            )

    # ---- Rewards and advantages --------------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, *args, **kwargs):
        if self.num_guided_generations:
            self._log_guided_column(len(inputs))
        rewards_per_func = super()._calculate_rewards(inputs, *args, **kwargs)
        if self._batch is not None:
            self._batch.rewards_per_func = rewards_per_func
        return rewards_per_func

    def _log_guided_column(self, num_rows: int) -> None:
        """Mark the guided rows in the completions table; also where there are none, since a column has an entry for every row."""
        shares = [0.0] * num_rows
        if self._batch is not None:
            drawn = iter(self._batch.rollout.expert_drawn)
            shares = [sum(row := next(drawn)) / len(row) if g else 0.0 for g in self._batch.is_guided]
        self._log_completion_extra("guided", self._batch.is_guided if self._batch else [False] * num_rows)
        self._log_completion_extra("expert_drawn", shares)

    def _apply_guidance(self, output: dict, batch: GuidedBatch) -> dict:
        """Replace TRL's advantages, and what it logged of this batch, by those of mixed-policy GRPO (Eq. 10-11)."""
        rewards_per_func = batch.rewards_per_func
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(1)
        rewards[rewards_per_func.isnan().all(1)] = torch.nan
        num_on_policy = self.num_generations - self.num_guided_generations
        on_policy, guided = rewards.view(-1, self.num_generations).split(
            [num_on_policy, self.num_guided_generations], dim=1
        )
        advantages = torch.cat(
            [
                on_policy_advantages(on_policy, self.scale_rewards),
                guided_advantages(guided, on_policy, batch.coef, self.reward_range),
            ],
            dim=1,
        ).flatten()
        num_local = len(batch.is_guided)
        local = advantages[self.accelerator.process_index * num_local :][:num_local]
        output["is_guided"] = torch.tensor(batch.is_guided, device=local.device)
        output["advantages"] = local
        if self.args.guided_importance_correction != "none":
            output["advantages"] = local.unsqueeze(1) * self._importance_weights(batch, output["completion_ids"])

        self._logs["advantages"].extend(advantages.tolist())  # as many as the deque holds
        self._log_batch(batch, on_policy, guided)
        return output

    def _importance_weights(self, batch: GuidedBatch, completion_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) weights of guided tokens, 1 elsewhere."""
        log_ratio = torch.zeros(completion_ids.shape)
        mask = torch.zeros(completion_ids.shape, dtype=torch.bool)
        rows = [row for row, is_guided in enumerate(batch.is_guided) if is_guided]
        record = zip(rows, batch.rollout.policy_per_token_logps, batch.rollout.sampling_per_token_logps, strict=True)
        for row, policy, mixed in record:
            log_ratio[row, : len(mixed)] = torch.tensor(policy) - torch.tensor(mixed)
            mask[row, : len(mixed)] = True
        weights = guided_importance_weight(
            log_ratio, mask, self.args.guided_importance_correction, self.args.importance_ratio_max
        )
        return weights.to(completion_ids.device)

    # ---- Loss --------------------------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        if not (self.num_guided_generations and self.model.training and self._guidance_coef() > 0):
            return super()._compute_loss(model, inputs)
        self._on_policy_mask = inputs["completion_mask"].bool()
        if "is_guided" in inputs:
            self._on_policy_mask &= ~inputs["is_guided"].unsqueeze(1)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._on_policy_mask = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._on_policy_mask is not None and entropies is not None:
            self._entropies.update(entropies, self._on_policy_mask)
        return logps, entropies, aux_loss

    # ---- Logs --------------------------------------------------------------------------------------------------------------------------

    def _log_batch(self, batch: GuidedBatch, on_policy: torch.Tensor, guided: torch.Tensor) -> None:
        """TRL's reward and length metrics of this batch, restricted to the policy's rollouts, and the metrics of guidance."""
        device = on_policy.device
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        shape = torch.tensor([[len(ids), ids[-1] not in ends] for ids in batch.completion_ids], device=device)
        is_on_policy = ~torch.tensor(batch.is_guided, device=device).repeat(self.accelerator.num_processes)
        lengths, is_truncated = self.accelerator.gather(shape)[is_on_policy].unbind(1)
        metrics = self._metrics["train"]
        repaired = policy_metrics(
            batch.rewards_per_func[is_on_policy], on_policy, self.reward_func_names, lengths, is_truncated.bool()
        )
        for name, value in repaired.items():
            metrics[name][-1] = value

        sums = rollout_sums(batch.rollout)
        totals = self.accelerator.reduce(
            torch.tensor(list(sums.values()), dtype=torch.float64, device=device), reduction="sum"
        )
        p99 = importance_ratio(batch.rollout).quantile(0.99).to(device)
        added = {
            **reward_metrics(on_policy, guided, correct_above=self.reward_range / 2),
            **rollout_metrics(dict(zip(sums, totals.tolist(), strict=True))),
            "guidance/importance_ratio/p99": self.accelerator.gather(p99).mean().item(),
        }
        for name, value in added.items():
            metrics[name].append(value)

    # ---- Checkpoints -------------------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if not self.num_guided_generations:
            return
        counts = self._gathered_counts()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            seen = counts.nonzero().squeeze(1).tolist()
            state = {
                "entropy_threshold": self._entropy_threshold,
                "entropy_counts": {index: counts[index].item() for index in seen},
            }
            partial = folder / f"{STATE_FILE}.partial"
            partial.write_text(json.dumps(state))
            os.replace(partial, folder / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.num_guided_generations or checkpoint is None:
            return
        path = Path(checkpoint, STATE_FILE)
        if not path.exists():
            warnings.warn(
                f"{path} does not exist: the checkpoint was written without guidance, whose threshold starts fresh.",
                stacklevel=2,
            )
            return
        try:
            state = json.loads(path.read_text())
            self._entropy_threshold = state["entropy_threshold"]
            self._entropies = self._new_histogram()
            if self.accelerator.is_main_process:  # the counts are the sum over processes
                for index, count in state["entropy_counts"].items():
                    self._entropies.counts[int(index)] = count
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}). Resume from an earlier checkpoint, or delete this file to start with a fresh threshold."
            ) from error
