"""An expert that is no model to the sampler, as one behind a server."""

import torch

from trl_selective.engines.coin import uniforms_of
from trl_selective.functional.mixed_policy import token_probs
from trl_selective.sampling.draw import inverse_cdf


class FreshForwards:
    """Draws as `ReadingExpert` does, with a forward of the whole text for every token."""

    vocab_size, scores = 7, False

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def draw(self, texts, seeds, temperature) -> list[int]:
        logits = [self.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1, :7] for text in texts]
        return inverse_cdf(token_probs(torch.stack(logits), temperature), uniforms_of(torch.tensor(seeds))).tolist()

    def completion_logps(self, prompt_ids, completion_ids):
        raise AssertionError("it does not score")
