"""How likely is a given completion under a model? For completions that were not drawn from it, one forward pass instead of a rollout."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from trl_selective.sampling.kv import optional_arguments

LOGITS_AT_ONCE = 2**28  # of one forward: half a gigabyte in bfloat16. A single row may need more.
POSITIONS_AT_ONCE = 1024  # whose log-softmax is held in float32: 0.6 GB for 150,000 tokens of vocabulary

Reader = Callable[[Float[Tensor, "seq vocab"], Int[Tensor, "seq"]], Float[Tensor, "seq *values"]]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout, and afterwards each of its modules in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def completion_laws(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    read: Reader,
    *,
    batch_size: int | None = None,
) -> list[Float[Tensor, "seq *values"]]:
    """What `read` makes of the law of every completion token, on the CPU.

    Args:
        model: a causal language model, in the mode that the caller wants.
        prompt_ids: token ids of each prompt, without padding, at least one each.
        completion_ids: token ids of each completion, end token included, at least one each.
        read: is given the logits of some positions of a row and the tokens there, and returns one entry for each.
        batch_size: rows per forward; None for as many as `LOGITS_AT_ONCE` has room for. Padding changes nothing.
    """
    if not prompt_ids:
        return []
    if batch_size is None:
        texts_of = zip(prompt_ids, completion_ids, strict=True)
        longest = max(len(prompt) + len(completion) for prompt, completion in texts_of) - min(map(len, prompt_ids)) + 1
        batch_size = max(1, LOGITS_AT_ONCE // (longest * model.config.get_text_config().vocab_size))  # type: ignore[operator, union-attr]
    device = next(model.parameters()).device
    takes_logits_to_keep = "logits_to_keep" in optional_arguments(model)
    values: list[Tensor] = []
    for start in range(0, len(prompt_ids), batch_size):
        prompts, completions = (
            [torch.tensor(ids) for ids in rows[start : start + batch_size]] for rows in (prompt_ids, completion_ids)
        )
        # Text to the left, padding to the right: causal attention never sees the padding, and positions count the text.
        texts = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
        token_ids = pad_sequence(texts, batch_first=True).to(device)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).to(device)
        num_logits = token_ids.size(1) - min(map(len, prompts)) + 1  # from the last token of the shortest prompt on
        keep = {"logits_to_keep": num_logits} if takes_logits_to_keep else {}
        logits = model(input_ids=token_ids, attention_mask=mask, **keep).logits[:, -num_logits:]
        first = token_ids.size(1) - num_logits  # the position of the first of these logits
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            begin = len(prompt) - 1 - first
            blocks = zip(
                logits[row, begin : begin + len(completion)].split(POSITIONS_AT_ONCE),
                completion.to(device).split(POSITIONS_AT_ONCE),
                strict=True,
            )
            values.append(torch.cat([read(*block) for block in blocks]).cpu())
    return values


def completion_logps(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    batch_size: int | None = None,
) -> list[Float[Tensor, "seq"]]:
    """log pi(token | prompt, tokens before it) of every completion token, in float32, on the CPU.

    Args:
        model, prompt_ids, completion_ids, batch_size: as for `completion_laws`.
        temperature: > 0, divides the logits.
        vocab_size: ids from here on have no part in the law, and -inf; None for all of the head.
    """

    def read(logits: Tensor, token_ids: Tensor) -> Tensor:
        law = (logits[:, :vocab_size].float() / temperature).log_softmax(-1)
        if missing := logits.size(-1) - law.size(-1):
            law = pad(law, (0, missing), value=-torch.inf)
        return law.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)

    return completion_laws(model, prompt_ids, completion_ids, read, batch_size=batch_size)
