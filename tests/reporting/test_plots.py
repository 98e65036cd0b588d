"""Pictures show what was logged."""

import math

import numpy as np
import pytest

from tests.reporting.figures import names, panels, points
from trl_selective.evaluation import Evaluation
from trl_selective.reporting import plots
from trl_selective.reporting.style import PALETTE

GRPO = [{"step": step, "reward": 0.1 * step, "entropy": 1.0} for step in (1, 2, 3)]
GUIDED = [{**entry, "guidance/coef": 1.0, "guidance/entropy_threshold": 1.5} for entry in GRPO]
SUMMARY = {"step": 3, "train_runtime": 9.0, "reward": 7.0}


def draw(path, drawn, runs, **settings):
    plots.plot_training_dynamics(runs, path / "a.png", **settings)
    return panels(drawn[-1])


def test_training_dynamics(tmp_path, drawn):
    axes = draw(tmp_path, drawn, {"grpo": GRPO, "guided": [*GUIDED, SUMMARY]})
    assert list(axes) == ["reward of the policy", "entropy of the policy", "guidance coefficient"]
    rewards = [points(line) for line in axes["reward of the policy"].lines]
    assert rewards == [[(1, pytest.approx(0.1)), (2, pytest.approx(0.2)), (3, pytest.approx(0.3))]] * 2  # no summary
    (coef,) = [line for line in axes["guidance coefficient"].lines if points(line)]
    assert points(coef) == [(1, 1), (2, 1), (3, 1)]
    assert names(drawn[0].legends[0]) == ["grpo", "guided"]
    assert axes["entropy of the policy"].get_ylabel() == "nats"


def test_runs_differ_in_colour_and_lines_of_a_run_in_dashes(tmp_path, drawn):
    axes = draw(tmp_path, drawn, {"grpo": GRPO, "guided": GUIDED})
    entropy = [line for line in axes["entropy of the policy"].lines if points(line)]
    looks = [(line.get_color(), line.get_linestyle()) for line in entropy]
    assert looks == [(PALETTE[0], "-"), (PALETTE[1], "-"), (PALETTE[1], "--")]
    assert names(axes["entropy of the policy"].get_legend()) == ["mean", "threshold"]
    assert [line.get_color() for line in drawn[0].legends[0].get_lines()] == list(PALETTE[:2])


def test_lines_of_a_single_run_differ_in_colour(tmp_path, drawn):
    axes = draw(tmp_path, drawn, {"guided": GUIDED})
    assert [line.get_color() for line in axes["entropy of the policy"].lines] == list(PALETTE[:2])
    assert not drawn[0].legends
    assert drawn[0].get_suptitle() == "guided"


def test_each_of_many_runs_has_its_colour(tmp_path, drawn):
    axes = draw(tmp_path, drawn, {f"run {number}": GRPO for number in range(12)})
    assert len({line.get_color() for line in axes["reward of the policy"].lines}) == 12


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_value_that_is_not_there_is_a_gap(tmp_path, drawn, nothing):
    history = [{"step": step, "reward": nothing if step in (3, 5) else 1.0} for step in range(1, 101)]
    (line,) = draw(tmp_path, drawn, {"a": history})["reward of the policy"].lines
    assert [step for step, _ in points(line)] == [1, 2, 4, *range(6, 101)]
    assert len(line.get_ydata()) == 100  # no line across the gaps
    assert line.get_markevery() == [3]  # step 4 alone has no neighbour to draw a line to


def test_one_step(tmp_path, drawn):
    axes = draw(tmp_path, drawn, {"a": GRPO[:1]})["reward of the policy"]
    assert axes.lines[0].get_markevery() == [0]
    assert [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]] == [1]


def test_all_panels_share_the_steps(tmp_path, drawn):
    history = [*GUIDED, *({"step": step, "reward": 0.0} for step in range(4, 100))]
    axes = draw(tmp_path, drawn, {"a": history})
    assert len({each.get_xlim() for each in axes.values()}) == 1
    assert axes["guidance coefficient"].get_xlim()[1] > 99


