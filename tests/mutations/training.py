"""Faults in what a batch collects, in the threshold, and in the trainer."""

from tests.mutations.mutation import mutations

GUIDED, INJECTED = ("test_trainer.py",), ("test_injected_training.py",)

TRAINING = [
    *mutations(
        "guided_batch.py",
        ("[False] * self.num_on_policy + [True] * self.num_guided", "[True] * self.num_guided + [False] * self.num_on_policy", "the first rows count as guided"),
        ("next(sources[is_guided])", "next(sources[not is_guided])", "rows of the two kinds swapped"),
        ("if first <= choice.row < first", "if first < choice.row < first", "the first row of a process is never injected"),
        ("zip(self.guided_rows, self", "zip(range(len(self.guided_rows)), self", "weights of guided rows on others"),
        ("[0.0] * (self.num_rows - len(guided)), guided", "guided, [0.0] * (self.num_rows - len(guided))", "shares of the expert on the wrong rows"),
    ),
    *mutations(
        "threshold.py",
        ("max(measured, self.floor)", "min(measured, self.floor)", "the floor is a ceiling"),
        ("            self.histogram = EntropyHistogram(self.vocab_size)\n        return", "        return", "entropies of all batches so far"),
        ("counts=self.sum_over_processes(self.histogram.counts)", "counts=self.histogram.counts", "each process has a threshold of its own"),
        ("if is_main_process:", "if True:", "all processes take over the counts of all"),
        ("counts = self.sum_over_processes(self.histogram.counts)", "counts = self.histogram.counts", "the counts of one process are saved"),
    ),
    *mutations(
        "trainer.py",
        ("not self._settings_in_use or not self.model.training", "not self._settings_in_use", "evaluation is guided"),
        tests=("test_trainer.py::test_evaluation_is_never_guided",),
    ),
    *mutations(
        "trainer.py",
        ("(self.state.max_steps)(self.state.global_step)", "(self.state.max_steps)(0)", "alpha never falls"),
        tests=("test_trainer.py::test_alpha_ends_guidance",),
    ),
    *mutations(
        "checks.py",
        ("args.num_iterations // args.gradient_accumulation_steps", "args.num_iterations", "micro-batches are taken for steps"),
        ("second < max_steps and args", "args", "a run that ends with its first batch is not named"),
        ("args.steps_per_generation * args.num_iterations //", "args.steps_per_generation //", "iterations are left out"),
        tests=("test_trainer.py::test_a_run_that_is_never_guided_is_named",),
    ),
    *mutations(
        "trainer.py",
        ("rollout.take(self._batch.guided_rows)", "rollout.take(range(len(self._batch.guided_rows)))", "the record of the wrong rows"),
        ("batch.coef,\n                rewards.span", "1.0,\n                rewards.span", "alpha is not applied in training"),
        tests=("test_trainer.py::test_the_last_rows_of_each_group_are_guided_and_weighed_by_equations_10_and_11",),
    ),
    *mutations(
        "trainer.py",
        ("[[float(\"nan\")] * len(ids) for ids in guided_ids]", "[[0.0] * len(ids) for ids in guided_ids]", "the engine is said to have drawn guided rows"),
        ("not (self.use_vllm or self", "not (self", "the sampler draws on-policy rows in place of the engine"),
        tests=("test_injected_training.py::test_the_ratio_of_an_inference_engine_is_1_on_guided_rows",),
    ),
    *mutations(
        "trainer.py",
        ("temperature=self.temperature,\n                **rows", "temperature=1.0,\n                **rows", "guided rows at temperature 1"),
        tests=("test_trainer.py::test_the_record_agrees_with_the_forward_of_the_loss",),
    ),
    *mutations(
        "trainer.py",
        ("eos_token_ids=self.eos_token_ids,\n                temp", "eos_token_ids=(),\n                temp", "guided rows do not end"),
        tests=("test_trainer.py::test_with_w_1_the_expert_answers",),
    ),
    *mutations(
        "trainer.py",
        ("advantages.unsqueeze(1) * weights", "advantages.unsqueeze(1)", "the correction is not applied"),
        tests=("test_trainer.py::test_the_correction_multiplies_guided_tokens_by_pi_theta_over_pi_mix",),
    ),
    *mutations(
        "assembly.py",
        ('args.mixture_policy == "initial"', "False", "the initial policy is the current one"),
        tests=("test_trainer.py::test_the_initial_policy_stays_in_the_mixture",),
    ),
    *mutations(
        "loss_inputs.py",
        (' & ~inputs.get("is_guided", nobody).unsqueeze(1)', "", "guided tokens move the threshold"),
        ("update(entropies, on_policy)", "update(entropies, mask)", "the threshold is that of all rows"),
        tests=("test_trainer.py::test_guided_rows_do_not_move_the_threshold",),
    ),
    *mutations(
        "assembly.py",
        ("max_weight=args.guidance_weight_max,", "max_weight=1.0,", "the cap of w does not reach the sampler"),
        tests=("test_trainer.py::test_a_capped_weight_bounds_the_ratio",),
    ),
    *mutations(
        "trainer.py",
        ("own = ~rewards.is_guided.flatten()", "own = torch.ones_like(rewards.is_guided.flatten())", "metrics mean all rows"),
        ("metrics[name][-1] = value", "metrics[name].append(value)", "TRL's own values stay in its metrics"),
        tests=("test_trainer.py::test_trls_metrics_mean_the_policy",),
    ),
    *mutations(
        "trainer.py",
        ("slice(self.accelerator.process_index * batch.num_rows, None)", "slice(0, None)", "every process takes the first one's advantages"),
        tests=("test_trainer.py::test_two_processes_agree_on_threshold_and_parameters",),
    ),
    *mutations(
        "trainer.py",
        ('output["is_guided"] = is_guided & ~is_injected', 'output["is_guided"] = is_guided', "an injected row still counts as guided"),
        ("torch.where(is_injected.unsqueeze(1), 1.0, weights.to(advantages.device))", "weights.to(advantages.device)", "an injected row is weighed by the rollout it replaced"),
        tests=("test_injected_training.py::test_both_sources_in_one_group",),
    ),
    *mutations(
        "trainer.py",
        ("span.cpu()[groups]", "span.cpu()[:1].expand(len(groups), 1)", "completions are judged by the range of the first group"),
        tests=(
            "test_injected_training.py::test_completions_are_accepted_by_the_range_of_their_group",
        ),
    ),
    *mutations(
        "trainer.py",
        ("list(choice.completion.token_ids)\n            completions[row]", "list(choice.completion.token_ids[:-1])\n            completions[row]", "the end token is dropped"),
        tests=("test_injected_training.py::test_the_worst_row_makes_room_and_the_others_keep_their_advantages",),
    ),
    *mutations(
        "guided_batch.py",
        ("self.rewards_per_func[choice.row] = torch.tensor(choice.rewards_per_func)", "pass", "injected rows keep the reward of what they replaced"),
        tests=("test_injected_training.py::test_the_worst_row_makes_room_and_the_others_keep_their_advantages",),
    ),
    *mutations(
        "reward_scale.py",
        ("self.totals(before),\n", "self.totals(now),\n", "injected rewards are in the baseline"),
        tests=("test_injected_training.py::test_the_worst_row_makes_room_and_the_others_keep_their_advantages",),
    ),
    *mutations(
        "reward_scale.py",
        ("was_correct=self.is_correct(before, span)", "was_correct=self.is_correct(now, span)", "a right rollout that gave way is forgotten"),
        tests=("reporting/test_metrics.py::test_what_rescues_a_group",),
    ),
    *mutations(
        "trainer.py",
        ("logps.detach(),", "logps,", "the ratio of injected rows has no gradient"),
        ("self._loss_inputs = dict(inputs)", "self._loss_inputs = inputs", "weights pile up from iteration to iteration"),
        tests=("test_injected_training.py::test_the_gradient_of_policy_shaping_is_that_of_f_pi_times_a_in_every_iteration",),
    ),
    *mutations(
        "loss_inputs.py",
        ('inputs["old_per_token_logps"] = torch.where(is_injected, logps, old)', "pass", "the clip acts on injected rows"),
        ("advantages * torch.where(is_injected, weights, 1.0)", "advantages", "policy shaping is not applied"),
        tests=("test_injected_training.py::test_the_gradient_of_policy_shaping_is_that_of_f_pi_times_a_in_every_iteration",),
    ),
    *mutations(
        "loss_inputs.py",
        ("advantages * torch.where(is_injected, weights, 1.0)", "advantages * weights.mean()", "on-policy rows are shaped"),
        tests=("test_injected_training.py::test_sequence_level_ratios_take_one_weight_per_completion", "test_injected_training.py::test_the_share_of_the_gradient_and_the_log_probs_are_those_of_the_loss"),
    ),
    *mutations(
        "loss_inputs.py",
        ("on_policy = mask & ~is_injected & ~", "on_policy = mask & ~", "injected tokens count in the policy's entropy"),
        tests=("test_injected_training.py::test_entropy_means_the_policy",),
    ),
    *mutations(
        "assembly.py",
        ('keep_failed=args.injection_advantage == "group"', "keep_failed=True", "wrong completions come in"),
        tests=("test_injected_training.py::test_a_wrong_completion_is_never_reinforced",),
    ),
    *mutations(
        "trainer.py",
        ("completion_ids, temperature=self.temperature)", "completion_ids)", "the expert scores at temperature 1"),
        tests=("test_injected_training.py::test_behaviour_log_probs_are_scored_by_the_expert_where_they_are_not_known",),
    ),
    *mutations(
        "trainer.py",
        ("= left_pad(prompt_ids, pad_token_id, device)", "= (each.flip(1) for each in left_pad([ids[::-1] for ids in prompt_ids], pad_token_id, device))", "padding between prompt and completion"),
        tests=("test_injected_training.py::test_log_probs_of_given_completions_are_those_of_each_by_itself",),
    ),
    *mutations(
        "assembly.py",
        ("token != tokenizer.eos_token_id", "token == tokenizer.eos_token_id", "another end token is appended"),
        tests=("test_injected_training.py::test_the_tokenizers_own_end_token_is_appended",),
    ),
    *mutations(
        "trainer.py",
        ("if self.num_guided_generations and coef > 0 else None", "if self.num_guided_generations else None", "rows count as guided after alpha has ended"),
        tests=("reporting/test_card.py::test_shares_of_rollouts_count_every_batch",),
    ),
    *mutations(
        "trainer.py",
        ("if coef == 0 or not (num_guided", "if not (num_guided", "completions come in after alpha has ended"),
        tests=("test_injected_training.py::test_alpha_ends_injection",),
    ),
    *mutations(
        "trainer.py",
        ("if self.accelerator.sync_gradients:", "if True:", "ratios of micro-batches are averaged"),
        tests=("test_injected_training.py::test_metrics_of_an_update_do_not_depend_on_its_micro_batches",),
    ),
    *mutations(
        "trainer.py",
        ("        if sums.num_invalid:", "        if False:", "an update with NaN"),
        tests=("test_numerics.py",),
    ),
    *mutations(
        "loss_inputs.py",
        ("is_finite &= entropies.isfinite()", "pass", "the threshold of a law with an entropy of NaN"),
        ('(~inputs["is_finite"]).sum()', 'inputs["is_finite"].sum()', "the wrong rows stop training"),
        tests=("test_numerics.py",),
    ),
    *mutations(
        "loss_inputs.py",
        ("old[tokens].double().sum()", "logps[tokens].double().sum()", "the log-probability of injected rows after an update"),
        ("size[mask].sum()", "size.sum()", "padding has a share of the gradient"),
        ("part / whole if whole else math.nan", "part", "sums are logged as means"),
    ),
    *mutations(
        "boxed_answers.py",
        ('drops_units and getattr(gold[0], "free_symbols", True)', "False", "a variable at the end passes for a unit"),
        ("for drops_units in (False, True):", "for drops_units in (False,):", "an answer with a unit is wrong"),
        (" and not _differ(gold[0], said[0])", "", "all small numbers are equal"),
        ("for pattern, replacement in REWRITTEN:", "for pattern, replacement in ():", "answers are read as they are written"),
        ("if _plain(right) == _plain(answer):", "if False:", "words in a text are others than words"),
    ),
    *mutations(
        "reward_scale.py",
        ("deciding = self.names.index(self.correctness_reward)", "deciding = 0", "the first reward function decides what is right"),
        ("given.new_full((len(given), 1), self.reward_range)", "given.new_full((len(given), 1), 1.0)", "the range that the user gives is not used"),
        ("for part in rewards_per_func], dim=1)", "for part in rewards_per_func[:1]], dim=1)", "functions that scored injected rows alone have no part in the range"),
        ("if weight and len(outside)", "if len(outside)", "a function that does not count is complained of"),
        ("or not len(scored) or not is_correct[is_scored].all()", "or not len(scored) or not is_correct.all()", "rows without rewards count as wrong"),
        ("(divides or is_by_total)", "is_by_total", "no word on a range that advantages are divided by"),
    ),
]  # fmt: skip
