"""The guidance viewer, as a browser shows it."""

import json
import os
import re

import pytest

from tests.browser import chromium, console, open_page
from trl_selective.reporting.__main__ import main
from trl_selective.reporting.rollouts import COLUMNS, write_rollouts
from trl_selective.reporting.viewer import write_viewer, write_viewer_of_run

TOKENS = ["Let", " x", "\n", "", "é", " be", "<eos>"]
HOSTILE = {
    "script": "<script>alert(1)</script>",
    "end": "</script><img src=x onerror=alert(2)>",
    "end with a blank": "</script ><b>",
    "comment": "<!--<script>",
    "comment with a blank": "<!--<script ",
    "entity": "&lt;b&gt; &amp;",
    "line separator": "a\u2028b",
    "quote": "\"'`${1}",
}


def a_row(kind="on_policy", step=1, group=0, row=0, **changes):
    values = dict.fromkeys(COLUMNS) | {
        "step": step,
        "group": group,
        "row": row,
        "kind": kind,
        "prompt": f"What is {group}?",
    }
    values |= {
        "completion": "It is four.",
        "reward": 0.0,
        "advantage": -0.5,
        "entropy_threshold": 1.5,
        "guidance_coef": 1.0,
    }
    if kind == "guided":
        size = len(TOKENS)
        values |= {
            "tokens": TOKENS,
            "guidance_weights": [i / (size - 1) for i in range(size)],
            "entropies": [0.25 * i for i in range(size)],
        }
        values |= {"expert_drawn": [i == 1 for i in range(size)], "acceptance": [1.0] + [0.125] * (size - 1)}
        values |= {"completion": "".join(TOKENS[:-1]), "reward": 1.0}
    if kind == "injected":
        values |= {
            "completion": "Four, clearly.",
            "reward": 0.9,
            "source": "R1",
            "selector": "learnable",
            "score": 0.375,
        }
    return {**values, "rewards/right": values["reward"], **changes}


def a_run(steps=2, groups=2):
    kinds = ("on_policy", "on_policy", "guided", "injected")
    places = [(step, group) for step in range(1, steps + 1) for group in range(groups)]
    return [a_row(kind, step, group, row) for step, group in places for row, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture
def shown(browser, tmp_path):
    """Opens rollouts in the browser. What the console says is checked at the end."""

    def show(rollouts):
        write_viewer(rollouts, tmp_path / "page.html", title="a <run>")
        open_page(browser, tmp_path / "page.html")
        return browser

    yield show
    assert console(browser) == []


def texts(driver, selector):
    return [element.get_property("textContent") for element in driver.find_elements("css selector", selector)]


def fill(driver, selector, value):
    """Sets a field as a user does, and waits for the page to follow."""
    script = "const e = document.querySelector(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input', {bubbles: true}))"
    driver.execute_script(script, selector, value)
    driver.execute_async_script("setTimeout(arguments[0], 150)")  # longer than the page waits for more keys


def click(driver, selector):
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)
    driver.execute_async_script("setTimeout(arguments[0], 150)")  # longer than the page waits for more keys


def count(driver):
    return texts(driver, "#count")[0]


# ---- What it shows ---------------------------------------------------------------------------------------------------------------------


def test_header_cards_and_legend(shown):
    driver = shown(a_run())
    assert driver.title == "a <run>: guidance viewer"
    tiles = dict(zip(texts(driver, "#summary dt"), texts(driver, "#summary dd:not(.detail)"), strict=True))
    assert tiles == {"steps": "1 to 2", "rollouts": "16", "reward, on-policy": "0", "reward, guided": "1",
                     "reward, injected": "0.90", "expert drew": "14 %"}  # fmt: skip
    assert texts(driver, "#chart .name") == ["on-policy", "guided", "injected"]
    assert count(driver) == "16 of 16 rollouts"
    assert "drawn by the expert" in texts(driver, "#legend")[0]
    injected = texts(driver, ".card.injected dl")[0]
    assert "sourceR1" in injected
    assert "selectorlearnable" in injected
    assert "score0.38" in injected  # 0.375


