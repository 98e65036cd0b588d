"""Where guidance comes from."""

from trl_selective.experts.collect import Tally, collect
from trl_selective.experts.completions import CompletionReader, ExpertCompletion
from trl_selective.experts.endpoint import endpoint_client
from trl_selective.experts.endpoint_source import EndpointSource
from trl_selective.experts.local import (
    Expert,
    accelerator_or_cpu,
    check_expert,
    check_readable,
    load_expert,
    load_expert_tokenizer,
    on_device,
)
from trl_selective.experts.local_source import LocalSource
from trl_selective.experts.patient_endpoint import ExpertServerError
from trl_selective.experts.scoring import completion_laws, completion_logps, evaluation_mode
from trl_selective.experts.server import ExpertServer, connect_expert
from trl_selective.experts.shared import load_adapter_tokenizer, share_base, with_own_forwards
from trl_selective.experts.sources import Completion, Sampling, Source

__all__ = [
    "Completion",
    "CompletionReader",
    "EndpointSource",
    "Expert",
    "ExpertCompletion",
    "ExpertServer",
    "ExpertServerError",
    "LocalSource",
    "Sampling",
    "Source",
    "Tally",
    "accelerator_or_cpu",
    "check_expert",
    "check_readable",
    "collect",
    "completion_laws",
    "completion_logps",
    "connect_expert",
    "endpoint_client",
    "evaluation_mode",
    "load_adapter_tokenizer",
    "load_expert",
    "load_expert_tokenizer",
    "on_device",
    "share_base",
    "with_own_forwards",
]
