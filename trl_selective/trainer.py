"""GRPO whose rollouts an expert may guide. The only file that touches TRL's private names, each pinned in tests/test_trl_contract.py.

Nothing of TRL is copied: every override does its part before or after `super()`. Read them as a table of contents; the mathematics is in
`functional/`, the sampling in `sampling/`.
"""

import copy
import inspect
import textwrap
import warnings
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from trl_selective.checks import check_arguments, check_generation_config
from trl_selective.config import GUIDANCE_FIELDS, SelectiveGuidanceGRPOConfig
from trl_selective.experts import check_expert, load_expert, load_expert_tokenizer
from trl_selective.functional.advantages import guided_advantages, on_policy_advantages, reward_span, total_reward
from trl_selective.guided_batch import GuidedBatch
from trl_selective.reporting.metrics import (
    importance_metrics,
    importance_ratio_p99,
    policy_metrics,
    reward_metrics,
    rollout_metrics,
    rollout_sums,
)
from trl_selective.rollout import GuidedRollout
from trl_selective.sampling import make_sampler
from trl_selective.threshold import STATE_FILE, EntropyThreshold, read_state, write_state


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
                author       = {Zishang Jiang and Jinyi Han and Tingyun Li and Xinyi Wang and Sihang Jiang and Jiaqing Liang and Zhaoqian Dai and Shuguang Ma and Fei Yu and Yanghua Xiao},
                year         = 2025,
                eprint       = {arXiv:2510.04140},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs=None,
        args: GRPOConfig | None = None,
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
            check_arguments(bound.arguments, expert_model)
        elif expert_model is not None:
            warnings.warn(
                "An expert is given, but without effect: num_guided_generations is 0. Set it in a SelectiveGuidanceGRPOConfig.",
                stacklevel=2,
            )

        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)

        self._batch: GuidedBatch | None = None  # while a guided batch is generated and scored
        self._on_policy_mask: torch.Tensor | None = None  # while the loss of a micro-batch is computed
        self._on_policy_entropies: torch.Tensor | None = None  # their sum and number in that micro-batch
        if self.num_guided_generations:
            self._set_up_guidance(expert_model, expert_processing_class)

    # ---- Set-up ------------------------------------------------------------------------------------------------------------------------

    def _set_up_guidance(self, expert_model, expert_processing_class) -> None:
        args = self.args
        if self._is_vlm:
            raise ValueError(
                "num_guided_generations > 0 needs a text model, got a processor with images. Set it to 0 to train this model."
            )
        if self.is_fsdp_enabled or (
            self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        ):
            raise ValueError(
                "num_guided_generations > 0 needs the whole policy on each process, got FSDP or DeepSpeed ZeRO-3, which shard it. Use DDP or "
                "ZeRO-2, or train an adapter (PEFT)."
            )
        check_generation_config(self.model.generation_config)
        source = {
            "revision": args.expert_model_revision,
            "init_kwargs": args.expert_model_init_kwargs,
            "trust_remote_code": args.trust_remote_code,
        }
        self.expert_model = load_expert(expert_model, self.accelerator.device, **source)
        tokenizer = expert_processing_class or load_expert_tokenizer(self.expert_model, **source)
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
            first_token_from_expert=args.first_token_from_expert,
        )
        self._threshold = EntropyThreshold(
            self.model.config.get_text_config().vocab_size,
            quantile=args.entropy_quantile,
            init=args.entropy_threshold_init,
            floor=args.entropy_threshold_floor,
            sum_over_processes=self._sum_over_processes,
        )
        if args.preset is not None:
            settings = ", ".join(f"{name}={getattr(args, name)!r}" for name in sorted(GUIDANCE_FIELDS))
            self.accelerator.print(f"preset {args.preset!r}: {settings}")

    def _initial_policy(self) -> PreTrainedModel:
        """A frozen copy of the policy as it is now."""
        policy = copy.deepcopy(self.model)
        for module in policy.modules():
            module.__dict__.pop("forward", None)  # TRL's fused head, whose closure still refers to the trained model
        return policy.requires_grad_(False).eval().to(self.accelerator.device)

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor.to(self.accelerator.device), reduction="sum")

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
        # A constant weight has no threshold.
        threshold = 0.0 if self.args.guidance_weighting == "constant" else self._threshold.measure()
        if threshold is None:
            if self.state.global_step > 0:
                warnings.warn(
                    "Guidance cannot start: no on-policy token was left to measure the entropy threshold on, since "
                    "mask_truncated_completions masks completions that do not end. Set entropy_threshold_init, raise max_completion_length, "
                    "or unset mask_truncated_completions.",
                    stacklevel=2,
                )
            return None
        self._metrics["train"]["guidance/entropy_threshold"].append(threshold)
        return GuidedBatch(coef, threshold, self.num_generations, self.num_guided_generations, num_rows)

    def _guidance_coef(self) -> float:
        """alpha at this step."""
        return self.args.guidance_coef_schedule(self.state.max_steps)(self.state.global_step)

    def _generate_single_turn(self, *args, **kwargs):
        if self._batch is None:
            return super()._generate_single_turn(*args, **kwargs)
        call = inspect.signature(super()._generate_single_turn).bind(*args, **kwargs)
        call.arguments["prompt_ids"], guided_prompt_ids = self._batch.split(call.arguments["prompt_ids"])
        fields = call.arguments["multimodal_fields"]  # of a text model, at most its token_type_ids
        call.arguments["multimodal_fields"] = {name: self._batch.split(rows)[0] for name, rows in fields.items()}
        call.arguments["num_generations"] = self._batch.num_on_policy
        completion_ids, logprobs = super()._generate_single_turn(*call.args, **call.kwargs)
        self._batch.rollout = self._sample_guided(guided_prompt_ids)
        self._batch.completion_ids = self._batch.merge(completion_ids, self._batch.rollout.completion_ids)
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
        batch = self._batch
        self._log_completion_extra("guided", batch.is_guided if batch else [False] * num_rows)
        self._log_completion_extra("expert_drawn", batch.expert_drawn_shares() if batch else [0.0] * num_rows)

    def _apply_guidance(self, output: dict, batch: GuidedBatch) -> dict:
        """Replace TRL's advantages, and what it logged of this batch, by those of mixed-policy GRPO (Eq. 10-11)."""
        reward_weights = self.reward_weights.to(batch.rewards_per_func.device)
        rewards = total_reward(batch.rewards_per_func, reward_weights).view(-1, batch.num_generations)
        on_policy, guided = rewards.split([batch.num_on_policy, batch.num_guided], dim=1)
        if self.args.reward_range is None:
            reward_range = reward_span(batch.rewards_per_func, reward_weights).view_as(rewards)
        else:
            reward_range = torch.full_like(rewards, self.args.reward_range)
        advantages = torch.cat(
            [
                on_policy_advantages(on_policy, self.scale_rewards),
                guided_advantages(guided, on_policy, batch.coef, reward_range[:, batch.num_on_policy :]),
            ],
            dim=1,
        ).flatten()
        local = advantages[self.accelerator.process_index * batch.num_rows :][: batch.num_rows]
        output["is_guided"] = torch.tensor(batch.is_guided, device=local.device)
        output["advantages"] = local
        if self.args.guided_importance_correction != "none":
            seq = output["completion_ids"].size(1)
            weights = batch.importance_weights(
                seq, self.args.guided_importance_correction, self.args.importance_ratio_max
            )
            output["advantages"] = local.unsqueeze(1) * weights.to(local.device)

        self._logs["advantages"].extend(advantages.tolist())  # as many as the deque holds
        self._log_batch(batch, on_policy, guided, reward_range)
        return output

    # ---- Loss --------------------------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        is_guided = inputs.get("is_guided")
        needs_entropies = is_guided is not None or (self.num_guided_generations and self._guidance_coef() > 0)
        if not needs_entropies or not self.model.training:
            return super()._compute_loss(model, inputs)
        self._on_policy_mask = inputs["completion_mask"].bool()
        if is_guided is not None:
            self._on_policy_mask &= ~is_guided.unsqueeze(1)
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._on_policy_mask = None
        total, count = self._sum_over_processes(self._on_policy_entropies).tolist()
        self._metrics["train"]["entropy"][-1] = total / count if count else float("nan")
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        mask = self._on_policy_mask
        if mask is not None:
            self._threshold.histogram.update(entropies, mask)
            self._on_policy_entropies = torch.stack([entropies.detach().double()[mask].sum(), mask.sum().double()])
        return logps, entropies, aux_loss

    # ---- Logs --------------------------------------------------------------------------------------------------------------------------

    def _log_batch(self, batch: GuidedBatch, on_policy, guided, reward_range) -> None:
        """TRL's reward and length metrics of this batch, restricted to the policy's rollouts, and the metrics of guidance."""
        device = on_policy.device
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        shape = torch.tensor([[len(ids), ids[-1] not in ends] for ids in batch.completion_ids], device=device)
        is_on_policy = ~torch.tensor(batch.is_guided, device=device).repeat(self.accelerator.num_processes)
        lengths, is_truncated = self.accelerator.gather(shape)[is_on_policy].unbind(1)
        rewards_per_func = batch.rewards_per_func[is_on_policy]
        metrics = self._metrics["train"]
        for name, value in policy_metrics(
            rewards_per_func, on_policy, self.reward_func_names, lengths, is_truncated.bool(), self.scale_rewards
        ).items():
            metrics[name][-1] = value

        sums = rollout_sums(batch.rollout)
        totals = self._sum_over_processes(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
        sums = dict(zip(sums, totals, strict=True))
        news = reward_metrics(on_policy, guided, reward_range) | rollout_metrics(sums)
        # With "initial", the rollout knows that policy's probabilities and not those of the trained one.
        if self.args.mixture_policy == "current":
            p99 = torch.tensor(importance_ratio_p99(batch.rollout), device=device)
            news |= importance_metrics(sums, self.accelerator.gather(p99).max().item())
        for name, value in news.items():
            metrics[name].append(value)

    # ---- Checkpoints -------------------------------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.num_guided_generations:
            state = self._threshold.state_dict()
            if self.args.should_save:
                write_state(Path(output_dir), state)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.num_guided_generations or checkpoint is None:
            return
        state = read_state(Path(checkpoint))
        if state is None:
            warnings.warn(
                f"{checkpoint} has no {STATE_FILE}: it was written without guidance, whose threshold starts fresh.",
                stacklevel=2,
            )
        else:
            self._threshold.load_state_dict(state, is_main_process=self.accelerator.is_main_process)
