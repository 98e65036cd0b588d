"""Numbers that are none stop a step before it changes anything, and the row is named."""

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.training import EXPERT, INJECTED, POLICY, expert_dataset, length_reward, make_trainer
from trl_selective.checks import check_scored, refuse_update

FILLER = (
    44  # the token id of "~", with which most of the expert's completions begin and which the policy hardly ever uses
)


class SpoilAfter(TrainerCallback):
    """Once the first step is done, remembers what the policy and the optimizer are, and spoils what comes after the filler in a model."""

    def __init__(self, model, value: float):
        self.model, self.value = model, value

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                self.model.get_input_embeddings().weight[FILLER] = self.value
            self.before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))


def assert_stops_before_the_second_step(trainer, spoil: SpoilAfter, message: str):
    trainer.add_callback(spoil)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            trainer.train()
    assert trainer.state.global_step == 1
    parameters, moments = spoil.before
    assert moments
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, parameters[name], rtol=0, atol=0, equal_nan=True)
    after = trainer.optimizer.optimizer.state_dict()["state"]
    for index, moment in moments.items():
        for name, value in moment.items():
            assert torch.equal(torch.as_tensor(after[index][name]), torch.as_tensor(value))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_expert_that_breaks_while_sampling(tmp_path, value):
    expert = AutoModelForCausalLM.from_pretrained(EXPERT)
    trainer = make_trainer(tmp_path, expert_model=expert, reward_funcs=length_reward)
    message = r"Row \d+, token \d+ has log pi_mix = nan"
    assert_stops_before_the_second_step(trainer, SpoilAfter(expert, value), message)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_policy_that_breaks_on_an_injected_row(tmp_path, value):
    """The policy's own rollouts are sound: only the expert's text has the word."""
    run = {"settings": INJECTED, "injection_trigger": "always", "train_dataset": expert_dataset(16)}
    trainer = make_trainer(tmp_path, **run)
    spoil = SpoilAfter(trainer.model, value)
    message = r"no finite log-probability or entropy: row \d+ \(prompt '[\d >]+:'\).* Nothing was updated"
    assert_stops_before_the_second_step(trainer, spoil, message)


def test_an_expert_that_breaks_while_scoring(tmp_path):
    run = {"settings": INJECTED, "injection_trigger": "always", "train_dataset": expert_dataset(16)}
    expert = AutoModelForCausalLM.from_pretrained(EXPERT)
    trainer = make_trainer(tmp_path, **run, injection_correction="truncated", init={"expert_model": expert})
    message = r"The expert gives token \d+ of a completion for the prompt '[\d >]+:' the log-probability nan"
    assert_stops_before_the_second_step(trainer, SpoilAfter(expert, torch.nan), message)


@pytest.mark.parametrize("weighting", ["entropy", "constant"])
def test_a_policy_that_forbids_a_token(tmp_path, weighting):
    """TRL's entropy of such a law is NaN (0 * inf), which must not become a threshold; without a threshold it does no harm."""
    policy = AutoModelForCausalLM.from_pretrained(POLICY)
    bias = torch.zeros(policy.config.vocab_size)
    bias[0] = -torch.inf  # the padding token
    policy.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    trainer = make_trainer(
        tmp_path, model=policy, guidance_weighting=weighting, guidance_weight_max=0.5, entropy_threshold_init=None
    )
    if weighting == "constant":
        trainer.train()
        assert all(value.isfinite().all() for value in trainer.model.parameters() if value.requires_grad)
    else:
        with pytest.raises(ValueError, match="of which an entropy threshold cannot be measured"):
            trainer.train()
        assert trainer.state.global_step == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_train(tmp_path, dtype):
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=dtype) for name in (POLICY, EXPERT)]
    before = copy.deepcopy(models[0].state_dict())
    trainer = make_trainer(tmp_path, model=models[0], expert_model=models[1], reward_funcs=length_reward, max_steps=2)
    trainer.train()
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_rows_of_another_process_stop_this_one_too():
    with pytest.raises(ValueError, match="no finite log-probability or entropy: rows of another process"):
        refuse_update(torch.ones(3, dtype=torch.bool), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"row 0 \(prompt 'a'\), row 2 \(prompt 'c'\)"):
        refuse_update(torch.tensor([False, True, False]), ["a", "b", "c"])


def test_what_the_expert_says_cannot_be_said_is_named():
    check_scored([torch.tensor([-1.0, -2.0])], ["p"])
    with pytest.raises(ValueError, match="gives token 1 of a completion for the prompt 'q' the log-probability -inf"):
        check_scored([torch.zeros(2), torch.tensor([0.0, -torch.inf])], ["p", "q"])
