"""What guided rollouts cost beside plain ones: every sampler over batch size, length, size of the expert, and agreement."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median

import torch

from tests.benchmarks.models import SHAPES, Disagreement, make_expert, make_policy, make_prompts
from tests.benchmarks.timing import interleaved, median_ratio, peak_megabytes
from trl_selective.config import SAMPLERS
from trl_selective.rollout import GuidedRollout
from trl_selective.sampling import CoinSampler, SpeculativeSampler, StepwiseSampler, make_sampler
from trl_selective.sampling.unguided import sample_completions

DRAFT_LENGTHS = [2, 4, 8, 16]
PLAIN = "generate"


@dataclass
class Line:
    """One sampler in one cell of the grid."""

    name: str
    tokens_per_second: float
    ratio: float  # to plain rollouts by `generate`
    policy_forwards: float  # per token
    expert_forwards: float
    acceptance: float  # of drafts that were judged; without drafts, the share of tokens that the expert did not change
    megabytes: float

    def __str__(self) -> str:
        return (
            f"| {self.name} | {self.tokens_per_second:.0f} | {self.ratio:.2f} | {self.policy_forwards:.2f} | "
            f"{self.expert_forwards:.2f} | {self.acceptance:.1%} | {self.megabytes:.0f} |"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of the policy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16], metavar="ROWS")
    parser.add_argument("--length", type=int, nargs="+", default=[64, 192], metavar="TOKENS")
    parser.add_argument("--expert", type=int, nargs="+", default=[1, 4], metavar="TIMES", help="layers of the policy")
    parser.add_argument("--rejected", type=float, nargs="+", default=[0.02, 0.06, 0.15], metavar="SHARE", help="w TV")
    parser.add_argument("--samplers", choices=SAMPLERS, nargs="+", default=SAMPLERS, help="beside plain rollouts")
    parser.add_argument("--draft_length", type=int, nargs="*", default=DRAFT_LENGTHS, metavar="K", help="fixed ones")
    parser.add_argument("--repeats", type=int, default=3)


def main(arguments: argparse.Namespace) -> None:
    policy = make_policy(SHAPES[arguments.shape], arguments.device)
    for times in arguments.expert:
        expert = make_expert(policy, times)
        disagreement = Disagreement(policy, expert)
        for rejected in arguments.rejected:
            agreement = disagreement.set(rejected)
            for batch, length in product(arguments.batch, arguments.length):
                print(
                    f"\n**{batch} x {length} tokens, expert {times}x, w TV {agreement.rejected:.3f}** "
                    f"(w {agreement.weight:.2f}, entropy {agreement.entropy:.2f} nats, {arguments.shape}, {arguments.device})\n\n"
                    "| sampler | tokens/s | time, plain = 1 | policy forwards per token | expert forwards per token | accepted | peak MB |\n"
                    "|---|---|---|---|---|---|---|"
                )
                lines = measure(
                    policy,
                    expert,
                    agreement.entropy_threshold,
                    batch,
                    length,
                    arguments.repeats,
                    arguments.draft_length,
                    arguments.samplers,
                )
                print(*lines, sep="\n", flush=True)


def measure(
    policy,
    expert,
    entropy_threshold: float,
    batch: int,
    length: int,
    repeats: int,
    draft_lengths: Sequence[int] = DRAFT_LENGTHS,
    kinds: Sequence[str] = SAMPLERS,
) -> list[Line]:
    """All samplers in one cell. Completions have no end token: all rows are full, which favours plain rollouts, whose rows cannot leave."""
    prompts = make_prompts(policy, batch)
    call = {"max_completion_length": length, "eos_token_ids": []}
    samplers = {
        "stepwise": StepwiseSampler(policy, expert),
        "coin": CoinSampler(policy, expert),
        **{f"speculative, {k}": SpeculativeSampler(policy, expert, draft_length=k) for k in draft_lengths},
        "auto": make_sampler("auto", policy, expert, draft_length=None, max_draft_length=16),
    }
    samplers = {name: sampler for name, sampler in samplers.items() if name.partition(",")[0] in kinds}
    rollouts: dict[str, list[GuidedRollout]] = {name: [] for name in samplers}

    def guided(name: str) -> None:
        rollouts[name].append(samplers[name].sample(prompts, entropy_threshold=entropy_threshold, **call))

    alone = CoinSampler(policy, expert, max_weight=0.0)
    runs: dict[str, Callable[[], object]] = {
        PLAIN: partial(sample_completions, policy, prompts, pad_token_id=0, **call),
        "own loop, w = 0": partial(alone.sample, prompts, entropy_threshold=entropy_threshold, **call),
        **{name: partial(guided, name) for name in samplers},
    }
    megabytes = {name: peak_megabytes(run) for name, run in runs.items()}  # the first runs, whose times do not count
    seconds = interleaved(runs, repeats)
    lines = []
    for name in runs:
        counted = rollouts.get(name, [])[1:]
        tokens = sum(rollout.num_tokens for rollout in counted)
        lines.append(
            Line(
                name,
                tokens_per_second=batch * length / median(seconds[name]),
                ratio=median_ratio(seconds[name], seconds[PLAIN]),
                policy_forwards=sum(r.policy_forwards for r in counted) / tokens if counted else 1.0,
                expert_forwards=sum(r.expert_forwards for r in counted) / tokens if counted else 0.0,
                acceptance=1 - sum(sum(map(sum, r.expert_drawn)) for r in counted) / tokens if counted else 1.0,
                megabytes=megabytes[name],
            )
        )
    return lines