def test_tokens_are_shaded_by_w_and_marked_where_the_expert_drew(shown):
    driver = shown(a_run(1, 1))
    assert texts(driver, ".tokens .token") == TOKENS
    assert texts(driver, ".tokens .drawn") == [" x"]
    style = "const s = getComputedStyle(document.querySelectorAll('.tokens .token')[arguments[0]]); return [s.backgroundColor, s.textDecorationLine]"
    first, drawn, *_, last = (driver.execute_script(style, i) for i in range(len(TOKENS)))
    assert "underline" in drawn[1]
    assert first[1] == last[1] == "none"
    alpha = [float(re.search(r"/ ([\d.]+)\)|, ([\d.]+)\)$", colour[0])[1] or 0) for colour in (first, drawn, last)]
    assert alpha == pytest.approx([0, 0.8 / 6, 0.8], abs=0.01)
    marks = "return ['newline', 'partial'].map((name) => [...document.querySelectorAll(`.tokens .${name}`)].map((e) => e.dataset.index))"
    assert driver.execute_script(marks) == [["2"], ["3"]]


def test_pointing_at_a_token_shows_its_record(shown):
    from selenium.webdriver import ActionChains

    driver = shown(a_run(1, 1))
    assert not driver.find_element("id", "tip").is_displayed()
    ActionChains(driver).move_to_element(driver.find_element("css selector", ".tokens .drawn")).perform()
    tip = driver.find_element("id", "tip")
    assert tip.is_displayed()
    assert tip.text.splitlines()[0] == '" x"'
    shown_facts = dict(zip(texts(driver, "#tip dt"), texts(driver, "#tip dd"), strict=True))
    assert shown_facts == {"token": "2 of 7", "drawn by": "the expert", "weight w": "0.167", "entropy H": "0.250 nats (threshold 1.50)",
                           "acceptance": "0.125"}  # fmt: skip
    ActionChains(driver).move_to_element(driver.find_element("id", "title")).perform()
    assert not tip.is_displayed()


def test_the_keyboard_reaches_every_token(shown):
    from selenium.webdriver import ActionChains, Keys

    driver = shown(a_run(1, 1))
    ActionChains(driver).click(driver.find_element("id", "query")).perform()
    for _ in range(30):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        if "token" in driver.switch_to.active_element.get_property("className").split():
            break
    assert texts(driver, "#tip strong") == ['"Let"']
    ActionChains(driver).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    assert texts(driver, "#tip strong") == ["part of a character"]
    ActionChains(driver).send_keys(Keys.END).perform()
    assert texts(driver, "#tip strong") == ['"<eos>"']
    ActionChains(driver).send_keys(Keys.ESCAPE).perform()
    assert not driver.find_element("id", "tip").is_displayed()


def test_a_group_shows_all_its_rollouts_side_by_side(shown):
    driver = shown(a_run())
    fill(driver, "#step-to", "1")
    click(driver, ".card.guided .link")
    assert texts(driver, ".group h2") == ["Step 1, group 0"]
    assert texts(driver, ".columns h3") == ["On-policy (2), mean reward 0", "With the expert (2), mean reward 0.95"]
    assert texts(driver, ".columns .kind") == ["on-policy", "on-policy", "guided", "injected"]
    assert texts(driver, ".group .prompt .text") == ["What is 0?"]
    assert texts(driver, "#page") == ["Group 1 of 2"]
    click(driver, "#next")
    assert texts(driver, ".group h2") == ["Step 1, group 1"]
    click(driver, "input[value=rollouts]")
    assert count(driver) == "8 of 16 rollouts"


