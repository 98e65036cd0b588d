"""Faults in what guides a policy that an engine samples."""

from tests.mutations.mutation import mutations

SAMPLER, COIN = ("engines/test_sampler.py",), ("engines/test_coin.py",)

ENGINES = [
    *mutations(
        "engines/coin.py",
        ("COIN)) < weight", "COIN)) > weight", "heads with probability 1 - w"),
        ("entropy(token_probs(logits, temperature))", "entropy(token_probs(logits, 1.0))", "w at temperature 1"),
        ("(ids >= self.vocab_size) | (ids == self.sentinel)", "ids >= self.vocab_size", "the policy draws the sentinel"),
        ("(ids >= self.vocab_size) | ", "", "the policy draws padding of its head"),
        ("logits = self.restrict(logits)", "logits = logits.clone()", "entropy of ids that are no tokens"),
        ("3 * positions + purpose", "positions + purpose", "numbers of neighbours are the same"),
        ("2 ** (64 - bits) - 1", "-1", "shifts carry the sign"),
        tests=COIN,
    ),
    *mutations(
        "engines/sampler.py",
        ("ids[:-1] if is_heads else ids", "ids", "the sentinel stays in the text"),
        ("self._seed(number, POLICY)", "int(self.seeds[number])", "each segment of a row repeats the draws of the first"),
        ("weight[0] = 1.0", "weight[0] = weight[0]", "the first token has no weight of 1"),
        ("token_probs(coin.restrict(logits)", "token_probs(logits", "ids that are no tokens are in the record"),
        ("self.engine.max_model_len - len(ids)", "self.engine.max_model_len", "texts longer than the engine's context"),
        ("temperature=temperature, vocab_size=self.expert_vocab_size", "temperature=temperature, vocab_size=None", "the expert is scored with the padding of its head"),
        ("vocab_size=self.expert_vocab_size,\n                pad", "vocab_size=self.coin.vocab_size,\n                pad", "the expert draws tokens that it has not"),
        ("self.engine.abort()", "...", "requests stay in the engine after an error"),
        ("{*self.eos_token_ids, self.coin.sentinel}", "{self.coin.sentinel}", "the policy does not end"),
        tests=SAMPLER,
    ),
    *mutations(
        "engines/reading.py",
        ("self.context.append(mask)\n        if (columns", "self.context.append(torch.ones_like(mask))\n        if (columns", "holes are text"),
        ("new[place] = text[lengths[place] :]", "new[place] = text[-1:]", "the expert reads the last token alone"),
        ("logits[:, : self.vocab_size]", "logits", "the expert draws padding of its head"),
        ("row in set(rows)]", "row not in set(rows)]", "rows that are done stay, and others leave"),
        tests=SAMPLER,
    ),
    *mutations(
        "engines/asking.py",
        ("ASKED_AT_ONCE * len(live)", "len(live)", "the expert is asked when all rows wait"),
        ("[q.text for q in asked], [q.seed % SEEDS", "[q.text for q in asked[::-1]], [q.seed % SEEDS", "answers go to other rows"),
        tests=SAMPLER,
    ),
]  # fmt: skip
