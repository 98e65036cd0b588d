"""Datasets: columns that are missing or of the wrong type, empty rows, and expert completions that the policy could not learn from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from tests.bad_input.case import Case, Error, Handled, Warned
from tests.training import GUIDED, INJECTED, POLICY, expert_dataset, length_reward, make_trainer
from trl_selective import SelectiveGuidanceGRPOTrainer

NAN, INF = float("nan"), float("inf")
NOWHERE = "Training has stopped at step 0. Once this is mended, start it again: it has no checkpoint."
CHATML = "{% for m in messages %}{{ m.role }} {{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
# Shows answers without their thoughts, as the templates of several reasoning models do.
DROPS_THOUGHTS = CHATML.replace("{{ m.content }}", "{{ m.content.split('U')[-1] }}")
# The policy goes on behind a thought that was opened for it; a conversation shows whatever was answered.
OPENS_A_THOUGHT = CHATML.replace("assistant {% endif %}", "assistant ~ {% endif %}")
ROWS = list(expert_dataset(4))
QUESTION = [{"role": "user", "content": "2 7 > 9 :"}]


def assistant(content: Any) -> list[dict]:
    return [{"role": "assistant", "content": content}]


def rows(third: dict[str, Any], others: dict[str, Any] | None = None) -> Dataset:
    """Four rows, of which the third has other values."""
    others = others or {}
    return Dataset.from_list([{**row, **(third if index == 2 else others)} for index, row in enumerate(ROWS)])


def make(
    folder: Path, settings: dict[str, Any], data: Any, template: str | None = None, **changes
) -> SelectiveGuidanceGRPOTrainer:
    init = {}
    if template is not None:
        init["processing_class"] = AutoTokenizer.from_pretrained(POLICY)
        init["processing_class"].chat_template = template
    run = {"reward_funcs": length_reward, "max_steps": 1, "init": init, **changes}
    return make_trainer(folder, settings=settings, train_dataset=data, **run)


def refused(
    given: str,
    data: Callable[[], Any],
    says: str,
    settings: dict[str, Any] = INJECTED,
    kind: type[Exception] = ValueError,
    **changes,
) -> Case:
    """Before training starts."""
    return Error(given, lambda folder: make(folder, settings, data(), **changes), says, kind)


def completions(given: str, value: Any, says: str, **changes) -> Case:
    """Of the third of four rows; the others have what is right."""
    return refused(given, lambda: rows({"expert_completions": value}, {"expert_completions": None}), says, **changes)


def conversation(given: str, value: Any, says: str, template: str = CHATML) -> Case:
    good = {"prompt": QUESTION, "expert_completions": [assistant("R 1")]}
    return refused(given, lambda: rows({**good, "expert_completions": value}, good), says, template=template)


def logprobs(given: str, value: Any, says: str) -> Case:
    """Of one completion of three tokens, its end included."""
    texts = {"expert_completions": ["R 1"]}
    data = lambda: rows({**texts, "logps": value}, {**texts, "logps": [[-1.0, -1.0, -1.0]]})  # noqa: E731
    return refused(given, data, says, injection_correction="truncated", expert_logprobs_column="logps")


def sources(given: str, value: Any, says: str) -> Case:
    texts = {"expert_completions": ["R 1", "D 7"]}
    data = lambda: rows({**texts, "by": value}, {**texts, "by": None})  # noqa: E731
    return refused(given, data, says, expert_sources_column="by")


def prompt(given: str, value: Any, says: str) -> Case:
    others = {"prompt": QUESTION if isinstance(value, list) else "2 7 > 9 :"}
    data = lambda: rows({"prompt": value}, others)  # noqa: E731
    return refused(given, data, says, settings=GUIDED, template=CHATML)


def of_stream(given: str, change: dict[str, Any], says: str) -> Case:
    """Found as it comes."""

    def cause(folder: Path) -> None:
        data = IterableDataset.from_generator(lambda: iter([{**row, **change} for row in ROWS]))
        make(folder, INJECTED, data, injection_trigger="always").train()

    return Error(given, cause, f"{says}\n{NOWHERE}")


def without(*names: str) -> Callable[[], Dataset]:
    return lambda: Dataset.from_list(ROWS).remove_columns(names)


def are_all_too_long(folder: Path) -> None:
    trainer = make(
        folder, INJECTED, rows({"expert_completions": ["R 1 " * 20]}, {"expert_completions": ["R 1 " * 20]})
    )
    trainer.train()
    assert trainer.state.log_history[0]["guidance/injection/overlong"] == 1.0
    assert trainer.state.log_history[0]["guidance/injection/rows"] == 0.0


def are_made_on_demand(folder: Path) -> None:
    def transform(batch: dict[str, list]) -> dict[str, list]:
        return {"prompt": batch["question"], "expert_completions": [["R 1"]] * len(batch["question"])}

    data = Dataset.from_list(ROWS).rename_column("prompt", "question").remove_columns("expert_completions")
    trainer = make(folder, INJECTED, data.with_transform(transform), injection_trigger="always")
    trainer.train()
    assert trainer.state.log_history[0]["guidance/injection/trigger/always"] == 1.0


def are_missing_here_and_there(folder: Path) -> None:
    trainer = make(
        folder,
        INJECTED,
        rows({}, {"expert_completions": None}),
        injection_trigger="always",
        injection_advantage="group",
    )
    trainer.train()
    assert 0 < trainer.state.log_history[0]["guidance/injection/groups"] < 1


SECTIONS = {
    "Datasets": (
        "All rows are looked at before training starts; those of a stream, which has no rows before, as they come.",
        [
            refused("something else than a `Dataset`", lambda: [1], "`train_dataset` must be a `Dataset` or `IterableDataset`, got `list`.", settings=GUIDED, kind=TypeError),
            refused("no column `prompt`", without("prompt"), "train_dataset must have rows, and a column 'prompt', got 4 rows with the columns ['walls', 'start', 'goal', 'expert_completions', 'expert_sources']. Rename the column with the problems: `dataset.rename_column(..., 'prompt')`.", settings=GUIDED),
            refused("no rows", lambda: Dataset.from_list(ROWS).select([]), "train_dataset must have rows, and a column 'prompt', got 0 rows with the columns ['prompt', 'walls', 'start', 'goal', 'expert_completions', 'expert_sources']. Rename the column with the problems: `dataset.rename_column(..., 'prompt')`.", settings=GUIDED),
            prompt("a prompt that is `None`", None, "Row 2 of train_dataset has the prompt None, expected a text, or a conversation such as [{'role': 'user', 'content': 'What is 2 + 2?'}]. Correct it, or leave the row out."),
            prompt("a prompt without a token", " ", "Row 2 of train_dataset has the prompt ' ', which has no token: nothing could follow it. Leave the row out."),
            prompt("a prompt that is an empty conversation", [], "Row 2 of train_dataset has the prompt [], expected a text, or a conversation such as [{'role': 'user', 'content': 'What is 2 + 2?'}]. Correct it, or leave the row out."),
            prompt("a prompt whose messages have no role", [{"role": None, "content": "2"}], "Row 2 of train_dataset has the prompt [{'role': None, 'content': '2'}], expected a text, or a conversation such as [{'role': 'user', 'content': 'What is 2 + 2?'}]. Correct it, or leave the row out."),
            refused("conversations, and a tokenizer without a chat template", lambda: rows({"prompt": QUESTION}, {"prompt": QUESTION}), "Row 0 of train_dataset has the prompt [{'role': 'user', 'content': '2 7 > 9 :'}], a conversation, but the tokenizer has no chat template. Pass one that has (tokenizer_name_or_path on the command line), or give texts.", settings=GUIDED),
        ],
    ),
    "Expert completions": (
        "In the column `expert_completions` of the dataset.",
        [
            refused("no such column", without("expert_completions"), "train_dataset has no column 'expert_completions', only ['prompt', 'walls', 'start', 'goal', 'expert_sources']. Name the column that holds expert completions, their log-probabilities or sources in expert_completions_column, expert_logprobs_column or expert_sources_column, or set num_injected_completions=0."),
            refused("no column of log-probabilities", lambda: rows({}), "train_dataset has no column 'logps', only ['prompt', 'walls', 'start', 'goal', 'expert_completions', 'expert_sources']. Name the column that holds expert completions, their log-probabilities or sources in expert_completions_column, expert_logprobs_column or expert_sources_column, or set num_injected_completions=0.", injection_correction="truncated", expert_logprobs_column="logps"),
            refused("no column of sources", lambda: rows({}), "train_dataset has no column 'by', only ['prompt', 'walls', 'start', 'goal', 'expert_completions', 'expert_sources']. Name the column that holds expert completions, their log-probabilities or sources in expert_completions_column, expert_logprobs_column or expert_sources_column, or set num_injected_completions=0.", expert_sources_column="by"),
            completions("none in any row", [], "No row has a completion in the column 'expert_completions': nothing could ever be injected. Fill it, or set num_injected_completions=0."),
            Handled("`None` or `[]` in some rows", are_missing_here_and_there, "Those groups keep their own rollouts."),
            completions("a number", 3, "Row 2 has 3 of type int in 'expert_completions', expected a list of texts or of conversations, which may be empty, or None."),
            completions("a dict", {"text": "R 1"}, "Row 2 has {'text': 'R 1'} of type dict in 'expert_completions', expected a list of texts or of conversations, which may be empty, or None."),
            completions("`None` among them", ["R 1", None], "Row 2, completion 1 in 'expert_completions' is None of type NoneType, expected a text or a conversation."),
            completions("a number among them", [2], "Row 2, completion 0 in 'expert_completions' is 2 of type int, expected a text or a conversation."),
            completions("lists of lists", [["R 1", "D 7"]], "Row 2, completion 0 in 'expert_completions' is ['R 1', 'D 7'] of type list, expected a text or a conversation."),
            completions("an empty text", ["R 1", ""], "Row 2, completion 1 in 'expert_completions' is '', which has no text: there is nothing to learn from it. Leave it out."),
            completions("blanks alone", [" \n\t"], "Row 2, completion 0 in 'expert_completions' is ' \\n\\t', which has no text: there is nothing to learn from it. Leave it out."),
            completions("special tokens alone", ["<pad> <eos>"], "Row 2, completion 0 in 'expert_completions' is '<pad> <eos>', which has no text: there is nothing to learn from it. Leave it out."),
            completions("a conversation behind a prompt that is a text", [assistant("R 1")], "Row 2, completion 0 in 'expert_completions' is a conversation, but the prompt is a text. Give the completion as a text, or the prompt as a conversation."),
            conversation("a message that is not the assistant's", [[{"role": "user", "content": "R 1"}]], "Row 2, completion 0 in 'expert_completions' is [{'role': 'user', 'content': 'R 1'}], expected one message with the role 'assistant' and a text as its content."),
            conversation("two messages", [[*assistant("R 1"), *assistant("D 7")]], "Row 2, completion 0 in 'expert_completions' is [{'role': 'assistant', 'content': 'R 1'}, {'role': 'assistan..., expected one message with the role 'assistant' and a text as its content."),
            conversation("a message without content", [assistant(None)], "Row 2, completion 0 in 'expert_completions' is [{'role': 'assistant', 'content': None}], expected one message with the role 'assistant' and a text as its content."),
            conversation("an empty message", [assistant(" ")], "Row 2, completion 0 in 'expert_completions' is [{'role': 'assistant', 'content': ' '}], which has no text: there is nothing to learn from it. Leave it out."),
            conversation("a chat template that leaves out thoughts", [assistant("~ U R 1")], "Row 2, completion 0: the chat template shows only ' R 1<eos>' of '~ U R 1'; some templates leave thoughts out. Give the completion as a text: all that follows the prompt.", template=DROPS_THOUGHTS),
            conversation("a chat template that opens a thought for the policy alone", [assistant("R 1")], "Row 0, completion 0: the chat template shows the prompt as 'user 2 7 > 9 :<eos>assistant ~ ' before an answer, but a conversation with this answer does not begin so. Give the completion as a text: all that follows the prompt, such as 'R 1<eos>'.", template=OPENS_A_THOUGHT),
            Warned("some longer than `max_completion_length`", lambda folder: make(folder, INJECTED, rows({}, {"expert_completions": ["R 1 " * 20, "R 1"]}), injection_trigger="always").train(), "Of … expert completions read for a batch, … had more than max_completion_length=26 tokens, and were dropped. Raise it, or set overlong_expert_completions='truncate'."),
            Warned("all longer than `max_completion_length`", are_all_too_long, "Of … expert completions read for a batch, … had more than max_completion_length=26 tokens, and were dropped. Raise it, or set overlong_expert_completions='truncate'."),
            Warned("a column that nothing uses", lambda folder: make(folder, GUIDED, rows({})), "train_dataset has the column 'expert_completions', but without effect: num_injected_completions is 0."),
            Handled("made by a transform (`with_transform`)", are_made_on_demand, "Rows are looked at as they come, as those of a stream."),
            of_stream("an empty text in a stream", {"expert_completions": [""]}, "The row with the prompt '…', completion 0 in 'expert_completions' is '', which has no text: there is nothing to learn from it. Leave it out."),
            of_stream("a number in a stream", {"expert_completions": 3}, "The row with the prompt '…' has 3 of type int in 'expert_completions', expected a list of texts or of conversations, which may be empty, or None."),
        ],
    ),
    "Log-probabilities and sources of expert completions": (
        "In `expert_logprobs_column` and `expert_sources_column`.",
        [
            logprobs("too few numbers", [[-1.0]], "Row 2, completion 0 has 1 log-probabilities in 'logps', expected one for each of its 3 tokens under the policy's tokenizer, the end token included. Use None where they are not known."),
            logprobs("too many numbers", [[-1.0] * 4], "Row 2, completion 0 has 4 log-probabilities in 'logps', expected one for each of its 3 tokens under the policy's tokenizer, the end token included. Use None where they are not known."),
            logprobs("NaN", [[-1.0, NAN, -1.0]], "Row 2, completion 0 has the log-probability nan at token 1 in 'logps', expected a finite number of at most 0. Use None for the whole completion where they are not known."),
            logprobs("infinity", [[-INF, -1.0, -1.0]], "Row 2, completion 0 has the log-probability -inf at token 0 in 'logps', expected a finite number of at most 0. Use None for the whole completion where they are not known."),
            logprobs("more than 0", [[-1.0, 0.1, -1.0]], "Row 2, completion 0 has the log-probability 0.1 at token 1 in 'logps', expected a finite number of at most 0. Use None for the whole completion where they are not known."),
            logprobs("`None` inside", [[-1.0, None, -1.0]], "Row 2, completion 0 has the log-probability None at token 1 in 'logps', expected a finite number of at most 0. Use None for the whole completion where they are not known."),
            logprobs("more lists than completions", [[-1.0] * 3] * 2, "Row 2 has 2 entries in 'logps', expected one for each of its 1 completions."),
            logprobs("no list", [], "Row 2 has 0 entries in 'logps', expected one for each of its 1 completions."),
            logprobs("`None`, and no expert model that could score", None, "Row 2, completion 0 has no log-probabilities in 'logps', which injection_correction weighs it by. Give them, leave the completion out, or give the trainer an `expert_model` that scores it."),
            sources("too few names", ["a"], "Row 2 has 1 entries in 'by', expected one for each of its 2 completions."),
            sources("too many names", ["a", "b", "c"], "Row 2 has 3 entries in 'by', expected one for each of its 2 completions."),
            sources("numbers", [3, 4], "Row 2, completion 0 has the source 3 in 'by', expected a name or None."),
        ],
    ),
}  # fmt: skip
