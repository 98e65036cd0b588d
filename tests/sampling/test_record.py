"""What is recorded is what happened, and only its own text and its own noise decide about a row."""

import pytest
import torch

from tests.models import tiny_model
from tests.sampling.reference import PROMPTS, Guidance, assert_recorded
from trl_selective.sampling import kv, live_rows
from trl_selective.sampling.kv import CachedModel

KINDS = ["stepwise", "coin", 1, 3, 8, None]
LENGTH = 12
RAMP = Guidance(threshold=1.2)
W0, W1 = Guidance("constant", max_weight=0.0), Guidance("constant", max_weight=1.0)


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=1), tiny_model(seed=2)


@pytest.fixture
def calls(models, monkeypatch):
    """Rows read by each model, as the model itself sees them."""
    calls = {"policy": 0, "expert": 0}
    hooks = []
    for name, model in zip(calls, models, strict=True):

        def count(module, args, kwargs, name=name):
            calls[name] += kwargs["input_ids"].shape[0]

        hooks.append(model.register_forward_pre_hook(count, with_kwargs=True))
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "guidance",
    [
        RAMP,
        Guidance(threshold=1.0, temperature=0.8),
        Guidance(threshold=0.3, max_weight=0.7, temperature=1.3),
        Guidance("hard_gate", threshold=1.0, max_weight=0.9),
        Guidance(threshold=2.0, first_token_from_expert=True),
        W0,
        W1,
    ],
    ids=["ramp", "cooled", "capped_heated", "gate", "expert_first", "w0", "w1"],
)
def test_every_number_is_that_of_a_fresh_forward(models, guidance, kind):
    prompts = PROMPTS * 4
    rollout = guidance.sample(kind, *models, prompts, length=LENGTH, eos={1})
    assert len(set(map(len, rollout.completion_ids))) > 1  # rows end at different times
    assert_recorded(rollout, *models, prompts, guidance)


