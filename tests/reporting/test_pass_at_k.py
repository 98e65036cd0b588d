"""`python -m trl_selective.reporting pass_at_k`: the curves of what evaluation saved."""

import json

import numpy as np
import pytest

from tests.reporting.figures import names, panels, points
from trl_selective.functional import pass_at_k
from trl_selective.reporting.__main__ import main
from trl_selective.reporting.pass_at_k_plots import pass_at_k_curve


def write(folder, **benchmarks):
    """An output folder of recipes/evaluate.py: benchmark -> whether the samples of its problems are right."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"model": "m", "benchmarks": {name: {} for name in benchmarks}}))
    for name, problems in benchmarks.items():
        rows = [{"problem": number, "is_correct": row} for number, row in enumerate(problems)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_curve_is_the_unbiased_estimate_for_every_k():
    rng = np.random.default_rng(0)
    is_correct = (rng.random((5, 7)) < 0.3).tolist()
    curve = pass_at_k_curve(is_correct)
    expected = [np.mean([pass_at_k(7, sum(row), k).item() for row in is_correct]) for k in range(1, 8)]
    np.testing.assert_allclose(curve.mean, expected, rtol=1e-5)
    assert all(low <= mean <= high for mean, low, high in zip(*curve, strict=True))


def test_curve_ends_with_the_fewest_samples():
    assert pass_at_k_curve([[True, False, False], [True, True]]).mean == pytest.approx(
        [(1 / 3 + 1) / 2, (2 / 3 + 1) / 2]
    )


def test_one_panel_per_benchmark_and_one_colour_per_model(tmp_path, drawn, capsys):
    start = write(tmp_path / "start", maths=[[True, False], [False, False]], hard=[[False] * 4] * 2)
    write(tmp_path / "guided" / "evaluation", maths=[[True, True], [True, False]])
    main(["pass_at_k", start, str(tmp_path / "guided"), "--output", str(tmp_path / "k.png")])
    axes = panels(drawn[0])
    assert list(axes) == ["maths", "hard"]
    # of two problems: 1/2 and 0; 1 and 0. Then 1 and 1/2; 1 and 1
    assert [points(line) for line in axes["maths"].lines] == [
        [(1, pytest.approx(25)), (2, pytest.approx(50))],
        [(1, pytest.approx(75)), (2, pytest.approx(100))],
    ]
    assert points(axes["hard"].lines[0]) == [(k, 0) for k in (1, 2, 3, 4)]
    assert (
        axes["hard"].lines[0].get_color() == axes["maths"].lines[0].get_color() != axes["maths"].lines[1].get_color()
    )
    assert names(drawn[0].legends[0]) == ["start", "guided"]
    # the mean of two problems is one of them, or their middle: bands from the worse to the better one
    bands = [band.get_paths()[0].vertices for band in axes["maths"].collections]
    assert (bands[0][:, 1].min(), bands[0][:, 1].max()) == (0, 100)
    printed = " ".join(capsys.readouterr().out.split())
    assert "| maths, start | 25.0 [0.0, 50.0] | 50.0 [0.0, 100.0] | |" in printed
    assert "| hard, start | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] |" in printed
    assert printed.endswith(f"Wrote {tmp_path / 'k.png'}")


def test_one_problem_has_no_interval(tmp_path, capsys):
    main(["pass_at_k", write(tmp_path / "a", maths=[[True, False]]), "--output", str(tmp_path / "k.svg")])
    assert "| maths, a |   50.0 |  100.0 |" in capsys.readouterr().out


def test_greedy_benchmarks_are_in_the_table_only(tmp_path, drawn, capsys):
    folder = write(tmp_path / "a", greedy=[[True], [False], [True], [True]], maths=[[True, False]])
    main(["pass_at_k", folder, "--output", str(tmp_path / "k.png")])
    assert list(panels(drawn[0])) == ["maths"]
    assert "greedy, a | 75.0 [" in capsys.readouterr().out


def fails(capsys, *arguments):
    """What is said when it ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(["pass_at_k", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_bad_input(tmp_path, capsys):
    assert (
        "a has no results.json, nor has its folder evaluation. Expected the output folder of recipes/evaluate.py"
        in fails(capsys, str((tmp_path / "a").mkdir() or tmp_path / "a"))
    )
    greedy = write(tmp_path / "greedy", maths=[[True], [False]])
    assert "One sample per problem makes no curve" in fails(capsys, greedy, "--output", str(tmp_path / "k.png"))
    assert not (tmp_path / "k.png").exists()
    assert "Format 'xyz' is not supported" in fails(
        capsys, write(tmp_path / "b", maths=[[True, False]]), "--output", str(tmp_path / "k.xyz")
    )


def test_bad_folders(tmp_path, capsys):
    folder = write(tmp_path / "a", maths=[[True]], hard=[[True]])
    (tmp_path / "a" / "hard.jsonl").unlink()
    assert "['maths', 'hard']; ['hard.jsonl'] missing" in fails(capsys, folder)
    (tmp_path / "a" / "hard.jsonl").write_text('{"problem": 0}\n')
    assert "hard.jsonl, line 1: expected a list is_correct, got None" in fails(capsys, folder)
    (tmp_path / "a" / "results.json").write_text('{"evaluations": {}}')  # of the quickstart, for instance
    assert "which has []; all missing" in fails(capsys, folder)
