"""What a model says by itself: completions from its full distribution at a temperature, whatever its generation config says."""

import random
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from trl_selective.grading import Conversation
from trl_selective.sampling.draw import inverse_cdf
from trl_selective.sampling.kv import left_pad


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Conversation,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a text, or of a conversation up to where the assistant answers, with further arguments of `apply_chat_template`."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    options = {"tokenize": False, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(prompt, **{**(chat_template_kwargs or {}), **options})
    return tokenizer(text=text, add_special_tokens=False)["input_ids"]


def end_token_ids(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer of a model: those of its generation config, and its tokenizer's."""
    ends = generation_config.eos_token_id
    return sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})


def seed_of(*key: int) -> int:
    """A seed for what `key` names: the same in every process and run, whatever was drawn before."""
    return random.Random(repr(key)).getrandbits(31)


def seeded_uniforms(seed: int, *shape: int) -> Float[Tensor, "..."]:
    """Uniforms in [0, 1) for `sample_completions`, one for each token, in float64 so that rare tokens keep their exact share."""
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample_completions(
    model,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_completion_length: int,
    eos_token_ids: Collection[int],
    pad_token_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    uniforms: Float[Tensor, "rows positions"] | None = None,
) -> list[list[int]]:
    """Draw one completion for each prompt, up to and including its end token.

    Args:
        model: a causal language model of Transformers, in the mode that the caller wants.
        prompt_ids: token ids of each prompt, without padding, at least one each.
        max_completion_length: tokens after which a completion ends at the latest.
        eos_token_ids: a completion ends with the first of these, which is part of it.
        pad_token_id: any valid id, for padding.
        temperature: >= 0, divides the logits; at 0 the most likely token is taken.
        top_p: in (0, 1]; tokens are drawn from the likeliest ones that have this probability together.
        uniforms: one number in [0, 1) for each token, so that a row draws the same tokens in any company (to rounding); None for torch's
            global generator.
    """
    input_ids, mask = left_pad(prompt_ids, pad_token_id, model.device)
    law: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    processors = LogitsProcessorList()
    if temperature == 0:
        law = {"do_sample": False}
    elif uniforms is not None:
        law = {"do_sample": False}  # the processor leaves one token
        processors.append(_Draw(uniforms.to(model.device), temperature, top_p, input_ids.size(1)))
    settings = GenerationConfig(
        **law,
        max_new_tokens=max_completion_length,
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
    )
    with _replaced_generation_config(model, settings):
        # This process alone, whatever others do: Transformers would let them keep step where a model is sharded.
        output = model.generate(
            input_ids=input_ids, attention_mask=mask, logits_processor=processors, synced_gpus=False
        )
    return [_up_to_end(ids, eos_token_ids) for ids in output[:, input_ids.size(1) :].tolist()]


class _Draw(LogitsProcessor):
    """Draws the next token of every row from the softmax of its logits, with the row's own number for that position."""

    def __init__(
        self, uniforms: Float[Tensor, "rows positions"], temperature: float, top_p: float, prompt_length: int
    ):
        self.uniforms, self.prompt_length = uniforms, prompt_length
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(top_p)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs = self.warpers(input_ids, scores.float()).softmax(-1)
        drawn = inverse_cdf(probs, self.uniforms[:, input_ids.size(1) - self.prompt_length])
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn.unsqueeze(-1), 0.0)


def _up_to_end(token_ids: list[int], eos_token_ids: Collection[int]) -> list[int]:
    ends = (position for position, token in enumerate(token_ids) if token in eos_token_ids)
    return token_ids[: next(ends, len(token_ids)) + 1]


@contextmanager
def _replaced_generation_config(model, settings: GenerationConfig):
    """`generate` fills what it is not told from the model's own config: hand it one with nothing else in it."""
    own = [(each, each.generation_config) for each in {model, getattr(model, "get_base_model", lambda: model)()}]
    try:
        for each, _ in own:
            each.generation_config = settings
        yield
    finally:
        for each, generation_config in own:
            each.generation_config = generation_config