def test_ten_thousand_steps_are_shown_by_their_means(tmp_path, drawn):
    history = [{"step": step, "reward": float(step % 2)} for step in range(1, 10_001)]
    axes = draw(tmp_path, drawn, {"a": history})["reward of the policy"]
    values, means = axes.lines
    assert set(values.get_ydata().tolist()) == {0.0, 1.0}
    assert np.abs(means.get_ydata() - 0.5).max() < 0.01
    assert axes.get_xlabel() == "step (means of 201)"  # 10,000 / 50, made odd


def test_smooth(tmp_path, drawn):
    axes = draw(tmp_path, drawn, {"a": GRPO}, smooth=3)["reward of the policy"]
    # (0.1 + 0.2) / 2, (0.1 + 0.2 + 0.3) / 3, (0.2 + 0.3) / 2
    assert axes.lines[-1].get_ydata().tolist() == pytest.approx([0.15, 0.2, 0.25])
    with pytest.raises(ValueError, match="smooth must be at least 1, got 0"):
        draw(tmp_path, drawn, {"a": GRPO}, smooth=0)


def test_running_mean_leaves_gaps_out():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    # around each one: 1 alone; a gap; (3 + 5) / 2 without the gap; (3 + 5) / 2
    np.testing.assert_allclose(plots.running_mean(values, 3), [1, np.nan, 4, 4])
    np.testing.assert_allclose(plots.running_mean(values, 1), values)
    np.testing.assert_allclose(plots.running_mean(values, 100), [3, np.nan, 3, 3])  # (1 + 3 + 5) / 3


def test_pass_at_k_and_diversity_where_logged(tmp_path, drawn):
    measured = {"eval/maths/pass@1": 0.2, "eval/maths/pass@8": 0.5, "eval/pass@1": 0.1, "diversity/distinct_2": 0.7}
    axes = draw(tmp_path, drawn, {"a": [*GRPO, {"step": 2, **measured}]})
    assert list(axes)[2:] == ["eval/maths/pass@k", "eval/pass@k", "diversity/distinct_2"]
    assert [points(line) for line in axes["eval/maths/pass@k"].lines] == [[(2, 0.2)], [(2, 0.5)]]
    assert names(axes["eval/maths/pass@k"].get_legend()) == ["pass@1", "pass@8"]


def test_metrics(tmp_path, drawn):
    history = [{**entry, "rewards/a/mean": 1.0, "rewards/b/mean": 2.0} for entry in GRPO]
    axes = draw(tmp_path, drawn, {"a": history}, metrics=["rewards/*", "entropy", "rewards/b/mean"])
    assert list(axes) == ["rewards/a/mean", "rewards/b/mean", "entropy"]
    with pytest.raises(
        ValueError, match=r"Nothing was logged as \['kl'\]\. Metrics that were: \['entropy', 'reward'\]"
    ):
        draw(tmp_path, drawn, {"a": GRPO}, metrics=["kl", "reward"])


def test_nothing_logged_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"None of the runs \['a'\] logged a metric of GRPO"):
        plots.plot_training_dynamics({"a": [SUMMARY]}, tmp_path / "a.png")


def test_pass_at_k(tmp_path, drawn):
    is_correct = [[True, False], [False, False]]
    evaluation = Evaluation({1: 0.25}, {1: 0.1}, 1.0, 2, 2, [["a", "b"]] * 2, is_correct)
    plots.plot_pass_at_k({"start": evaluation}, tmp_path / "k.pdf")
    (line,) = drawn[0].axes[0].lines
    # one of two right in one of two problems: 1/2 * 1/2 at k = 1, and 1/2 at k = 2
    assert points(line) == [(1, pytest.approx(25)), (2, pytest.approx(50))]


def test_without_matplotlib_the_extra_is_named(tmp_path, without_matplotlib):
    with pytest.raises(ImportError, match=r'pip install "trl-selective\[plots\]"'):
        plots.plot_training_dynamics({f"{number}": GRPO for number in range(9)}, tmp_path / "a.png")
