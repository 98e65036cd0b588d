"""The study: its tasks, its settings, its intervals, all its methods in small, and the results that are shipped."""

import csv
import json
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from tests.training import QUICKSTART
from trl_selective import SelectiveGuidanceGRPOConfig

sys.path.insert(0, str(QUICKSTART.parent / "study"))

from arms import Arm, bootstrap, distinct, success  # isort: skip
from costs import TOKENS, after_as_many, costs, pace, periods, spent, tokens  # isort: skip
from models import RECIPES, TINY, make  # isort: skip
from pictures import plot_costs  # isort: skip
from report import cost_table, report  # isort: skip
from run import Study, best_rates, done, parser, read_settings  # isort: skip
from tasks import GRID, SUMS, TASKS, SumsProblem, corpus_example, expert_example, splits, wrong_example  # isort: skip
from training import OWN_SETTINGS, cost_of_update  # isort: skip

STUDY = QUICKSTART.parent / "study"
SETTINGS = yaml.safe_load((STUDY / "study.yaml").read_text())
# What is shipped: the settings, and the folder with the results.
SHIPPED = {"study": (SETTINGS, STUDY), "larger": (read_settings(STUDY / "larger.yaml"), STUDY / "larger")}
PROMPT = "3 7 8 3 > 32 :"


def study(*arguments: str, settings=SETTINGS) -> Study:
    return Study(settings, parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        (PROMPT, "+8 11 +7 18 +7 25 +7 32", (11, 18, 25, 32)),
        (PROMPT, "~ +7 10 +7 17 ~ +7 24 +8 32 ~", (10, 17, 24, 32)),  # another order, and fillers
        (f"{PROMPT} +8 11 ~ +7 18", "+7 25 +7 32", (11, 18, 25, 32)),  # a prompt with the beginning of an answer
        (PROMPT, "+8 11 +7 18 +7 25", None),  # not there yet
        (PROMPT, "+8 11 +7 18 +7 25 +7 33", None),  # wrong arithmetic
        (PROMPT, "+9 12 +8 20", None),  # a number that is not there
        (PROMPT, "-7 -4 +8 4", None),  # below 0
        (PROMPT, "+8 11 +7", None),
        (PROMPT, "", None),
    ],
)
def test_sums_are_verified_move_by_move(prompt, completion, expected):
    assert SUMS.solution(prompt, completion) == expected
    assert SUMS.reward([prompt], [completion]) == [float(expected is not None)]


def test_the_grid_is_the_quickstarts():
    from task import solution

    rng = random.Random(0)
    for _ in range(100):
        problem = GRID.random_problem(rng)
        prompt, answer = problem.prompt, expert_example(GRID, rng)[1]
        assert GRID.parse(prompt) == (problem, "")
        assert GRID.solution(prompt, answer) == solution(problem, answer)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_what_models_learn_from(task):
    rng = random.Random(1)
    experts = [expert_example(task, rng) for _ in range(300)]
    assert all(task.reward(*zip(*experts, strict=True)))
    assert all(len(answer.split()) < task.max_completion_length for _, answer in experts)
    assert set(" ".join(f"{p} {a}" for p, a in experts).split()) <= set(task.words)
    assert not any(task.reward(*zip(*(wrong_example(task, rng) for _ in range(300)), strict=True)))
    solved = [example for example in (corpus_example(task, rng, 1.0) for _ in range(300)) if task.solution(*example)]
    assert len(solved) == 300
    assert {task.level(task.parse(prompt)[0]) for prompt, _ in solved} == {"near"}  # far goals are a gap


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_problems_are_disjoint_and_of_both_levels(task):
    parts = splits(task)
    everything = [problem for problems in parts.values() for problem in problems]
    assert len(everything) == len(set(everything)) == 1024 + 128 + 128
    assert {task.level(problem) for problem in parts["heldout"]} == {"near", "far"}


def test_a_sums_problem_stays_in_its_range():
    assert dict(SumsProblem((3, 7, 8), 3, 32).neighbours(3)) == {"+3": 6, "-3": 0, "+7": 10, "+8": 11}


