"""How often words occur, and which ones tell two models apart."""

import math

import pytest

from trl_selective.reporting.words import as_word, count_words, log_odds_z, most_different, split_words


def test_words():
    assert split_words("Wait, let's CHECK: \\boxed{12}") == [
        "wait",
        ",",
        "let's",
        "check",
        ":",
        "\\",
        "boxed",
        "{",
        "12",
        "}",
    ]
    assert split_words("Let\u2019s") == ["let's"]
    assert split_words("cheque\tüben\n~ 検算") == ["cheque", "üben", "~", "検算"]


def test_given_words():
    assert as_word(" Let  me ") == "let me"
    with pytest.raises(ValueError, match="'  ' is no word"):
        as_word("  ")


def test_counts():
    counts = count_words(["wait wait now", "Now I wait", "no"], lengths=(1, 2))
    assert (counts.num_completions, counts.num_words) == (3, 7)
    assert counts.share("wait") == pytest.approx(2 / 3)
    assert counts.per_thousand("wait") == pytest.approx(1000 * 3 / 7)
    assert (counts.occurrences["i wait"], counts.share("i wait")) == (1, pytest.approx(1 / 3))
    assert counts.share("never") == counts.per_thousand("never") == 0


def test_a_word_in_another_is_not_counted():
    assert count_words(["waiting, await"]).occurrences["wait"] == 0


def test_log_odds():
    """Worked by hand, with a prior of half of what was counted.

    policy: wait 1 of 10 words, x 9 of 10. expert: wait 4 of 10, x 6 of 10. Of both together wait is 5 of 20, so that a = 5 / 2 and A = 20 / 2.
    odds of the expert: (4 + 2.5) / (10 + 10 - 6.5) = 6.5 / 13.5; of the policy: (1 + 2.5) / (20 - 3.5) = 3.5 / 16.5.
    z = (log(6.5 / 13.5) - log(3.5 / 16.5)) / sqrt(1 / 6.5 + 1 / 3.5) = (-0.7309 + 1.5506) / 0.6630 = 1.236.
    """
    policy, expert = count_words(["wait" + " x" * 9]), count_words(["wait " * 4 + "x " * 6])
    z = log_odds_z(policy, expert, prior=0.5)
    assert z["wait"] == pytest.approx((math.log(6.5 / 13.5) - math.log(3.5 / 16.5)) / math.sqrt(1 / 6.5 + 1 / 3.5))
    assert z["wait"] == pytest.approx(1.236, abs=1e-3)
    assert z["x"] < 0
    assert log_odds_z(expert, policy, prior=0.5)["wait"] == pytest.approx(-z["wait"])


def test_log_odds_of_models_that_speak_alike():
    counts = count_words(["let me check"])
    assert set(log_odds_z(counts, counts).values()) == {0.0}
    only = count_words(["x x"])
    assert log_odds_z(only, only) == {"x": 0.0}


def test_a_rare_word_does_not_lead():
    """2 to 0 is a larger ratio than 900 to 500, but says less."""
    policy, expert = count_words(["x " * 9500 + "wait " * 500]), count_words(["x " * 9100 + "wait " * 900 + "odd odd"])
    z = log_odds_z(policy, expert)
    assert z["wait"] > 10 > 2 > z["odd"] > 0


def test_most_different_puts_the_experts_words_first():
    policy = count_words(["so we have 7", "so we get 7"] * 50)
    expert = count_words(["okay we verify 9", "okay we get 9"] * 50)
    z = most_different(policy, expert, 4)
    assert list(z) == [
        "okay",
        "verify",
        "have",
        "so",
    ]  # "7" and "9" are numbers; "we" and "get" are as frequent in both
    assert z["okay"] > z["verify"] > 0 > z["have"] > z["so"]
    assert len(most_different(policy, expert, 100)) == 6


def test_one_completion_that_repeats_itself_does_not_count():
    policy = count_words(["we have it"] * 200)
    expert = count_words(["we have that"] * 199 + ["loop " * 500])
    assert "loop" not in most_different(policy, expert, 10)
    assert "loop" in log_odds_z(policy, expert)
