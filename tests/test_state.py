"""The state in a checkpoint is whole, absent, or named as damaged."""

import pytest

from trl_selective.state import STATE_FILE, saved_state, write_state


def read(folder):
    with saved_state(folder) as state:
        return state


def test_what_is_written_is_read(tmp_path):
    write_state(tmp_path, {"entropy_threshold": 0.1 + 0.2, "injection": {"num_batches": 3}})
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    assert read(tmp_path) == {"entropy_threshold": 0.1 + 0.2, "injection": {"num_batches": 3}}


def test_a_checkpoint_without_guidance_has_no_state(tmp_path):
    assert read(tmp_path) is None


@pytest.mark.parametrize("content", ['{"entropy_threshold": 1', "{}", "[1, 2]", "null", ""])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / STATE_FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{STATE_FILE} is damaged, .* Resume from an earlier checkpoint, or delete"):
        read(tmp_path)["anything"]


def test_what_does_not_fit_is_damage_too(tmp_path):
    write_state(tmp_path, {"entropy_threshold": 1.0})
    with (
        pytest.raises(
            ValueError, match=r"is damaged, or was written with other settings \(KeyError\('entropy_counts'\)\)"
        ),
        saved_state(tmp_path) as state,
    ):
        state["entropy_counts"]


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path):
    write_state(tmp_path, {"entropy_threshold": 1.0})
    with pytest.raises(TypeError):
        write_state(tmp_path, {"entropy_threshold": object()})
    assert read(tmp_path) == {"entropy_threshold": 1.0}