def test_settings_are_of_arms_models_and_fields_that_exist():
    arms = {arm: changes for group in SETTINGS["arms"].values() for arm, changes in group.items()}
    for arm, changes in arms.items():
        fields = {name: value for name, value in changes.items() if name not in OWN_SETTINGS}
        SelectiveGuidanceGRPOConfig(**SETTINGS["training"] | fields, output_dir="unused")
        assert changes.get("expert", "expert") in RECIPES, arm
    for place in SETTINGS["comparisons"].values():
        assert place["arms"] == "all" or set(place["arms"]) <= set(arms)
        assert place["base"] in RECIPES
        assert place["task"] in TASKS
    assert set(SETTINGS["arms"]) - {"main"} <= set(SETTINGS["arms"]["main"])  # whose learning rate variants have


def test_all_main_arms_are_searched_alike_and_variants_inherit():
    everything = study()
    searched = {}
    for run in everything.searches():
        searched.setdefault((run.comparison, run.arm), set()).add((run.learning_rate, run.seed))
        assert run.split == "validation"
    assert len(set(map(frozenset, searched.values()))) == 1
    assert {arm for place, arm in searched if place == "grid"} == set(SETTINGS["arms"]["main"])
    rates = {place: 1.0 + index for index, place in enumerate(searched)}
    given = {(run.comparison, run.arm): run.learning_rate for run in everything.runs(rates)}
    assert given["grid", "weak_expert"] == given["grid", "mentor"] == given["grid-easier", "mentor"]
    assert given["grid", "grpo"] == given["grid", "grpo_matched"] != given["grid", "mentor"]


@pytest.mark.parametrize(("settings", "output"), SHIPPED.values(), ids=SHIPPED)
def test_the_shipped_results_are_whole_and_of_these_settings(settings, output):
    """Every arm and seed of the study is there, nothing else is, and the tables are made of them."""
    everything, results = study(settings=settings), output / "results"
    searches = everything.searches()
    runs = everything.runs(best_rates(everything, output))
    assert all(done(run, output) for run in [*searches, *runs])
    shipped = {path.relative_to(results) for kind in ("runs", "search") for path in results.glob(f"{kind}/**/*.json")}
    assert shipped == {Path(f"{run.name}.json") for run in [*searches, *runs]}


@pytest.mark.parametrize(("settings", "output"), SHIPPED.values(), ids=SHIPPED)
def test_the_shipped_tables_are_those_of_the_results(settings, output, tmp_path):
    for kind in ("runs", "models"):
        (tmp_path / kind).symlink_to(output / "results" / kind)
    report(tmp_path, settings)
    shown = (STUDY / "README.md").read_text().split("<!-- results -->")[1]
    tables = sorted(tmp_path.glob("*.md"))
    assert len(tables) == len(settings["comparisons"])
    for path in [*tables, *sorted(tmp_path.glob("*.csv"))]:
        assert path.read_text() == (output / "results" / path.name).read_text()
    for path in tables:
        assert path.read_text() in shown


def test_the_table_of_the_readme_is_quoted_from_the_results():
    readme = (STUDY.parents[1] / "README.md").read_text()
    quoted = [line for line in readme.split("<!-- study -->")[1].splitlines() if line.startswith("| ")]
    assert len(quoted) > 7
    assert set(quoted) <= set((STUDY / "results" / "grid.md").read_text().splitlines())


def test_results_of_another_study_need_its_settings():
    with pytest.raises(SystemExit, match=r"has runs of grid-larger, .* Give the --settings"):
        report(STUDY / "larger" / "results", SETTINGS)


def by_update(run: dict, name: str) -> np.ndarray:
    return np.array(run["cost_by_update"][name], dtype=float)


def test_the_shipped_costs_by_update_are_those_of_the_whole_runs():
    shipped = [path for _, output in SHIPPED.values() for path in sorted(output.glob("results/runs/*/*.json"))]
    assert len(shipped) > 300
    for path in shipped:
        run = json.loads(path.read_text())
        steps = run["settings"].get("max_steps", run["training"]["max_steps"])
        assert {len(values) for values in run["cost_by_update"].values()} == {steps}
        for name in TOKENS:  # four digits of each update are kept; all of one length in supervised training
            assert 128 * by_update(run, name).sum() == pytest.approx(run["cost"][name], rel=5e-4), (path, name)
        if (
            "guidance/expert_drawn" in run["log"]
        ):  # the expert is asked while alpha is above 0, once a threshold is known
            guided = np.array([drawn is not None for drawn in run["log"]["guidance/expert_drawn"]])
            assert ((by_update(run, "expert") > 0) == guided).all(), path
        if run["arm"] == "sft":
            assert "seconds" not in run["cost_by_update"]
        else:
            assert np.nansum(by_update(run, "seconds")) < run["cost"]["seconds"]


