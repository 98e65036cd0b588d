"""What can a model do on problems it was not trained on? pass@k with intervals, in memory, into a file, or while it trains."""

from trl_selective.evaluation.backends import Backend, TransformersBackend, VllmBackend, adapter_config
from trl_selective.evaluation.benchmarks import BENCHMARKS, Benchmark, as_problem
from trl_selective.evaluation.callback import PassAtKCallback
from trl_selective.evaluation.in_memory import Evaluation, evaluate
from trl_selective.evaluation.protocol import SamplingProtocol
from trl_selective.evaluation.results import summarize, table
from trl_selective.evaluation.to_file import evaluate_to_file
from trl_selective.intervals import Estimate, bootstrap

__all__ = [
    "BENCHMARKS",
    "Backend",
    "Benchmark",
    "Estimate",
    "Evaluation",
    "PassAtKCallback",
    "SamplingProtocol",
    "TransformersBackend",
    "VllmBackend",
    "adapter_config",
    "as_problem",
    "bootstrap",
    "evaluate",
    "evaluate_to_file",
    "summarize",
    "table",
]
