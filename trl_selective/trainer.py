"""GRPO whose rollouts an expert may guide. The only file that touches TRL's private names, each pinned in tests/test_trl_contract.py.

Nothing of TRL is copied: every override does its part before or after `super()`. Read them as a table of contents; the mathematics is in
`functional/`, the sampling in `sampling/`.
"""

import inspect
import logging
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import parse_response
from trl.generation import vllm_generation
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import is_async_callable

from trl_selective.assembly import make_expert, make_injector, make_local_sampler, make_vllm_sampler, needs_expert
from trl_selective.checkpoints import checkpoint_to_resume, way_on
from trl_selective.checks import (
    check_arguments,
    check_columns,
    check_generation_config,
    check_model_rewards,
    check_prompts,
    check_scored,
    known_columns,
    late_start_problem,
    refuse_update,
)
from trl_selective.config import SelectiveGuidanceGRPOConfig
from trl_selective.engines.engine import check_version
from trl_selective.engines.sampler import VllmCoinSampler
from trl_selective.experts import (
    Expert,
    ExpertServer,
    completion_logps,
    evaluation_mode,
    on_device,
)
from trl_selective.functional.advantages import mixed_group_advantages
from trl_selective.grading import watched
from trl_selective.guided_batch import GuidedBatch
from trl_selective.injection import Injection, SampledBatch
from trl_selective.loss_inputs import LossSums, bind_to_policy
from trl_selective.reporting.card import TrainingRun, add_evaluation, evaluated_at, extend_card
from trl_selective.reporting.card_method import method
from trl_selective.reporting.dynamics import save_training_dynamics
from trl_selective.reporting.metrics import (
    importance_metrics,
    importance_ratio_p99,
    injection_metrics,
    policy_metrics,
    reward_metrics,
    rollout_metrics,
    rollout_sums,
)
from trl_selective.reporting.rollouts import LoggedBatch, rollout_rows, write_rollouts
from trl_selective.reward_scale import BatchRewards, RewardScale
from trl_selective.rollout import GuidedRollout
from trl_selective.sampling import GuidedSampler
from trl_selective.sampling.kv import left_pad
from trl_selective.selection import Selector, Trigger
from trl_selective.sharding import check_gathers, check_second_models, unsharded
from trl_selective.state import STATE_FILE, saved_state, write_state
from trl_selective.threshold import EntropyThreshold
from trl_selective.trl_versions import warn_of_newer_trl

logger = logging.getLogger(__name__)
warn_of_newer_trl(trl.__version__)

KINDS_OF_GUIDANCE = ("num_guided_generations", "num_injected_completions")
NUM_PROBED = 4  # injected rows of each process whose log-probability is looked at again after the update


