"""What a model card says of a training run: its set-up, and what its log says that guidance did."""

from collections.abc import Callable, Mapping, Sequence

from trl_selective.config import SelectiveGuidanceGRPOConfig
from trl_selective.reporting.markdown import table

Entry = Mapping[str, float | None]

# Label, metric, format. Metrics that were not logged are left out.
STATISTICS = (
    ("rollouts that were guided", "guidance/rows", "{:.1%}"),
    ("rollouts that were replaced", "guidance/injection/rows", "{:.1%}"),
    ("reward of the policy", "reward", "{:.3g}"),
    ("reward of guided rollouts", "guidance/reward/guided", "{:.3g}"),
    ("reward of injected completions", "guidance/reward/injected", "{:.3g}"),
    ("groups whose own rollouts all have the same reward", "frac_reward_zero_std", "{:.0%}"),
    ("groups that only guidance got right", "guidance/rescued_groups", "{:.0%}"),
    ("`alpha`", "guidance/coef", "{:.2g}"),
    ("`gamma`, nats", "guidance/entropy_threshold", "{:.2f}"),
    ("`w`, mean over guided tokens", "guidance/weight", "{:.2f}"),
    ("guided tokens that the expert changed", "guidance/expert_drawn", "{:.1%}"),
    ("policy forwards per guided token", "guidance/policy_forwards_per_token", "{:.2f}"),
    ("expert forwards per guided token", "guidance/expert_forwards_per_token", "{:.2f}"),
    ("injected completions that are correct", "guidance/injection/accepted", "{:.0%}"),
    ("length of the policy's completions, tokens", "completions/mean_length", "{:.0f}"),
)


def setup(args: SelectiveGuidanceGRPOConfig, steps: int, max_steps: int, rewards: Mapping[str, float]) -> str:
    """How the model was trained, as a table.

    Args:
        args: the settings.
        steps, max_steps: optimizer steps made, and planned.
        rewards: weight of each reward function.
    """
    kinds = {
        "{} of them guided": args.num_guided_generations,
        "up to {} replaced by expert completions": args.num_injected_completions,
    }
    helped = "".join(f", {kind.format(number)}" for kind, number in kinds.items() if number)
    rows = [
        ("optimizer steps", f"{steps}" if steps == max_steps else f"{steps} of {max_steps}"),
        ("rollouts per prompt", f"{args.num_generations}{helped}"),
        ("prompts per batch", f"{args.generation_batch_size // args.num_generations}"),
        ("learning rate", f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}"),
        ("loss", f"`{args.loss_type}`, {f'KL {args.beta:g}' if args.beta else 'no KL'}"),
        ("rewards", ", ".join(f"`{name}` (weight {weight:g})" for name, weight in rewards.items())),
        ("temperature", f"{args.temperature:g}"),
        ("longest completion", f"{args.max_completion_length} tokens"),
    ]  # fmt: skip
    return table(["", "value"], rows)


def statistics(log_history: Sequence[Entry]) -> str | None:
    """What guidance did, as a table: at the start, at the end, on average. None if nothing was logged."""
    history = [entry for entry in log_history if "train_runtime" not in entry]
    rows: list[tuple[str, ...]] = []
    for label, metric, form in STATISTICS:
        values = [value for entry in history if (value := entry.get(metric)) is not None]
        rows += [(label, *summary(values, form.format))] if values else []
    return table(["", "start", "end", "mean"], rows) if rows else None


def summary(values: Sequence[float], form: Callable[[float], str]) -> list[str]:
    """Mean of the first tenth of the values, of the last tenth, and of all."""
    tenth = -(-len(values) // 10)
    return [form(sum(part) / len(part)) for part in (values[:tenth], values[-tenth:], values)]
