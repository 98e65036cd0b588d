"""vLLM's CPU build as the tests use it: small, quick to start, and with a way to send it weights."""

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

SMALL = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**26, "max_model_len": 64}


def engine_of(model: str, **settings):
    """A `vllm.LLM` whose requests may carry coins."""
    from vllm import LLM

    from trl_selective.engines.processor import CoinLogitsProcessor

    return LLM(model=model, **{**SMALL, "logits_processors": [CoinLogitsProcessor], **settings})


def use_small_engines(monkeypatch) -> None:
    """Let TRL build such engines. Its way to send weights writes into parameters that the CPU build has repacked; this one repacks them again."""
    from trl.generation import vllm_generation
    from vllm import LLM

    def build(*args, max_model_len=None, **settings):
        return LLM(*args, **{**settings, **SMALL})

    def sync_weights(self):
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.reload_weights(weights_iterator=self._iter_named_params())
        self.llm.reset_prefix_cache()

    monkeypatch.setattr(vllm_generation, "LLM", build)
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", sync_weights)
