"""The model card of a guided run: TRL's own card, and what TRL cannot know of it.

Added are the method with its equations and their sources, the settings of guidance, the training set-up, what guidance did, the picture of
the training dynamics, evaluation results (also as metadata), and the papers to cite. No key and no path of this machine gets in.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel

from trl_selective.config import SelectiveGuidanceGRPOConfig
from trl_selective.experts import Expert, ExpertServer
from trl_selective.reporting.card_evaluation import eval_results, evaluation_section, read_results
from trl_selective.reporting.card_method import cited_papers, equations, method, settings
from trl_selective.reporting.card_training import Entry, setup, statistics
from trl_selective.reporting.dynamics import FILE as PICTURE
from trl_selective.reporting.markdown import insert_before
from trl_selective.reporting.names import hub_id

CARD, RESULTS = "README.md", Path("evaluation", "results.json")
EVALUATION = re.compile(r"\n## Evaluation\n.*?(\n(?=## )|\Z)", re.DOTALL)
FILES = {"trainer_state.json": "all logs", "guidance.html": "rollouts, and who drew each token"}
TOKEN_GUIDANCE = (
    "**Token-level guidance**: {guided} of the {total} rollouts of each prompt were drawn token by token from a mixture of the policy and an "
    "expert, which steps in where the policy is uncertain. The expert is {expert}."
)
COMPLETIONS = (
    "**Selected expert completions**: up to {injected} of the {total} rollouts of a prompt were replaced by whole completions of an expert from "
    "the dataset, in the groups that a trigger chose, by the completions that a selector chose."
)
UNUSED = {"guided": "There was no token-level guidance.", "injected": "No expert completions were injected."}


@dataclass(frozen=True)
class TrainingRun:
    """What a card tells of a guided run.

    Attributes:
        args: its settings.
        log_history: `trainer.state.log_history`.
        steps, max_steps: optimizer steps made, and planned.
        rewards: weight of each reward function.
        expert: the expert; None without one.
        sampler: name of the class that draws guided rollouts; None without any.
        trigger, selector: names of what chooses groups and completions; None without injection.
        has_chat_template: whether prompts may be conversations.
        grpo_citation: BibTeX.
    """

    args: SelectiveGuidanceGRPOConfig
    log_history: Sequence[Entry]
    steps: int
    max_steps: int
    rewards: Mapping[str, float]
    expert: Expert | ExpertServer | None
    sampler: str | None
    trigger: str | None
    selector: str | None
    has_chat_template: bool
    grpo_citation: str


def extend_card(folder: str | Path, run: TrainingRun) -> None:
    """Add to the card that TRL has written into the output folder `folder` what there is to say of a guided run."""
    folder = Path(folder)
    card = ModelCard.load(folder / CARD)
    card.text = complete_usage(card.text, card.data.get("model_name") or "", run.has_chat_template)
    card.text = insert_before(card.text, "### Framework versions", training_sections(run, folder))
    heading = "### Framework versions\n\n"
    card.text = card.text.replace(heading, f"{heading}- trl-selective: {version('trl-selective')}\n")
    card.text = insert_before(card.text, "Cite TRL as:", citations(run))
    card.save(folder / CARD)


def evaluated_at(folder: str | Path) -> int | None:
    """When evaluation results came into the output folder `folder`, in nanoseconds; None if there are none."""
    path = Path(folder, RESULTS)
    return path.stat().st_mtime_ns if path.exists() else None


def add_evaluation(folder: str | Path) -> None:
    """Put evaluation results into the card in the output folder `folder`, where recipes/evaluate.py has left any: for readers and for the Hub.
    Earlier ones are replaced.

    Raises:
        ValueError: if they cannot be read.
    """
    folder = Path(folder)
    if not (folder / RESULTS).exists():
        return
    card, benchmarks = ModelCard.load(folder / CARD), read_results(folder / RESULTS)
    if benchmarks:
        card.data.model_name = card.data.get("model_name") or folder.resolve().name
        card.data.eval_results = eval_results(benchmarks)
        text = EVALUATION.sub("\n", card.text)
        card.text = insert_before(text, "## Training procedure", evaluation_section(benchmarks))
        card.save(folder / CARD)


def complete_usage(text: str, name: str, has_chat_template: bool) -> str:
    """TRL's first lines, also right where a model is not on the Hub, or was not trained on conversations."""
    text = text.replace("[None](https://huggingface.co/None)", "a model that is not on the Hub")
    text = text.replace('model="None"', f'model="{name}"')
    if has_chat_template:
        return text
    hint = "The model was trained on plain text and has no chat template: pass a text, `generator(question, ...)`, instead of messages."
    return insert_before(text, "## Training procedure", hint)