# ---- Filters and order -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "number"),
    [
        ("#query", "CLEARLY", 4),  # only the injected say so
        ("#query", "Let x", 4),  # over the border of two tokens
        ("#query", "what is 1", 8),  # a prompt
        ("#query", "nowhere", 0),
        ("#step-from", "2", 8),
        ("#step-to", "1", 8),
        ("#reward-from", "0.95", 4),
        ("#reward-to", "0", 8),
    ],
)
def test_filters(shown, field, value, number):
    driver = shown(a_run())
    fill(driver, field, value)
    assert count(driver) == f"{number} of 16 rollouts"
    assert len(driver.find_elements("css selector", ".card")) == number
    assert bool(texts(driver, ".nothing")) == (number == 0)
    click(driver, "button[type=reset]")
    assert count(driver) == "16 of 16 rollouts"


def test_kinds_can_be_switched_off(shown):
    driver = shown(a_run())
    click(driver, "#kinds input[value=on_policy]")
    click(driver, "#kinds input[value=injected]")
    assert set(texts(driver, ".card .kind")) == {"guided"}
    assert count(driver) == "4 of 16 rollouts"


def test_sorting(shown):
    rewards = [0.5, None, -1.0, 2.0]
    rows = [a_row(step=step, reward=reward) for step, reward in enumerate(rewards, start=20)]
    driver = shown([*rows, a_row("injected", 9, reward=0.0), a_row("guided", 10, reward=0.0)])

    def steps():
        return [int(place.split()[1]) for place in texts(driver, ".card .place")]

    assert steps() == [10, 9, 23, 22, 21, 20]  # groups without guidance come last
    for order, first in {
        "newest": 23,
        "oldest": 9,
        "reward-high": 23,
        "reward-low": 22,
        "drawn": 10,
        "score": 9,
    }.items():
        fill(driver, "#sort", order)
        assert steps()[0] == first
    fill(driver, "#sort", "reward-low")
    assert steps()[-1] == 21  # nothing scored it


# ---- Hostile texts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_texts_are_texts(shown, text):
    named = text.replace("\u2028", "⟨U+2028⟩")
    rows = [a_row(completion=text, prompt=text), a_row("guided", row=1, prompt=text, tokens=[text, *TOKENS[1:]])]
    driver = shown([*rows, a_row("injected", row=2, prompt=text, source=text, selector=text)])
    assert driver.execute_script("return document.scripts.length") == 2  # the data and ours
    assert not driver.find_elements("css selector", "main img, main script, main b")
    assert texts(driver, ".card.on_policy .completion") == [named]
    assert texts(driver, ".card .text") == [named] * 3
    assert texts(driver, ".tokens .token")[0] == named
    assert named in texts(driver, ".card.injected dl")[0]


def test_invisible_characters_are_named_and_turn_nothing_around(shown):
    driver = shown([a_row(completion="a\u202eb\x00c\u200bd\ud800e")])
    assert texts(driver, ".completion") == ["a⟨U+202E⟩b␀c⟨U+200B⟩d⟨U+D800⟩e"]


def test_a_line_of_100_kilobytes_is_cut_until_asked_for_and_never_widens_the_page(shown):
    driver = shown([a_row(completion="x" * 100_000), a_row("guided", row=1, tokens=["y" * 100_000, *TOKENS[1:]])])
    assert max(map(len, texts(driver, ".card.on_policy .completion"))) < 5000
    narrow = "return document.documentElement.scrollWidth <= window.innerWidth"
    assert driver.execute_script(narrow)
    click(driver, ".card.on_policy .completion + .link")
    assert texts(driver, ".card.on_policy .completion") == ["x" * 100_000]
    assert driver.execute_script(narrow)


def test_long_completions_show_all_tokens_when_asked(shown):
    size = 4096
    arrays = {name: [0.5] * size for name in ("guidance_weights", "entropies", "acceptance")}
    driver = shown([a_row("guided", tokens=["z"] * size, expert_drawn=[False] * size, **arrays)])
    assert len(driver.find_elements("css selector", ".tokens .token")) == 400
    click(driver, ".tokens + .link")
    assert len(driver.find_elements("css selector", ".tokens .token")) == size


