"""Faults in the samplers."""

from tests.mutations.mutation import mutations

LAW = ("sampling/test_record.py", "sampling/test_law.py")
MIXED = ("sampling/test_on_policy_rows.py",)

SAMPLING = [
    *mutations(
        "sampling/draw.py",
        ("right=True", "right=False", "a token of probability 0 may be drawn"),
        ("cdf, uniform * cdf[..., -1:]", "cdf, uniform", "what does not sum to 1 is not normalised"),
        ("(uniform * cdf[..., -1:] - end", "(uniform - end", "the same within a block"),
        ("- end + width", "- end", "the position within a block is that behind it"),
        (".clamp(0, BELOW_1)", "", "rounding leads before the block"),
        ("blocks.sum(-1, dtype=torch.float64)", "blocks.sum(-1)", "blocks are summed up in float32"),
        ("probs.double().cumsum(-1)", "probs.cumsum(-1).double()", "the cumulative sum is rounded to float32"),
    ),
    *mutations(
        "sampling/sampler.py",
        ("self.max_weight)\n        if", "1.0)\n        if", "w is not capped"),
        ("positions == 0", "positions <= 1", "the expert draws the first two tokens"),
        ("weight * live.is_guided", "weight", "on-policy rows have a weight"),
        ("min(*heads, vocab_size or heads[0])", "max(*heads, vocab_size or heads[0])", "ids that one head lacks"),
        tests=("sampling/test_sampler.py", "sampling/test_models.py", *LAW, *MIXED),
    ),
    *mutations(
        "functional/mixed_policy.py",
        (".float() / temperature)", ".float() * temperature)", "the temperature multiplies"),
        (
            ".float() / temperature).softmax(-1)",
            ".float()).softmax(-1) / temperature",
            "the temperature comes after the softmax",
        ),
        ("probs.sum(-1, keepdim=True, dtype=torch.float64).float()", "1.0", "laws over many tokens do not sum to 1"),
        tests=("sampling/test_sampler.py", "sampling/test_models.py", *LAW, *MIXED),
    ),
    *mutations(
        "functional/mixed_policy.py",
        ("(logits.float() /", "(logits /", "laws in bfloat16"),
        tests=("sampling/test_numerics.py::test_laws_are_taken_in_float32",),
    ),
    *mutations(
        "sampling/speculative.py",
        (
            "ACCEPT) >= acceptance",
            "ACCEPT) < acceptance",
            "accepted where it should be rejected",
        ),
        ("residual(policy, expert)", "expert", "replaced from the expert, not from the residual"),
        ("REPLACE)[guided]", "DRAFT)[guided]", "the replacement uses the draft's number again"),
        (
            "(1 - weight) * policy_prob + weight",
            "weight * policy_prob + (1 - weight)",
            "w and 1 - w swapped in the record",
        ),
        ("cumsum(1) <= is_rejected", "cumsum(1) <= 1", "drafts behind a rejected one stand"),
        ("expert_drawn=is_replaced", "expert_drawn=is_tested", "every token counts as the expert's"),
        ("next_position(position_ids)", "next_position(position_ids - 1)", "drafts share one position"),
        (
            "mask = torch.cat([mask, torch.ones_like(token)], dim=1)",
            "mask = torch.cat([mask, torch.zeros_like(token)], dim=1)",
            "drafts do not see the drafts before them",
        ),
        ("law = self._probs(logits, temperature)", "law = self._probs(logits, 1.0)", "drafts at temperature 1"),
        tests=LAW,
    ),
    *mutations(
        "sampling/speculative.py",
        (
            "policy_prob.clamp(min=torch.finfo(policy_prob.dtype).tiny)",
            "policy_prob",
            "log 0 of what the policy cannot draw",
        ),
        tests=("sampling/test_numerics.py::test_a_token_that_a_model_forbids_comes_from_the_other_alone",),
    ),
    *mutations(
        "sampling/speculative.py",
        ("[is_tested.sum(), ", "[torch.tensor(drafts.numel()), ", "drafts that were not come to teach the lookahead"),
        tests=("sampling/test_lookahead.py",),
    ),
    *mutations(
        "sampling/speculative.py",
        ("live.num_guided * num", "len(live) * num", "drafts of on-policy rows are counted"),
        tests=MIXED,
    ),
    *mutations(
        "sampling/coin.py",
        ("ACCEPT) < weight", "ACCEPT) > weight", "the coin is turned over"),
        ("num_guided] - distance", "num_guided] - distance + 1", "probabilities are paid one position late"),
        ("is_owed = torch.cat", "is_owed = 0 * torch.cat", "what the policy drew by itself is never paid"),
        (" & is_owed.any(1)", " & is_owed.all(1)", "a row leaves with debts"),
        ("1 - policy_prob / expert_prob", "policy_prob / expert_prob", "the wrong tokens count as the expert's"),
        (
            "(1 - weight) * policy_logp.exp() + weight * expert_prob",
            "weight * policy_logp.exp() + (1 - weight) * expert_prob",
            "w and 1 - w swapped in what is paid",
        ),
        tests=("sampling/test_coin.py", *LAW),
    ),
    *mutations(
        "sampling/coin.py",
        (
            "policy_prob.clamp(min=torch.finfo(policy_prob.dtype).tiny)",
            "policy_prob",
            "log 0 of what the policy cannot draw, by a coin",
        ),
        tests=("sampling/test_numerics.py::test_a_token_that_a_model_forbids_comes_from_the_other_alone",),
    ),
    *mutations(
        "sampling/coin.py",
        ("live.backlog.shape[1] >= MAX_BACKLOG", "False", "the expert falls behind without end"),
        tests=("sampling/test_coin.py",),
    ),
    *mutations(
        "sampling/stepwise.py",
        ("1 - policy_prob / mixed_prob", "weight", "every token where a coin shows heads counts as the expert's"),
        ("inverse_cdf(mixed, ", "inverse_cdf(expert, ", "drawn from the expert"),
        tests=LAW,
    ),
    *mutations(
        "sampling/speculative.py",
        ("is_rejected & is_tested", "is_rejected", "drafts that nobody came to count as rejected"),
        tests=("sampling/test_lookahead.py",),
    ),
    *mutations(
        "sampling/graphs.py",
        ("self._columns <= columns[:, None]", "self._columns < columns[:, None]", "tokens do not see themselves"),
        ("self._is_text[:, None, None, :] & ", "", "holes and padding are seen"),
        ("& (self._columns <= columns[:, None])", "", "a block sees what is behind it"),
        ("else logits[live]", "else logits[: len(live)]", "live rows get the logits of dead ones"),
        ("layer.show(self._static.length)", "layer.show(self._static.length + 1)", "a cache counts a column too many"),
        (
            "            super().keep_rows(self._static.live)",
            "            pass",
            "dead rows stay when the live ones move",
        ),
        ("else self.live[rows]", "else rows", "rows that were live in another place"),
        ("every[self.live] = columns", "pass", "holes are removed from dead rows alone"),
        ("num_new - num_logits : num_new]", "-num_logits:]", "the logits of padding"),
        (
            "self._position_ids[rows, :num_new] = position_ids",
            "self._position_ids[rows, :num_new] = position_ids[:1]",
            "the positions of one row for all",
        ),
        tests=("sampling/test_graphs.py",),
    ),
    *mutations(
        "sampling/kv.py",
        ("- behind + steps - 1)", "- behind + steps)", "positions off by one"),
        ("position_ids[:, -1:] + 1, ", "position_ids[:, -1:] + 2, ", "drafts skip a position"),
        ("self.lengths + block_mask.sum(-1)", "self.lengths + block_mask.shape[1]", "holes count as text"),
        ("[:, -longest:]", "[:, -longest + 1 :]", "repacking drops the first token of the longest row"),
        ("self.show(num_kept)", "self.show(self.keys.shape[2])", "a repacked cache goes on with its old length"),
        ("buffer[:, :, : old.shape[2]] = old", "buffer[:, :, :0] = old[:, :, :0]", "a cache forgets when it grows"),
        (
            "[[pad_token_id] * (width - len(p)) + list(p) for",
            "[list(p) + [pad_token_id] * (width - len(p)) for",
            "prompts padded on the side that their mask does not say",
        ),
        (
            "position_ids = torch.minimum(position_ids, self.max_lengths[:, None] - 1)\n        return",
            "return",
            "positions beyond the model's table",
        ),
        tests=("sampling/test_record.py", "sampling/test_models.py"),
    ),
    *mutations(
        "sampling/live_rows.py",
        (
            "mask.sum(1) + 1 + self._max_length",
            "mask.sum(1) - 1 + self._max_length",
            "the last position is that of the one before",
        ),
        ("is_end.int().argmax(1) + 1,", "is_end.int().argmax(1).clamp(min=1),", "the end token is dropped"),
        (" & (offsets < count[:, None])", "", "an end among dropped drafts ends the row"),
        ("count = torch.minimum(count, self._max_length - self.position)", "", "completions beyond the last position"),
        ("(offsets[:-1] < last)", "(offsets[:-1] <= last)", "a rejected draft stays visible"),
        (
            "completion_ids.gather(1, last)",
            "completion_ids[:, :1]",
            "the first token of a block is read, not the last",
        ),
        (
            "self._noise[self._row[:, None], ",
            "self._noise[torch.arange(len(self))[:, None], ",
            "rows take over one another's numbers",
        ),
        ("positions == self._max_length - 1", "positions == self._max_length", "the last position is no end"),
        ("if not self._expert_has_read:", "if self._expert_has_read:", "the expert misses what it has not read"),
        tests=("sampling/test_record.py", "sampling/test_coin.py"),
    ),
    *mutations(
        "sampling/live_rows.py",
        ("not is_guided[row])", "is_guided[row])", "the expert guides the wrong rows"),
        (
            "self._policy_forwards += self.num_guided",
            "self._policy_forwards += len(self)",
            "forwards of on-policy rows are counted",
        ),
        (
            "(kept < self.num_guided).sum()",
            "(kept <= self.num_guided).sum()",
            "an on-policy row becomes guided when another ends",
        ),
        tests=MIXED,
    ),
    *mutations(
        "sampling/lookahead.py",
        ("(tokens / costs).argmax()", "(tokens / costs).argmin()", "drafts go on where they do not pay"),
        ("(intercept + slope * lengths)", "(1 + lengths)", "that a round takes time by itself is left out"),
        ("costs = waiting * (", "costs = (", "that rows wait for each other is left out"),
        ("(tokens * tokens_left)", "tokens", "... or taken for the same however many tokens are left"),
        ("(2 * lengths - 1)", "lengths", "the variance of a round in the wrong size"),
        ("max(0.0, float(np.median(slopes)))", "abs(float(np.median(slopes)))", "a negative slope counts as positive"),
        ("np.median(slopes)", "np.mean(slopes)", "what disturbed a round moves the line"),
        ("float(np.median(seconds", "float(np.mean(seconds", "what disturbed a round lifts the line"),
        ("turn < PLAN - 1", "turn < PLAN", "no round is ever shorter"),
    ),
    *mutations(
        "sampling/unguided.py",
        ("len(token_ids)) + 1]", "len(token_ids))]", "the end token is dropped"),
        (
            "TemperatureLogitsWarper(float(temperature))",
            "TemperatureLogitsWarper(1.0)",
            "the temperature is not applied",
        ),
    ),
    *mutations(
        "sampling/auto.py",
        ("all(can_forget_tokens", "any(can_forget_tokens", "drafts with a cache that cannot forget"),
        tests=("sampling/test_sampler.py",),
    ),
]