def training_sections(run: TrainingRun, folder: Path) -> str:
    args = run.args
    parts = ["### Selective guidance", summary_of(run)]
    parts.append(equations(args, run.sampler, run.trigger, run.selector))
    parts.append(sources(run))
    parts += ["### Settings of guidance", settings(args)]
    parts += ["### Training set-up", setup(args, run.steps, run.max_steps, run.rewards)]
    if figures := statistics(run.log_history):
        about = (
            "Start and end are means over the first and the last tenth of the values that were logged; those of guided rollouts and of injected "
            "completions were logged as long as there were any."
        )
        parts += ["### What guidance did", figures, about]
    if (folder / PICTURE).exists():
        parts += ["### Training dynamics", f"![Training dynamics]({PICTURE})"]
    files = [f"[{name}]({name}) ({what})" for name, what in FILES.items() if (folder / name).exists()]
    return "\n\n".join([*parts, *([f"Files: {', '.join(files)}."] if files else [])])


def summary_of(run: TrainingRun) -> str:
    """Which kinds of guidance were used, and which were not."""
    args = run.args
    numbers = {"guided": args.num_guided_generations, "injected": args.num_injected_completions}
    told = {"guided": TOKEN_GUIDANCE, "injected": COMPLETIONS}
    facts = {"total": args.num_generations, "expert": describe(run.expert, args), **numbers}
    return "\n\n".join(told[kind].format(**facts) if number else UNUSED[kind] for kind, number in numbers.items())


def describe(expert: Expert | ExpertServer | None, args: SelectiveGuidanceGRPOConfig) -> str:
    """The expert by its id on the Hub, or by its kind and size."""
    if expert is None:
        return ""
    if isinstance(expert, ExpertServer):
        return f"{link(expert.name, None) or 'a model that is not on the Hub'}, behind a completions endpoint"
    if args.expert_model_shares_base:
        base = "the policy's own base model"
        return f"an adapter on {base}" if isinstance(expert, PeftModel) else f"{base}, without the adapter"
    size = f"a model that is not on the Hub (`{type(expert).__name__}`, {expert.num_parameters():,} parameters)"
    return link(expert.config.name_or_path, args.expert_model_revision) or size


def link(name: str, revision: str | None) -> str | None:
    """A link to a model on the Hub; None if it is not there."""
    if (name := hub_id(name)) is None:
        return None
    return f"[{name}](https://huggingface.co/{name})" + (f" at revision `{revision}`" if revision else "")


def sources(run: TrainingRun) -> str:
    papers = ", ".join(
        f"{name} is [arXiv:{paper['id']}](https://huggingface.co/papers/{paper['id']})"
        for name, paper in cited_papers(run.args).items()
    )
    return f"`R` is the reward of a rollout, `R_range` the span of rewards. {papers}. The model is used without an expert."


def citations(run: TrainingRun) -> str:
    """BibTeX of the papers that TRL's card does not cite yet."""
    _, introduced = method(run.args)
    papers = {name: paper["citation"] for name, paper in cited_papers(run.args).items() if paper != introduced}
    papers["GRPO"] = run.grpo_citation
    return "\n\n".join(f"Cite {name} as:\n\n```bibtex\n{citation}\n```" for name, citation in papers.items())