def test_the_cost_of_an_update_is_that_of_its_guided_and_other_rollouts():
    plain = {"completions/mean_length": 12.0, "step_time": 0.1}
    assert cost_of_update(plain, 0.25) == {"policy": 12.0, "expert": 0.0, "trained": 12.0, "seconds": 0.1}
    forwards = {"guidance/policy_forwards_per_token": 1.25, "guidance/expert_forwards_per_token": 0.5}
    guided = plain | {"guidance/completions/mean_length": 16.0} | forwards
    expected = {"policy": 9 + 4 * 1.25, "expert": 4 * 0.5, "trained": 9 + 4, "seconds": 0.1}  # 3/4 of 12, 1/4 of 16
    assert cost_of_update(guided, 0.25) == expected


def of_costs(policy: list, expert: list, seconds: list | None, pass_at_1: list) -> dict:
    """A run of 10 rollouts per update, measured at every second one."""
    trained = [1.0] * len(policy)
    series = {"policy": policy, "expert": expert, "trained": trained} | ({"seconds": seconds} if seconds else {})
    return {
        "training": {"per_device_train_batch_size": 10},
        "cost_by_update": series,
        "curve": [{"step": 2 * index, "pass@1": value} for index, value in enumerate(pass_at_1)],
    }


def test_costs_by_update():
    grpo = of_costs([4.0, 4.0, 6.0, 6.0], [0.0] * 4, [0.1, 0.1, 0.1, 0.2], [0.0, 0.1, 0.2])
    guided = of_costs([5.0] * 4, [0.0, 3.0, 2.0, 0.0], [9.0, 0.15, 0.12, 0.2], [0.0, 0.3, 0.5])
    longer = of_costs([4.0] * 6, [0.0] * 6, [9.0, 0.13, 7.0, 0.26, 0.1, 0.1], [0.0] * 4)
    sft = of_costs([0.0] * 4, [0.0] * 4, None, [0.0, 0.4, 0.6])
    sft_then_grpo = of_costs([0.0, 0.0, 4.0, 4.0], [0.0] * 4, [None, None, 0.2, 0.2], [0.0] * 3)

    assert list(periods(3).values()) == [slice(1, 3), slice(3, None)]
    assert tokens("expert", slice(1, 3))(guided) == [10 * (3 + 2) / 2]
    assert np.isnan(tokens("expert", slice(9, None))(guided))  # a run that was shorter
    assert pace(slice(1, 3))(guided, grpo) == pytest.approx([(1.5 + 1.2) / 2])
    assert pace(slice(1, None))(longer, grpo) == pytest.approx([1.3])  # of 1.3, 70 and 1.3: a pause does not count
    assert pace(slice(0, None))(sft_then_grpo, grpo) == pytest.approx([(2 + 1) / 2])
    assert np.isnan(pace(slice(1, 3))(sft, grpo))
    assert list(spent(guided, ("policy", "expert"))) == [0, 10 * (5 + 8), 10 * (5 + 8 + 7 + 5)]
    assert list(spent(sft, TOKENS)) == [0, 20, 40]
    # GRPO spent 200: between update 2, after 130, and update 4, after 250.
    assert after_as_many(guided, grpo) == pytest.approx([0.3 + 0.2 * (200 - 130) / (250 - 130)])
    assert after_as_many(sft, grpo) == [0.6]  # its end: it samples nothing

    arms = {"grpo": Arm("grpo", {0: grpo}), "sft": Arm("sft", {0: sft}), "alone": Arm("alone", {7: guided})}
    found = {name: costs(arm, arms["grpo"], periods(3)) for name, arm in arms.items()}
    assert found["grpo"]["seconds per update (grpo 1), 4 on"].estimate.mean == 1.0
    assert np.isnan(found["sft"]["seconds per update (grpo 1), 4 on"].estimate.mean)
    assert list(found["alone"]) == [f"{name} tokens per update, {when}" for when in ("2 to 3", "4 on") for name in ("policy", "expert")]  # fmt: skip
    table = cost_table(found).splitlines()
    assert table[0].startswith("|  | policy tokens per update, 2 to 3 | expert tokens per update, 2 to 3 | seconds")
    assert table[3] == "| sft | 0 | 0 |  | 0 | 0 |  | 60.0 % |"
    assert table[4] == "| alone | 50 | 25 |  | 50 | 0 |  |  |"