class SelectiveGuidanceGRPOTrainer(GRPOTrainer):
    """
    GRPO in which an expert steps in where it helps: it guides some rollouts of each prompt, token by token, where the policy is uncertain,
    or gives whole completions to groups that need one; or both.

    Implements mixed-policy rollouts and mixed-policy GRPO of MENTOR ([arXiv:2510.04140](https://huggingface.co/papers/2510.04140), Eq. 6-11),
    and selective injection of expert completions from the dataset, of which LUFFY ([arXiv:2504.14945](https://huggingface.co/papers/2504.14945))
    is a special case. With `num_guided_generations=0` and `num_injected_completions=0`, the defaults, it is [`~trl.GRPOTrainer`], bit for bit.
    Evaluation is never guided.

    Args:
        model, reward_funcs, args, ...:
            As for [`~trl.GRPOTrainer`], with its names, order and defaults. `args` is a [`SelectiveGuidanceGRPOConfig`]; with a plain
            [`~trl.GRPOConfig`] there is no guidance.
        expert_model (`str` or [`~transformers.PreTrainedModel`], *optional*, keyword-only):
            The expert: Hub id, local path, or model (which is frozen in place); with `args.expert_model_server_url` its name there; with
            `args.expert_model_shares_base` an adapter of the policy's base model, or nothing for that base itself. Defaults to
            `args.expert_model_name_or_path`.
        expert_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*, keyword-only):
            The expert's tokenizer, only compared with the policy's. Defaults to the one beside the expert's weights.
        injection_trigger ([`~trl_selective.selection.Trigger`], *optional*, keyword-only):
            Which groups get expert completions. Defaults to what `args.injection_trigger` names.
        injection_selector ([`~trl_selective.selection.Selector`], *optional*, keyword-only):
            Which completions they get. Defaults to what `args.injection_selector` names.

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

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs=None,
        args: GRPOConfig | None = None,
        *trl_args,
        expert_model: str | PreTrainedModel | None = None,
        expert_processing_class: PreTrainedTokenizerBase | None = None,
        injection_trigger: Trigger | None = None,
        injection_selector: Selector | None = None,
        **trl_kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = SelectiveGuidanceGRPOConfig(f"{name.split('/')[-1]}-GRPO")
        # A plain GRPOConfig has no guidance: a script that only swaps the trainer class runs unchanged.
        self.num_guided_generations = getattr(args, "num_guided_generations", 0)
        self.num_injected_completions = getattr(args, "num_injected_completions", 0)
        if expert_model is None:
            expert_model = getattr(args, "expert_model_name_or_path", None)
        bound = inspect.signature(GRPOTrainer.__init__).bind(self, model, reward_funcs, args, *trl_args, **trl_kwargs)
        # The kinds of guidance that are on, by the setting that turns them on.
        self._settings_in_use = [name for name in KINDS_OF_GUIDANCE if getattr(self, name)]
        check_arguments(bound.arguments, self._settings_in_use)
        if self._settings_in_use:  # what TRL's card and tags name; without guidance they are GRPO's
            self._name, self._paper = method(args)
            self._tag_names = [*super()._tag_names, "selective-guidance"]
        has_expert = needs_expert(args, bound.arguments, expert_model)
        self.expert_model: Expert | ExpertServer | None = None
        if not self.num_injected_completions and (injection_trigger or injection_selector):
            warnings.warn(
                "injection_trigger or injection_selector is given, but without effect: num_injected_completions is 0. Set it in a "
                "SelectiveGuidanceGRPOConfig.",
                stacklevel=2,
            )

        flips = self.num_guided_generations and args.use_vllm and args.vllm_mode == "colocate"
        with self._coins_in_the_engine() if flips else nullcontext():
            super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)

        self._batch: GuidedBatch | None = None  # while a guided batch is generated and scored
        self._loss_inputs: dict | None = None  # while the loss of a micro-batch is computed
        self._loss_sums: torch.Tensor | None = None  # what `bind_to_policy` adds up in that micro-batch
        self._update_sums = LossSums()  # of the micro-batches of an update
        self._last_injected: tuple[list, list] | None = None  # prompts and completions, until the policy was updated
        self._last_rewards: torch.Tensor | None = None  # of the last batch, as the advantages have them
        self._logged_batch: LoggedBatch | None = None  # the last one, until it was written
        self._begun = time.time()  # of training
        self._resumed_from: str | None = None  # the checkpoint that it goes on from
        self._evaluated_at: int | None = None  # when the weights with which training began were evaluated
        self._warned_of: set[str] = set()  # settings that do not fit the run, its data or its rewards
        self._check_run()
        if self._settings_in_use:
            self._reward_scale = RewardScale(
                self.reward_func_names,
                self.reward_weights,
                self.num_generations,
                args.reward_range,
                args.correctness_reward,
            )
        if has_expert:
            self._set_up_expert(expert_model, expert_processing_class)
        if self.num_guided_generations:
            self._set_up_guidance()
        if self.num_injected_completions:
            self._set_up_injection(injection_trigger, injection_selector)
        if getattr(args, "preset", None) is not None:
            self.accelerator.print(args.preset_in_words())

    # ---- Set-up ------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _coins_in_the_engine(self) -> Iterator[None]:
        """TRL builds its engine of vLLM with our logits processor, for which it has no argument. Without vLLM, it says what is missing."""
        build = getattr(vllm_generation, "LLM", None)
        if build is None:
            yield
            return
        check_version()
        from trl_selective.engines.processor import CoinLogitsProcessor

        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # the runner that was tested; the processor fits both
        vllm_generation.LLM = partial(build, logits_processors=[CoinLogitsProcessor])
        try:
            yield
        finally:
            vllm_generation.LLM = build

    def _check_run(self) -> None:
        """The policy, the reward functions and the data, as TRL has set them up."""
        if self._settings_in_use:
            need = f"{self._settings_in_use[0]} > 0"
            if self._is_vlm:
                raise ValueError(
                    f"{need} needs a text model, got a processor with images. Set it to 0 to train this model."
                )
            if getattr(self, "use_liger_kernel", False):  # of TRL < 1.15: its fused loss asks for no log-probabilities
                raise ValueError(
                    f"use_liger_kernel=True fuses the loss in this version of TRL, so that {need} cannot see its log-probabilities. Set it to "
                    "False, or update TRL to 1.16."
                )
            check_gathers(self.accelerator, self.args.ds3_gather_for_generation, need)
            check_second_models(self.accelerator, self.args)
            check_prompts(
                self.train_dataset, self._tokenizer, bool(self.chat_template or self._tokenizer.chat_template)
            )
        column = getattr(self.args, "expert_completions_column", None)
        if not self.num_injected_completions and column in (known_columns(self.train_dataset) or ()):
            warnings.warn(
                f"train_dataset has the column {column!r}, but without effect: num_injected_completions is 0.",
                stacklevel=3,
            )

    def _set_up_expert(self, expert_model, expert_processing_class) -> None:
        self.expert_model, self._shared_vocab_size = make_expert(
            self.args,
            expert_model,
            expert_processing_class,
            self.model,
            self._tokenizer,
            self.eos_token_ids,
            self.accelerator,
        )

    def _expert_at_hand(self) -> AbstractContextManager:
        """The expert where it is used."""
        offload = self.args.expert_model_offload
        return on_device(self.expert_model, self.accelerator.device) if offload else nullcontext()

    def _set_up_guidance(self) -> None:
        args = self.args
        check_generation_config(self.model.generation_config)
        models, tokenizer = (self.model, self.expert_model, self._shared_vocab_size), self._tokenizer
        self._sampler: GuidedSampler | VllmCoinSampler
        if self.use_vllm:
            # On-policy rows end where guided ones do: the engine knows neither an end token set here, nor those of a model that was changed here.
            self.vllm_generation.generation_kwargs["stop_token_ids"] = sorted(self.eos_token_ids)
            llm = getattr(self.vllm_generation, "llm", None)  # a server has none
            self._sampler = make_vllm_sampler(args, llm, *models, tokenizer, self.eos_token_ids)
        else:
            self._sampler = make_local_sampler(args, *models, tokenizer, self.accelerator)
        self._threshold = EntropyThreshold(
            self.model.config.get_text_config().vocab_size,
            quantile=args.entropy_quantile,
            init=args.entropy_threshold_init,
            floor=args.entropy_threshold_floor,
            sum_over_processes=self._sum_over_processes,
        )

    def _set_up_injection(self, trigger: Trigger | None, selector: Selector | None) -> None:
        args = self.args

        def probability(step: float) -> float:
            return args.injection_probability_by_step(self.state.max_steps)(step)

        self._injector = make_injector(
            args,
            trigger,
            selector,
            self._tokenizer,
            self.eos_token_ids,
            needs_logps=args.injection_needs_expert_logps and self.expert_model is None,
            render=self._render,
            probability=probability,
            reward_weights=self.reward_weights.cpu(),
        )
        reader = self._injector.reader
        check_columns(self.train_dataset, reader.columns)
        if isinstance(self.train_dataset, Dataset) and known_columns(self.train_dataset):
            reader.check(self.train_dataset.select_columns(["prompt", *reader.columns]))

    def _render(self, messages, add_generation_prompt: bool) -> str:
        """A conversation as the policy is shown it."""
        return self.processing_class.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.chat_template_kwargs,
        )

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor.to(self.accelerator.device), reduction="sum")

    # ---- Rollouts ----------------------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        self._batch = self._plan_batch(inputs)
        try:
            output = super()._generate_and_score_completions(inputs)
            if self._batch is not None:
                output = self._apply_guidance(output, self._batch)
            if self.log_completions and self._settings_in_use and self.model.training:
                self._logged_batch = self._batch_as_logged(len(inputs), self._batch)
            return output
        finally:
            self._batch = None

    def _plan_batch(self, rows: list[dict]) -> GuidedBatch | None:
        """Decide whether this batch is guided: in training, while alpha > 0, with guided rollouts once there is a threshold."""
        if not self._settings_in_use or not self.model.training:
            return None
        coef, metrics = self._guidance_coef(), self._metrics["train"]
        metrics["guidance/coef"].append(coef)
        threshold = self._entropy_threshold() if self.num_guided_generations and coef > 0 else None
        num_guided = 0 if threshold is None else self.num_guided_generations
        if self.num_guided_generations:
            metrics["guidance/rows"].append(num_guided / self.num_generations)
        if self.num_injected_completions and coef == 0:  # otherwise known once they are chosen
            metrics["guidance/injection/rows"].append(0.0)
        if coef == 0 or not (num_guided or self.num_injected_completions):
            return None
        return GuidedBatch(coef, threshold, self.num_generations, num_guided, len(rows), rows=rows)

    def _entropy_threshold(self) -> float | None:
        """gamma_p of this batch; None before the first measurement."""
        # A constant weight has no threshold.
        threshold = 0.0 if self.args.guidance_weighting == "constant" else self._threshold.measure()
        if threshold is not None:
            self._metrics["train"]["guidance/entropy_threshold"].append(threshold)
        elif self.state.global_step > 0 and self.args.mask_truncated_completions:
            self._warn_once(
                "mask_truncated_completions",
                "Guidance cannot start: no on-policy token was left to measure the entropy threshold on, since "
                "mask_truncated_completions masks completions that do not end. Set entropy_threshold_init, raise max_completion_length, "
                "or unset mask_truncated_completions.",
            )
        elif self.state.global_step == 0 and (problem := late_start_problem(self.args, self.state.max_steps)):
            self._warn_once("entropy_threshold_init", problem)
        return threshold

    def _guidance_coef(self) -> float:
        """alpha at this step."""
        return self.args.guidance_coef_schedule(self.state.max_steps)(self.state.global_step)

    def _generate_single_turn(self, *args, **kwargs):
        if self._batch is None or not self._batch.num_guided:
            return super()._generate_single_turn(*args, **kwargs)
        call = inspect.signature(super()._generate_single_turn).bind(*args, **kwargs)
        if self._can_sample_together(call.arguments["multimodal_fields"]):
            rollout = self._sample_guided(call.arguments["prompt_ids"], is_guided=self._batch.is_guided)
            self._batch.rollout = rollout.take(self._batch.guided_rows)
            return rollout.completion_ids, None
        call.arguments["prompt_ids"], guided_prompt_ids = self._batch.split(call.arguments["prompt_ids"])
        fields = call.arguments["multimodal_fields"]  # of a text model, at most its token_type_ids
        call.arguments["multimodal_fields"] = {name: self._batch.split(rows)[0] for name, rows in fields.items()}
        call.arguments["num_generations"] = self._batch.num_on_policy
        completion_ids, logprobs = super()._generate_single_turn(*call.args, **call.kwargs)
        self._batch.rollout = self._sample_guided(guided_prompt_ids)
        guided_ids = self._batch.rollout.completion_ids
        if logprobs is not None:  # NaN, unknown to the engine: TRL's ratio for what engines compute otherwise is 1
            logprobs = self._batch.merge(logprobs, [[float("nan")] * len(ids) for ids in guided_ids])
        return self._batch.merge(completion_ids, guided_ids), logprobs

    def _can_sample_together(self, multimodal_fields: dict) -> bool:
        """Whether on-policy rows, too, may be drawn in the sampler's loop. The law is that of `generate` (config and
        `check_generation_config` see to it), and one loop costs hardly more than either of two."""
        is_generate = not (self.use_vllm or self.use_transformers_continuous_batching or multimodal_fields)
        return is_generate and self.args.mixture_policy == "current"

    def _sample_guided(self, prompt_ids: list[list[int]], **rows: list[bool]) -> GuidedRollout:
        """Mixed-policy rollouts of the current policy: of the weights that TRL has just sent to vLLM, if it uses that."""
        with self.whole_policy() as policy, self._expert_at_hand():
            if self.args.mixture_policy == "current":
                self._sampler.policy = policy
            return self._sampler.sample(
                prompt_ids,
                entropy_threshold=self._batch.entropy_threshold,
                max_completion_length=self.max_completion_length,
                eos_token_ids=self.eos_token_ids,
                temperature=self.temperature,
                **rows,
            )

    @contextmanager
    def whole_policy(self) -> Iterator[PreTrainedModel]:
        """The policy in the mode and with the weights with which TRL samples it, all of them on every process, however it is sharded: a forward in here
        waits for no other process, but all processes enter and leave together. For callbacks, too."""
        options = {"gather_deepspeed3_params": self.args.ds3_gather_for_generation}
        if "gradient_checkpointing_kwargs" in inspect.signature(unwrap_model_for_generation).parameters:  # TRL >= 1.16
            options["gradient_checkpointing_kwargs"] = self.args.gradient_checkpointing_kwargs
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator, **options) as policy,
            unsharded(policy, self.accelerator),
        ):
            yield policy

    # ---- Injected completions ----------------------------------------------------------------------------------------------------------

    def _generate(self, prompts):
        generated = super()._generate(prompts)
        if self._batch is None:
            return generated
        prompt_ids, completion_ids, tool_mask, completions, logprobs, *rest = generated
        self._batch.completion_ids = completion_ids
        if self.num_injected_completions:
            rewards_per_func = self._rewards(self._batch.rows, prompts, completions, completion_ids)
            self._batch.sampled_rewards_per_func = rewards_per_func
            completion_ids, completions, logprobs = self._inject(prompt_ids, completions, logprobs)
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, *rest

    def _inject(self, prompt_ids, completions, logprobs) -> tuple[list, list, list | None]:
        """Put selected expert completions into their rows: token ids, decoded completions, log-probabilities of an inference engine."""
        self._log_last_injected()
        started, batch = time.perf_counter(), self._batch
        extra_logs: dict = {}
        score = partial(self._score_completions, prompt_ids, extra_logs)
        batch.inject(self._injector.choose(self._sampled_batch(prompt_ids), score, self._policy_logps))
        self._warn_of_overlong(batch.injection)
        completion_ids, completions = list(batch.completion_ids), list(completions)
        logprobs = None if logprobs is None else list(logprobs)
        injected = batch.injected(self.accelerator.process_index)
        for row, choice in injected.items():
            completion_ids[row] = list(choice.completion.token_ids)
            completions[row] = self._decode(batch.rows[row]["prompt"], prompt_ids[row], completion_ids[row])
            if logprobs is not None:  # unknown to the engine: TRL's own ratio becomes 1
                logprobs[row] = [float("nan")] * len(completion_ids[row])
            first_row = row - row % batch.num_generations
            for column, value in extra_logs[first_row, choice.completion.token_ids].items():
                if len(self._pending_extra_logs.get(column, ())) == batch.num_rows:
                    self._pending_extra_logs[column][row] = value
        if batch.injection.injected:
            probed = list(injected)[:NUM_PROBED]
            self._last_injected = [prompt_ids[row] for row in probed], [completion_ids[row] for row in probed]
        self._metrics["train"]["guidance/selection_time"].append(time.perf_counter() - started)
        return completion_ids, completions, logprobs

    def _sampled_batch(self, prompt_ids) -> SampledBatch:
        """What the choice of expert completions depends on."""
        batch, scale = self._batch, self._reward_scale
        rewards_per_func = batch.sampled_rewards_per_func
        return SampledBatch(
            batch.rows,
            prompt_ids,
            batch.completion_ids,
            rewards=scale.totals(rewards_per_func).cpu(),
            is_correct=scale.is_correct(rewards_per_func, scale.span(rewards_per_func)).cpu(),
            is_guided=self._was_guided().cpu(),
            step=self.state.global_step,
            process_index=self.accelerator.process_index,
        )

    def _warn_of_overlong(self, injection: Injection) -> None:
        if injection.num_overlong and self.args.overlong_expert_completions == "drop":
            self._warn_once(
                "max_completion_length",
                f"Of {injection.num_read} expert completions read for a batch, {injection.num_overlong} had more than max_completion_length="
                f"{self.max_completion_length} tokens, and were dropped. Raise it, or set overlong_expert_completions='truncate'.",
            )

    def _score_completions(self, prompt_ids, extra_logs: dict, pairs, num_rows: int) -> torch.Tensor:
        """Rewards of expert completions for rows of this process, by the user's functions, on the CPU. Every process scores `num_rows` rows: TRL gathers
        them. What the functions log of a completion comes into `extra_logs`; what they measure means the policy, and is left out."""
        batch = self._batch
        rows, token_ids = [row for row, _ in pairs], [list(completion.token_ids) for _, completion in pairs]
        missing = num_rows - len(rows)
        rows += [rows[-1] if rows else 0] * missing
        token_ids += [token_ids[-1] if token_ids else batch.completion_ids[0]] * missing
        inputs = [batch.rows[row] for row in rows]
        prompts = [example["prompt"] for example in inputs]
        completions = [
            self._decode(prompt, prompt_ids[row], ids)
            for prompt, row, ids in zip(prompts, rows, token_ids, strict=True)
        ]
        pending: tuple[dict[str, list], dict[str, list]] = self._pending_extra_logs, self._pending_metrics
        self._pending_extra_logs: dict[str, list] = defaultdict(list)
        self._pending_metrics: dict[str, list] = defaultdict(list)
        try:
            rewards = self._rewards(inputs, prompts, completions, token_ids)
            for number, (row, completion) in enumerate(pairs):
                extra_logs[row, completion.token_ids] = {
                    column: values[number]
                    for column, values in self._pending_extra_logs.items()
                    if len(values) == num_rows
                }
        except Exception as error:
            error.add_note(
                f"It was given {num_rows} expert completions of any groups: a function that compares the rollouts of a group cannot score them."
            )
            raise
        finally:
            self._pending_extra_logs, self._pending_metrics = pending
        return rewards[self.accelerator.process_index * num_rows :][: len(pairs)].cpu()

    def _decode(self, prompt, prompt_ids: list[int], token_ids: list[int]):
        """A completion as TRL shows those that it has generated itself."""
        if isinstance(prompt, str):
            return self._tokenizer.decode(token_ids, skip_special_tokens=True)
        if any(getattr(self._tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
            return [parse_response(self._tokenizer, token_ids, prefix=prompt_ids)]
        return [{"role": "assistant", "content": self._tokenizer.decode(token_ids, skip_special_tokens=True)}]

    def _policy_logps(self, prompt_ids, completion_ids) -> list[torch.Tensor]:
        """log pi_theta of each token of given completions, without dropout, as the loss computes it otherwise. All processes call it together,
        each with rows of its own, or none."""
        if not prompt_ids:
            with self.whole_policy():
                return []
        pad_token_id, device = self._tokenizer.pad_token_id, self.accelerator.device
        prompts, prompt_mask = left_pad(prompt_ids, pad_token_id, device)
        texts = [torch.tensor(ids, device=device) for ids in completion_ids]
        completions = pad_sequence(texts, batch_first=True, padding_value=pad_token_id)
        completion_mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        with self.whole_policy(), torch.no_grad(), evaluation_mode(self.model):
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([prompts, completions], dim=1),
                torch.cat([prompt_mask, completion_mask], dim=1),
                completions.size(1),
                batch_size=self.args.per_device_train_batch_size,
            )
        return [row[: len(ids)].cpu() for row, ids in zip(logps, completion_ids, strict=True)]

    def _log_last_injected(self) -> None:
        """What the update has made of the completions that were injected before it: their log-probability now."""
        last, self._last_injected = self._last_injected, None
        if last is not None:
            logps = torch.cat([torch.zeros(0), *self._policy_logps(*last)])
            sums = torch.tensor([logps.double().sum(), logps.numel()], dtype=torch.float64)
            total, count = self._sum_over_processes(sums).tolist()
            self._metrics["train"]["guidance/injection/logp_after"].append(total / count)

    def _behaviour_logps(self, output: dict) -> torch.Tensor:
        """log pi_b of the tokens of injected rows: from the dataset, else as the expert model scores them."""
        values = torch.zeros(output["completion_ids"].shape, device=self.accelerator.device)
        injected = self._batch.injected(self.accelerator.process_index)
        unknown = [row for row, choice in injected.items() if choice.completion.logps is None]
        prompts = [output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist() for row in unknown]
        texts = [injected[row].completion.token_ids for row in unknown]
        scored = self._expert_logps(prompts, texts) if unknown else []
        check_scored(scored, [self._batch.rows[row]["prompt"] for row in unknown])
        known = {
            row: choice.completion.logps for row, choice in injected.items() if choice.completion.logps is not None
        }
        for row, logps in {**known, **dict(zip(unknown, scored, strict=True))}.items():
            values[row, : len(logps)] = torch.as_tensor(logps, dtype=values.dtype)
        return values

    def _expert_logps(self, prompt_ids, completion_ids) -> list[torch.Tensor]:
        """log pi* of each token of given completions."""
        if isinstance(self.expert_model, ExpertServer):
            return self.expert_model.completion_logps(prompt_ids, completion_ids)
        with self._expert_at_hand():
            return completion_logps(self.expert_model, prompt_ids, completion_ids, temperature=self.temperature)

    # ---- Rewards and advantages --------------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, *args, **kwargs):
        batch = self._batch
        self._log_columns(len(inputs))
        if batch is not None and batch.injection is not None:
            rewards_per_func = batch.rewards_per_func
        else:
            rewards_per_func = self._rewards(inputs, *args, **kwargs)
            if batch is not None:
                batch.sampled_rewards_per_func = batch.rewards_per_func = rewards_per_func
        self._last_rewards = rewards_per_func
        return rewards_per_func

    def _rewards(self, *args, **kwargs) -> torch.Tensor:
        """TRL's, by function; while guidance is on, of functions that are watched, so that no reward that is none gets into a baseline."""
        if not self._settings_in_use:
            return super()._calculate_rewards(*args, **kwargs)
        funcs, names = self.reward_funcs, self.reward_func_names
        self.reward_funcs: list = [
            func if isinstance(func, torch.nn.Module) else watched(func, name, is_async_callable(func))
            for func, name in zip(funcs, names, strict=True)
        ]
        try:
            rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        finally:
            self.reward_funcs = funcs
        for func, name, rewards in zip(funcs, names, rewards_per_func.unbind(1), strict=True):
            if isinstance(func, torch.nn.Module):
                check_model_rewards(rewards, name)
        return rewards_per_func

    def _log_columns(self, num_rows: int) -> None:
        """Mark guided and injected rows in the completions table; also where there are none, since a column has an entry for every row."""
        batch = self._batch
        injected = batch.injected(self.accelerator.process_index) if batch else {}
        if self.num_guided_generations:
            guided, shares = ([False] * num_rows, [0.0] * num_rows)
            if batch:
                guided, shares = batch.is_guided, batch.expert_drawn_shares()
            self._log_completion_extra("guided", [flag and row not in injected for row, flag in enumerate(guided)])
            self._log_completion_extra(
                "expert_drawn", [0.0 if row in injected else share for row, share in enumerate(shares)]
            )
        if self.num_injected_completions:
            choices = [injected.get(row) for row in range(num_rows)]
            self._log_completion_extra("injected", [choice is not None for choice in choices])
            self._log_completion_extra("injection_source", [c.completion.source if c else None for c in choices])
            self._log_completion_extra("injection_selector", [c.selector if c else None for c in choices])
            self._log_completion_extra("injection_score", [c.score if c else None for c in choices])

    def _was_guided(self) -> torch.Tensor:
        """Which rollouts of all processes were guided, by group."""
        flags = torch.tensor(self._batch.is_guided, device=self.accelerator.device)
        return flags.repeat(self.accelerator.num_processes).view(-1, self.num_generations)

    def _apply_guidance(self, output: dict, batch: GuidedBatch) -> dict:
        """Replace TRL's advantages, and what it logged of this batch, by those of mixed-policy GRPO (Eq. 10-11) with injected rows."""
        is_guided = self._was_guided()
        is_injected = torch.zeros_like(is_guided)
        for choice in batch.injection.injected if batch.injection else ():
            is_injected.view(-1)[choice.row] = True
        before, now = batch.sampled_rewards_per_func, batch.rewards_per_func
        rewards = self._reward_scale.of_batch(before, now, is_guided, is_injected)
        if batch.num_guided or is_injected.any():
            advantages = mixed_group_advantages(
                rewards.sampled,
                rewards.now,
                is_guided,
                is_injected,
                batch.coef,
                rewards.span,
                scale_rewards=self.scale_rewards,
                injection_advantage=self.args.injection_advantage,
            ).flatten()
            own_rows = slice(self.accelerator.process_index * batch.num_rows, None)
            local = [values.flatten()[own_rows][: batch.num_rows] for values in (advantages, is_guided, is_injected)]
            self._label_rows(output, batch, *local)
            self._logs["advantages"].extend(advantages.tolist())  # as many as the deque holds
        divides = bool(batch.num_guided) or self.args.injection_advantage == "positive_excess"
        problems = self._reward_scale.problems(before, rewards.sampled, rewards.was_correct, divides=divides)
        for setting, problem in problems.items():
            self._warn_once(setting, problem)
        self._log_batch(batch, rewards)
        return output

    def _warn_once(self, setting: str, problem: str) -> None:
        """Warn once, from the main process, of something that all processes know."""
        if self.accelerator.is_main_process and setting not in self._warned_of:
            self._warned_of.add(setting)
            warnings.warn(problem, stacklevel=3)

    def _label_rows(self, output: dict, batch: GuidedBatch, advantages, is_guided, is_injected) -> None:
        """What the loss has to know of the rows of this process."""
        output["advantages"] = advantages
        if batch.num_guided:
            output["is_guided"] = is_guided & ~is_injected
        if batch.num_guided and self.args.guided_importance_correction != "none":
            seq = output["completion_ids"].size(1)
            weights = batch.importance_weights(
                seq, self.args.guided_importance_correction, self.args.importance_ratio_max
            )
            weights = torch.where(is_injected.unsqueeze(1), 1.0, weights.to(advantages.device))
            output["advantages"] = advantages.unsqueeze(1) * weights
        if batch.injection and batch.injection.injected:  # of any process: the loss adds up over all of them
            output["is_injected"] = is_injected
            if self.args.injection_needs_expert_logps:
                output["behaviour_per_token_logps"] = self._behaviour_logps(output)

    # ---- Loss --------------------------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        is_labelled = "is_guided" in inputs or "is_injected" in inputs
        is_measured = self._settings_in_use and self._guidance_coef() > 0
        if not (is_labelled or is_measured) or not self.model.training:
            return super()._compute_loss(model, inputs)
        bound = self._loss_inputs = dict(inputs)  # a copy: the batch itself may be used again
        try:
            loss = super()._compute_loss(model, self._loss_inputs)
        finally:
            self._loss_inputs = None
        sums = LossSums(*self._sum_over_processes(self._loss_sums).tolist())
        if sums.num_invalid:
            refuse_update(
                bound["is_finite"], self._tokenizer.batch_decode(bound["prompt_ids"], skip_special_tokens=True)
            )
        metrics = self._metrics["train"]
        if self.num_guided_generations or "is_injected" in inputs:
            metrics["entropy"][-1] = sums.mean_entropy
        self._update_sums = self._update_sums.plus(sums)
        if self.accelerator.sync_gradients:  # the last micro-batch of the update
            for name, value in (self._update_sums.injected_metrics if self._update_sums.num_injected else {}).items():
                metrics[name].append(value)
            self._update_sums = LossSums()
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._loss_inputs is not None:
            args, is_guiding = self.args, bool(self.num_guided_generations)
            self._loss_sums = bind_to_policy(
                self._loss_inputs,
                logps.detach(),
                entropies.detach(),
                histogram=self._threshold.histogram if is_guiding else None,
                needs_entropies=is_guiding and args.guidance_weighting != "constant",
                correction=args.injection_correction,
                gamma=args.shaping_gamma,
                max_ratio=args.importance_ratio_max,
            )
        return logps, entropies, aux_loss

    # ---- Logs --------------------------------------------------------------------------------------------------------------------------

    def _log_batch(self, batch: GuidedBatch, rewards: BatchRewards) -> None:
        """TRL's reward and length metrics of this batch, restricted to the policy's rollouts, and the metrics of guidance."""
        device, metrics = self.accelerator.device, self._metrics["train"]
        own = ~rewards.is_guided.flatten()
        if batch.num_guided or rewards.is_injected.any():
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            shape = torch.tensor([[len(ids), ids[-1] not in ends] for ids in batch.completion_ids], device=device)
            lengths, is_truncated = self.accelerator.gather(shape)[own].unbind(1)
            for name, value in policy_metrics(
                batch.sampled_rewards_per_func[own],
                rewards.sampled.flatten()[own].view(-1, batch.num_on_policy),
                self.reward_func_names,
                lengths,
                is_truncated.bool(),
                self.scale_rewards,
            ).items():
                metrics[name][-1] = value

        news = reward_metrics(rewards)
        if batch.rollout is not None:
            news |= self._rollout_metrics(batch.rollout)
        if batch.injection is not None:
            news |= self._injection_metrics(batch.injection, rewards.span)
        for name, value in news.items():
            metrics[name].append(value)

    def _rollout_metrics(self, rollout: GuidedRollout) -> dict[str, float]:
        sums = rollout_sums(rollout)
        totals = self._sum_over_processes(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
        sums = dict(zip(sums, totals, strict=True))
        metrics = rollout_metrics(sums)
        # With "initial", the rollout knows that policy's probabilities and not those of the trained one; not scored, not all of the mixture's.
        if self.args.mixture_policy == "current" and rollout.is_scored:
            p99 = torch.tensor(importance_ratio_p99(rollout), device=self.accelerator.device)
            metrics |= importance_metrics(sums, self.accelerator.gather(p99).max().item())
        return metrics

    def _injection_metrics(self, injection: Injection, span: torch.Tensor) -> dict[str, float]:
        is_accepted: list[bool] = []
        if injection.choices:
            given = torch.tensor([choice.rewards_per_func for choice in injection.choices])
            groups = [choice.group for choice in injection.choices]
            is_accepted = self._reward_scale.is_correct(given, span.cpu()[groups]).flatten().tolist()
        num_groups = len(span)
        metrics = injection_metrics(injection, is_accepted, num_groups, num_groups * self.num_generations)
        for learner in self._injector.selector.learners():
            if learner.model.num_outcomes:
                metrics["guidance/injection/calibration_error"] = learner.model.calibration_error()
        return metrics

    def _batch_as_logged(self, num_rows: int, batch: GuidedBatch | None) -> LoggedBatch:
        """What TRL's logs hold of this batch, with what they do not: who drew the tokens. Without a `batch`, all rows are on-policy."""
        logs = self._logs
        rewards_per_func = {name: list(values) for name, values in logs["rewards"].items()}
        return LoggedBatch(
            prompts=list(logs["prompt"]),
            completions=list(logs["completion"]),
            rewards=self._reward_scale.totals(self._last_rewards).flatten().tolist(),
            rewards_per_func=rewards_per_func,
            advantages=list(logs["advantages"]),
            num_generations=self.num_generations,
            entropy_threshold=batch.entropy_threshold if batch else None,
            guidance_coef=batch.coef if batch else self._guidance_coef(),
            extra={column: list(values) for column, values in logs["extra"].items()},
            num_rows=num_rows,
            rollout=batch.rollout if batch else None,
            guided_rows=batch.guided_rows if batch else [],
        )

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        batch = self._logged_batch
        if batch is None or not self.model.training:
            return
        self._logged_batch = None
        records = gather_object(batch.token_records(self._tokenizer.decode))
        if self.accelerator.is_main_process:
            render = partial(self._render, add_generation_prompt=True)
            write_rollouts(rollout_rows(batch, self.state.global_step, records, render), self.args.output_dir)

    # ---- Checkpoints -------------------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As [`~transformers.Trainer.train`], but `resume_from_checkpoint=True` goes on from the last checkpoint that was written to its
        end, and one that was not is refused. Leaves `training_dynamics.png` in the output folder, where matplotlib is installed."""
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        self._evaluated_at, self._begun = evaluated_at(self.args.output_dir), time.time()
        self._resumed_from = str(resume_from_checkpoint) if resume_from_checkpoint else None
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.is_world_process_zero() and (problem := self._save_picture()):
            logger.warning("No picture of the training dynamics: %s", problem)
        return output

    def training_step(self, *args, **kwargs):
        """One micro-batch: rollouts, rewards, loss. What goes wrong in it says where to go on."""
        try:
            return super().training_step(*args, **kwargs)
        except Exception as error:
            error.add_note(
                way_on(
                    self.args.output_dir, self.state.global_step, since=self._begun, resumed_from=self._resumed_from
                )
            )
            raise

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # `trainer_state.json`, which the main process writes next, says that the checkpoint is whole: that of all processes.
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        state = self._threshold.state_dict() if self.num_guided_generations else {}
        if self.num_injected_completions:
            state["injection"] = self._injector.state_dict()
        if state and self.args.should_save:
            write_state(Path(output_dir), state)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._settings_in_use:
            return
        fresh = []
        with saved_state(Path(checkpoint)) as state:
            if self.num_guided_generations and "entropy_threshold" not in (state or {}):
                fresh.append("threshold")
            elif self.num_guided_generations:
                self._threshold.load_state_dict(state, is_main_process=self.accelerator.is_main_process)
            if self.num_injected_completions and "injection" not in (state or {}):
                fresh.append("memory of injections")
            elif self.num_injected_completions:
                self._injector.load_state_dict(state["injection"])
        if fresh:
            what = f"has no {STATE_FILE}: it" if state is None else f"holds no {' and no '.join(fresh)}: it"
            reason = "guidance" if state is None else "this kind of guidance"
            warnings.warn(
                f"{checkpoint} {what} was written without {reason}, whose {' and '.join(fresh)} starts fresh.",
                stacklevel=2,
            )

    # ---- Model card and Hub ------------------------------------------------------------------------------------------------------------

    def create_model_card(self, *args, **kwargs):
        """TRL's card, with the picture of the training dynamics beside it; of a guided run, also what guidance was, and what it did.
        TRL calls it with each checkpoint, too, so that whatever goes wrong in our part is only told."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        try:
            self._save_picture()
            if self._settings_in_use:
                extend_card(self.args.output_dir, self._training_run())
                if evaluated_at(self.args.output_dir) != self._evaluated_at:
                    add_evaluation(self.args.output_dir)
                elif self._evaluated_at is not None:
                    self._warn_once(
                        "evaluation",
                        f"The results in {self.args.output_dir}/evaluation are of the weights with which this training began: they are not in the "
                        "model card. Evaluate again.",
                    )
        except Exception as error:  # noqa: BLE001  no card is worth a training run
            warnings.warn(f"The model card says less than it could: {type(error).__name__}: {error}", stacklevel=2)

    def _save_picture(self) -> str | None:
        """Save the picture of the training dynamics, unless a checkpoint is being pushed: what is on its way must not change. Returns what
        kept it from being drawn."""
        push = getattr(self, "push_in_progress", None)
        if push is not None and not push.is_done():
            return None
        return save_training_dynamics(self.state.log_history, self.args.output_dir)

    def _training_run(self) -> TrainingRun:
        """What the card tells of this run."""
        injector = self._injector if self.num_injected_completions else None
        return TrainingRun(
            self.args,
            self.state.log_history,
            steps=self.state.global_step,
            max_steps=self.state.max_steps,
            rewards=dict(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)),
            expert=self.expert_model,
            sampler=type(self._sampler).__name__ if self.num_guided_generations else None,
            trigger=injector.trigger.name if injector else None,
            selector=injector.selector.name if injector else None,
            has_chat_template=getattr(self._tokenizer, "chat_template", None) is not None,
            grpo_citation=super()._paper["citation"],
        )

    def push_to_hub(self, *args, **kwargs):
        """Push model, tokenizer, card and picture; of a guided run, the logs behind the card's figures as well."""
        if self._settings_in_use:
            self.save_state()
        return super().push_to_hub(*args, **kwargs)