def test_the_page_may_not_reach_the_network(browser, tmp_path):
    write_viewer(a_run(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(""", page)
    open_page(browser, tmp_path / "page.html")
    script = "const done = arguments[0]; fetch('data:,x').then(() => done('sent'), () => done('refused'))"
    assert browser.execute_async_script(script) == "refused"
    assert any("Content Security Policy" in message for message in console(browser))


# ---- Many ------------------------------------------------------------------------------------------------------------------------------


def test_a_thousand_rollouts_make_a_small_page(shown):
    driver = shown(a_run(steps=25, groups=10))
    nodes = "return document.querySelectorAll('*').length"
    assert count(driver) == "1,000 of 1,000 rollouts"
    assert driver.execute_script(nodes) < 1500
    fill(driver, "#query", "what is 7?")
    assert count(driver) == "100 of 1,000 rollouts"
    assert texts(driver, "#page") == ["Page 1 of 5"]
    for _ in range(4):
        click(driver, "#next")
    assert texts(driver, "#page") == ["Page 5 of 5"]
    assert not driver.find_element("id", "next").is_enabled()
    assert len(driver.find_elements("css selector", ".card")) == 20
    assert driver.execute_script(nodes) < 1500
    click(driver, "input[value=groups]")
    assert driver.execute_script(nodes) < 500


def test_a_phone_sees_all_of_it(shown):
    driver = shown(a_run())
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        driver.refresh()
        assert driver.execute_script("return document.documentElement.scrollWidth") == 360
        assert not driver.find_element("id", "sort").is_displayed()  # folded until asked for
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# ---- Files and command -----------------------------------------------------------------------------------------------------------------


def embedded(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def a_folder(folder, steps=3):
    rows = a_run(steps)
    for step in range(1, steps + 1):
        write_rollouts([row for row in rows if row["step"] == step], folder)
    return folder


def command(*arguments):
    main(["viewer", *map(str, arguments)])


def test_the_command_writes_beside_the_run(tmp_path, capsys):
    a_folder(tmp_path)
    command(tmp_path)
    assert "guidance.html shows 3 of 3 recorded steps, 1 to 3." in capsys.readouterr().out
    data = embedded(tmp_path / "guidance.html")
    assert len(data["rollouts"]) == 24
    assert data["prompts"] == ["What is 0?", "What is 1?"]
    assert data["rollouts"][2]["tokens"] == TOKENS
    command(tmp_path, "--output", tmp_path / "other.html")
    assert (tmp_path / "other.html").exists()


@pytest.mark.parametrize(("most", "steps"), [(80, range(1, 11)), (40, (1, 3, 5, 8, 10)), (16, (1, 10)), (1, (10,))])
def test_of_a_long_run_the_page_shows_steps_at_even_distances(tmp_path, most, steps):
    """Ten steps of 8 rollouts."""
    a_folder(tmp_path, steps=10)
    assert write_viewer_of_run(tmp_path, tmp_path / "page.html", most) == list(steps)
    data = embedded(tmp_path / "page.html")
    assert {row["step"] for row in data["rollouts"]} == set(steps)
    assert data["numRecordedSteps"] == 10


def test_lone_surrogates_and_numbers_that_json_lacks_are_written(tmp_path):
    write_viewer(
        [a_row(completion="a\ud800", prompt="\udfff", reward=float("nan"), score=float("inf"))], tmp_path / "page.html"
    )
    (row,) = embedded(tmp_path / "page.html")["rollouts"]
    assert (row["completion"], row["reward"], row["score"]) == ("a\ud800", None, None)


def test_nothing_to_show_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"No rollouts to show\. Pass what read_rollouts returns"):
        write_viewer([], tmp_path / "page.html")
    with pytest.raises(ValueError, match="Give the output_dir of a run"):
        write_viewer_of_run(tmp_path, tmp_path / "page.html")


def test_an_interrupted_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_viewer(a_run(), path)
    before = path.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_viewer(a_run(1), path)
    assert path.read_text() == before