@pytest.mark.parametrize("guidance", [RAMP, W0, W1, Guidance("hard_gate", threshold=1.0)])
def test_the_draft_length_changes_no_rollout(models, guidance):
    rollouts = []
    for draft_length in (1, 2, 3, 5, 8, 40, None):
        torch.manual_seed(7)
        rollouts.append(guidance.sample(draft_length, *models, PROMPTS * 8, length=LENGTH, eos={1}))
    first = rollouts[0]
    for other in rollouts[1:]:
        assert other.completion_ids == first.completion_ids
        assert other.expert_drawn == first.expert_drawn
        for field in ("sampling_per_token_logps", "policy_per_token_logps", "guidance_weights", "entropies"):
            for ours, theirs in zip(getattr(other, field), getattr(first, field), strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_composition_and_padding_change_no_row(models, monkeypatch, kind):
    """Each row by itself, with its own noise, and in another order: the same tokens."""
    prompts = PROMPTS * 3
    noise = torch.rand(len(prompts), LENGTH, 3, dtype=torch.float64)

    def sample(rows: list[int]):
        monkeypatch.setattr(live_rows, "position_noise", lambda num, positions, device: noise[rows])
        return RAMP.sample(kind, *models, [prompts[row] for row in rows], length=LENGTH, eos={1})

    together = sample(list(range(len(prompts))))
    assert len(set(map(tuple, together.completion_ids))) > 3
    order = torch.randperm(len(prompts)).tolist()
    shuffled = sample(order)
    for index, row in enumerate(order):
        alone = sample([row])
        for rollout, at in ((shuffled, index), (alone, 0)):
            assert rollout.completion_ids[at] == together.completion_ids[row]
            assert rollout.expert_drawn[at] == together.expert_drawn[row]
            assert rollout.sampling_per_token_logps[at] == pytest.approx(
                together.sampling_per_token_logps[row], abs=1e-5
            )


@pytest.mark.parametrize("kind", KINDS)
def test_the_padding_token_has_no_influence(models, kind):
    rollouts = []
    for pad_token_id in (0, 6):
        torch.manual_seed(3)
        rollouts.append(RAMP.sample(kind, *models, PROMPTS, length=LENGTH, eos={1}, pad_token_id=pad_token_id))
    assert rollouts[0].completion_ids == rollouts[1].completion_ids
    assert rollouts[0].sampling_per_token_logps == rollouts[1].sampling_per_token_logps


def test_the_seed_decides(models):
    def sample(seed):
        torch.manual_seed(seed)
        return RAMP.sample(3, *models, PROMPTS * 4, length=LENGTH, eos={1})

    assert sample(5) == sample(5)
    assert sample(5).completion_ids != sample(6).completion_ids


def test_models_and_their_mode_are_left_as_they_were(models):
    policy, expert = models
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.train()
    RAMP.sample(3, policy, expert, PROMPTS, length=4)
    assert policy.training
    policy.eval()
    assert not any(parameter.grad is not None for parameter in policy.parameters())
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


# Cost: finished rows leave the batch, and every forward is counted. Before the first token both models read each prompt, once for all of its
# rows; this is not counted in the record.


def test_stepwise_reads_each_token_once(models, calls):
    rollout = RAMP.sample("stepwise", *models, PROMPTS * 10, length=LENGTH, eos={1, 4})
    assert len(set(map(len, rollout.completion_ids))) > 3
    assert rollout.policy_forwards == rollout.expert_forwards == rollout.num_tokens
    assert calls == {"policy": rollout.num_tokens + len(PROMPTS), "expert": rollout.num_tokens + len(PROMPTS)}
    assert rollout.num_drafted == 0


@pytest.mark.parametrize("draft_length", [1, 2, 3, 5, 8])
def test_where_nothing_is_rejected_a_round_commits_all_drafts(models, calls, draft_length):
    rollout = W0.sample(draft_length, *models, PROMPTS * 10, length=LENGTH, eos={1, 4})
    lengths = list(map(len, rollout.completion_ids))
    rounds = [-(-length // draft_length) for length in lengths]
    # The last round drafts no further than the completion may go: 12 = 5 + 5 + 2.
    drafts = [min(draft_length * n, LENGTH) for n in rounds]
    assert rollout.expert_forwards == sum(rounds)
    assert rollout.policy_forwards == rollout.num_drafted == sum(drafts)
    assert calls == {"policy": sum(drafts) + len(PROMPTS), "expert": sum(rounds) + len(PROMPTS)}


def test_a_rejection_costs_one_round(models, calls):
    """One token per round and row where every draft is rejected: an expert that wants what the policy never draws."""
    policy, expert = (tiny_model(seed=seed, vocab_size=7) for seed in (1, 2))
    with torch.no_grad():
        for model, tokens in ((policy, [2, 3]), (expert, [4, 5])):
            for token in set(range(7)) - set(tokens):
                model.lm_head.weight[token] = 0
            model.lm_head.weight[tokens[1]] = -model.lm_head.weight[tokens[0]]
            model.lm_head.weight *= 1000
    rollout = W1.sample(4, policy, expert, PROMPTS, length=6)
    assert all(map(all, rollout.expert_drawn))
    assert rollout.expert_forwards == 6 * len(PROMPTS)
    # four drafts in rounds 1 to 3, then 3, 2, 1 as the end comes nearer
    assert rollout.num_drafted == rollout.policy_forwards == (4 + 4 + 4 + 3 + 2 + 1) * len(PROMPTS)


@pytest.mark.parametrize("kind", [2, 5, None])
def test_speculative_counts_are_bounded(models, calls, kind):
    rollout = RAMP.sample(kind, *models, PROMPTS * 10, length=LENGTH, eos={1, 4})
    assert len(PROMPTS) * 10 <= rollout.expert_forwards <= rollout.num_tokens
    assert rollout.num_tokens <= rollout.num_drafted == rollout.policy_forwards
    assert calls == {
        "policy": rollout.policy_forwards + len(PROMPTS),
        "expert": rollout.expert_forwards + len(PROMPTS),
    }


def test_holes_are_removed_and_nothing_else(models, monkeypatch):
    """With many rejections the caches are repacked: the record stays that of fresh forwards, and the caches stay short."""
    repacks, widths = [], []
    keep_columns, read = CachedModel.keep_columns, CachedModel.read

    def keep(self, columns):
        repacks.append(self.name)
        keep_columns(self, columns)

    def read_and_note(self, token_ids, attention_mask, *args, **kwargs):
        widths.append(attention_mask.shape[1])
        return read(self, token_ids, attention_mask, *args, **kwargs)

    monkeypatch.setattr(CachedModel, "keep_columns", keep)
    monkeypatch.setattr(CachedModel, "read", read_and_note)
    prompts = PROMPTS * 4
    guidance = Guidance("constant", max_weight=0.9)
    rollout = guidance.sample(8, *models, prompts, length=30)
    assert repacks.count("policy") == repacks.count("expert") > 2
    assert max(widths) <= 1.25 * (5 + 30) + 8
    assert_recorded(rollout, *models, prompts, guidance)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_outgrow_their_room(models, kind, monkeypatch):
    monkeypatch.setattr(kv, "ROOM", 3)
    monkeypatch.setattr(kv, "STEP", 1)
    rollout = RAMP.sample(kind, *models, PROMPTS * 3, length=30)
    assert_recorded(rollout, *models, PROMPTS * 3, RAMP)


# Ends.


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_ends_with_its_first_end_token_or_at_the_last_position(models, kind):
    rollout = RAMP.sample(kind, *models, PROMPTS * 40, length=4, eos={1, 4})
    lengths = set()
    for row in rollout.completion_ids:
        ends = [token in (1, 4) for token in row]
        assert not any(ends[:-1])
        assert ends[-1] or len(row) == 4
        lengths.add((len(row), ends[-1]))
    assert lengths == {(1, True), (2, True), (3, True), (4, True), (4, False)}


@pytest.mark.parametrize("kind", KINDS)
def test_without_end_tokens_every_row_is_full(models, kind):
    rollout = RAMP.sample(kind, *models, PROMPTS, length=7)
    assert list(map(len, rollout.completion_ids)) == [7] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_as_first_token(models, kind):
    rollout = RAMP.sample(kind, *models, PROMPTS * 5, length=6, eos=set(range(7)))
    assert list(map(len, rollout.completion_ids)) == [1] * 15
    assert rollout.expert_forwards == 15
    assert_recorded(rollout, *models, PROMPTS * 5, RAMP)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_row_of_a_single_token(models, kind):
    rollout = RAMP.sample(kind, *models, [[3]], length=10)
    assert_recorded(rollout, *models, [[3]], RAMP)