def test_the_picture_of_costs(tmp_path, monkeypatch):
    """An arm has one colour in both panels. One that samples nothing is only where its training is counted."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    sft = of_costs([0.0] * 4, [0.0] * 4, None, [0.0, 0.4, 0.6])
    guided = of_costs([500.0] * 4, [0.0, 300.0, 200.0, 0.0], None, [0.0, 0.3, 0.5])
    plot_costs({"sft": Arm("sft", {0: sft}), "mentor": Arm("mentor", {0: guided, 1: guided})}, tmp_path / "costs.png")
    sampling, everything = [{line.get_label(): line for line in axes.lines} for axes in figures[0].axes]
    assert list(sampling) == ["mentor"]
    assert list(everything) == ["sft", "mentor"]
    assert sampling["mentor"].get_color() == everything["mentor"].get_color() != everything["sft"].get_color()
    assert list(sampling["mentor"].get_xdata()) == [0, 13, 25]  # thousands: 10 rollouts x (500 + 800) by update 2
    assert list(everything["mentor"].get_xdata()) == pytest.approx([0, 13.02, 25.04])
    assert list(everything["mentor"].get_ydata()) == [0.0, 0.3, 0.5]


def test_an_interrupted_copy_of_a_model_is_made_anew(tmp_path, monkeypatch):
    def interrupted(source, target):
        target.mkdir(parents=True)
        shutil.copy(source / "config.json", target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(GRID, "expert", tmp_path)
    copied = {path.name for path in make(GRID, "expert", tmp_path).iterdir()}
    assert copied == {path.name for path in (QUICKSTART / "expert").iterdir()}


def test_a_file_changes_sections_of_the_settings(tmp_path):
    assert read_settings(None) == SETTINGS
    assert SETTINGS["model"] == TINY
    larger = read_settings(STUDY / "larger.yaml")
    assert {key for key in SETTINGS if larger[key] != SETTINGS[key]} == {"model", "seeds", "search", "comparisons"}
    runs = Study(larger, parser().parse_args([])).runs(
        dict.fromkeys([("grid-larger", a) for a in larger["arms"]["main"]], 0.1)
    )
    assert [run.name for run in runs[:5]] == [
        f"runs/grid-larger/{arm}" for arm in ("grpo-0", "sft-0", "luffy-0", "mentor-0", "grpo-1")
    ]
    (tmp_path / "changes.yaml").write_text("sizes: {hidden_size: 8}")
    with pytest.raises(SystemExit, match=r"lacks: \['sizes'\]. It has \['model', "):
        read_settings(tmp_path / "changes.yaml")


def test_models_of_another_size(tmp_path):
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    path = make(GRID, "unlearned", tmp_path, size, steps=1)
    config = json.loads((path / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (32, 96, 1)
    assert make(GRID, "unlearned", tmp_path, size) == path
    with pytest.raises(ValueError, match=r"unlearned is there, but not as large .* another --output_dir"):
        make(GRID, "unlearned", tmp_path)


def test_wider_models_learn_more_slowly(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr("models.fine_tune", lambda model, *_, learning_rate, **__: rates.append(learning_rate))
    for width in (64, 256):
        make(SUMS, "expert", tmp_path / str(width), TINY | {"hidden_size": width})
    assert rates == [RECIPES["expert"].learning_rate, RECIPES["expert"].learning_rate / 4]


def test_unknown_arms_are_refused():
    with pytest.raises(SystemExit, match=r"no \['mentro'\], only \['grpo', "):
        study("--arms", "mentro")


def test_an_interval_covers_the_truth():
    """200 studies of 8 seeds x 60 problems whose true mean is 0.5, seeds and problems varying by 0.1 and 0.2."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        values = 0.5 + 0.1 * rng.normal(size=(8, 1)) + 0.2 * rng.normal(size=(1, 60))
        estimate = bootstrap(values)
        assert estimate.mean == pytest.approx(values.mean())
        hits += estimate.low <= 0.5 <= estimate.high
    assert 0.85 < hits / 200 < 0.98


