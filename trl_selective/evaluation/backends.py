"""Who draws the completions of a model: Transformers, or vLLM.

Both take token ids and give token ids, and draw each completion with a seed of its own, so that it does not depend on what else is in the batch
(but for rounding).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_selective.evaluation.protocol import SamplingProtocol, check_batches
from trl_selective.sampling.unguided import end_token_ids, sample_completions, seeded_uniforms

TokenIds = list[list[int]]


@runtime_checkable
class Backend(Protocol):
    """Draws completions."""

    eos_token_ids: list[int]

    def complete(self, prompt_ids: TokenIds, seeds: Sequence[int], protocol: SamplingProtocol) -> TokenIds:
        """One completion for each prompt, drawn with its seed, up to and including its end token."""


class TransformersBackend:
    """A model of Transformers in this process.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: completions generated at once.

    Raises:
        ValueError: without a token to pad with.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
    ) -> None:
        check_batches(tokenizer, batch_size)
        self.model, self.pad_token_id, self.batch_size = model, tokenizer.pad_token_id, batch_size
        self.eos_token_ids = end_token_ids(model.generation_config, tokenizer)

    def complete(self, prompt_ids: TokenIds, seeds: Sequence[int], protocol: SamplingProtocol) -> TokenIds:
        completions: TokenIds = []
        for start in range(0, len(prompt_ids), self.batch_size):
            rows = slice(start, start + self.batch_size)
            completions += sample_completions(
                self.model,
                prompt_ids[rows],
                max_completion_length=protocol.max_completion_length,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
                temperature=protocol.temperature,
                top_p=protocol.top_p,
                uniforms=torch.stack([seeded_uniforms(seed, protocol.max_completion_length) for seed in seeds[rows]]),
            )
        return completions


class VllmBackend:
    """An engine of vLLM in this process.

    Args:
        model: Hub id or folder of a model, or of a LoRA adapter, whose base model is then loaded too.
        tokenizer: its tokenizer.
        revision: of a Hub id.
        init_kwargs: for `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        ImportError: if vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        revision: str | None = None,
        init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ImportError(
                "The backend 'vllm' needs vLLM, which is not installed here. Install it with `pip install \"trl-selective[vllm]\"`, or take the "
                "backend 'transformers'."
            ) from error
        settings, self.lora_request = {"revision": revision, **(init_kwargs or {})}, None
        if adapter := adapter_config(model, revision):
            # The request knows no revision: vLLM would take the newest one.
            folder = model if Path(model).exists() else snapshot_download(model, revision=revision)
            self.lora_request = LoRARequest("adapter", 1, folder)
            rank = 1 << max(3, (adapter.r - 1).bit_length())  # vLLM takes powers of two from 8 on
            settings |= {"enable_lora": True, "max_lora_rank": rank, "revision": adapter.revision}
            model = str(adapter.base_model_name_or_path)
        # Its own defaults for sampling are not used; its end tokens are.
        self.llm = LLM(model=model, generation_config="vllm", **settings)
        self.eos_token_ids = end_token_ids(_generation_config(model, settings["revision"]), tokenizer)

    def complete(self, prompt_ids: TokenIds, seeds: Sequence[int], protocol: SamplingProtocol) -> TokenIds:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompt_ids],
            [
                SamplingParams(
                    temperature=protocol.temperature,
                    top_p=protocol.top_p,
                    max_tokens=protocol.max_completion_length,
                    stop_token_ids=self.eos_token_ids,
                    seed=seed,
                    detokenize=False,
                )
                for seed in seeds
            ],
            use_tqdm=False,
            lora_request=self.lora_request,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


def adapter_config(model: str, revision: str | None = None) -> PeftConfig | None:
    """The config of the adapter at `model`; None if that is a whole model."""
    try:
        return PeftConfig.from_pretrained(model, revision=revision)
    except ValueError:  # PEFT's word for: no adapter_config.json there
        return None


def _generation_config(model: str, revision: str | None) -> GenerationConfig:
    """The one that Transformers would give the model."""
    try:
        return GenerationConfig.from_pretrained(model, revision=revision)
    except OSError:
        return GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        )
