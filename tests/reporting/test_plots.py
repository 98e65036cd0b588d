"""Pictures show what was logged."""

import builtins

import pytest
from matplotlib.figure import Figure

from trl_selective.evaluation import Evaluation
from trl_selective.reporting import plots

GRPO = [{"step": step, "reward": 0.1 * step, "entropy": 1.0} for step in (1, 2, 3)]
GUIDED = [{**entry, "guidance/coef": 1.0, "guidance/entropy_threshold": 1.5} for entry in GRPO]
SUMMARY = {"step": 3, "train_runtime": 9.0, "reward": 7.0}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_training_dynamics(tmp_path, drawn):
    plots.plot_training_dynamics({"grpo": GRPO, "guided": [*GUIDED, SUMMARY]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    axes = {a.get_title(): a for a in drawn[0].axes}
    assert set(axes) == {
        "reward of the policy",
        "guidance coefficient alpha",
        "entropy of the policy (dashed: threshold)",
    }
    reward = [line.get_ydata().tolist() for line in axes["reward of the policy"].lines]
    assert reward == [pytest.approx([0.1, 0.2, 0.3])] * 2  # the summary of the run is no step
    assert len(axes["guidance coefficient alpha"].lines) == 1
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["grpo", "guided"]


def test_colours_belong_to_runs_in_every_panel(tmp_path, drawn):
    plots.plot_training_dynamics({"grpo": GRPO, "guided": GUIDED}, tmp_path / "a.png")
    axes = {a.get_title(): a for a in drawn[0].axes}
    assert axes["guidance coefficient alpha"].lines[0].get_color() == axes["reward of the policy"].lines[1].get_color()


def test_pass_at_k(tmp_path, drawn):
    evaluation = Evaluation({1: 0.5, 4: 0.8}, {1: 0.1, 4: 0.05}, 1.0, 2, 4, [], [])
    plots.plot_pass_at_k({"start": evaluation}, tmp_path / "k.pdf")
    assert (tmp_path / "k.pdf").exists()
    (line,) = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[1.0, 0.5], [4.0, 0.8]]


def test_nothing_logged_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"None of the runs \['a'\] logged a metric of GRPO"):
        plots.plot_training_dynamics({"a": [SUMMARY]}, tmp_path / "a.png")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "trl-selective\[plots\]"'):
        plots.plot_training_dynamics({"a": GRPO}, tmp_path / "a.png")