def test_intervals_of_special_cases():
    assert asdict(bootstrap(np.full((3, 4), 0.25))) == {"mean": 0.25, "low": 0.25, "high": 0.25}
    values = np.array([[0.0, np.nan, 1.0], [0.0, np.nan, 1.0]])  # a problem of another level does not count
    assert bootstrap(values).mean == 0.5
    assert np.isnan(bootstrap(np.full((2, 2), np.nan)).mean)


def test_differences_are_paired_by_seed_and_problem():
    def run(*num_correct):
        return {
            "levels": ["near", "far"],
            "final": {"num_samples": 4, "num_correct": num_correct, "distinct_correct": [1, 0]},
        }

    grpo = Arm("grpo", {0: run(0, 2), 1: run(1, 3)})
    other = Arm("other", {0: run(1, 3), 1: run(2, 4), 2: run(0, 0)})
    assert asdict(other.minus(grpo, success(1))) == {
        "mean": 0.25,
        "low": 0.25,
        "high": 0.25,
    }  # a quarter more, everywhere
    assert grpo.estimate(success(1, "far")).mean == pytest.approx((2 / 4 + 3 / 4) / 2)
    # pass@2 of 1, 2, 3 right of 4: 1 - C(3,2)/C(4,2) = 1/2, 1 - 1/6 = 5/6, 1.
    assert grpo.estimate(success(2)).mean == pytest.approx((0 + 5 / 6 + 1 / 2 + 1) / 4)
    assert grpo.estimate(distinct).mean == 0.5


def run_study(output: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, STUDY / "run.py", "--quick", "--workers", "1", "--output_dir", output, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_the_whole_study_in_small_resumes_and_repeats(tmp_path):
    """Every method trains. A run that is removed is made again, with the same numbers; the others are left alone."""
    arms = ("--arms", "grpo", "sft_then_grpo", "hints", "luffy", "mentor")
    first = run_study(tmp_path, *arms)
    assert first.returncode == 0, first.stderr
    results = tmp_path / "quick" / "results"
    runs = sorted(results.glob("runs/grid/*.json"))
    assert [path.stem for path in runs] == ["grpo-0", "hints-0", "luffy-0", "mentor-0", "sft_then_grpo-0"]
    for path in runs:
        run = json.loads(path.read_text())
        assert [point["step"] for point in run["curve"]] == [0, 2, 4]
        assert (run["cost"]["expert"] > 0) == (run["arm"] == "mentor")
        assert run["cost"]["trained"] > 0
        assert all(len(values) == 4 for values in run["cost_by_update"].values())
        for name in TOKENS:
            assert 16 * by_update(run, name).sum() == pytest.approx(run["cost"][name], rel=1e-3)
        supervised = run["arm"] == "sft_then_grpo"  # its first update
        assert [value is None for value in run["cost_by_update"]["seconds"]] == [supervised, False, False, False]
        assert (by_update(run, "policy")[0] == 0) == supervised
    names = {path.name for path in results.iterdir()}
    assert {
        "grid.csv",
        "grid.md",
        "grid-curves.png",
        "grid-costs.png",
        "grid-pass_at_k.png",
        "grid-habits.png",
    } <= names
    with (results / "grid.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"start", "expert", *(path.stem[:-2] for path in runs)}
    assert "| mentor | " in first.stdout

    mentor = results / "runs/grid/mentor-0.json"
    before, others = json.loads(mentor.read_text()), {path: path.stat().st_mtime_ns for path in runs if path != mentor}
    mentor.unlink()
    again = run_study(tmp_path, *arms)
    assert again.returncode == 0, again.stderr
    after = json.loads(mentor.read_text())
    for result in (before, after):
        del result["cost"]["seconds"], result["cost_by_update"]["seconds"]
    assert after == before
    assert {path: path.stat().st_mtime_ns for path in others} == others

    changed = json.loads(mentor.read_text())
    mentor.write_text(json.dumps(changed | {"learning_rate": 0.5}))
    quick = study("--quick", "--arms", "mentor")
    (run,) = quick.runs(best_rates(quick, tmp_path / "quick"))
    with pytest.raises(SystemExit, match=r"mentor-0\.json was made with other learning_rate than"):
        done(run, tmp_path / "quick")
