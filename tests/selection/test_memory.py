"""What was injected into which prompt, and the effect when the prompt comes back."""

import json

from trl_selective.selection import Effect, InjectionMemory


def test_how_often_each_completion_was_injected_into_each_prompt():
    memory = InjectionMemory()
    for prompt, completion in [("p", "a"), ("p", "b"), ("p", "a"), ("q", "a")]:
        memory.record(prompt, completion, 0.0)
    times = {(p, c): memory.times_injected(p, c) for p in ("p", "q", "r") for c in ("a", "b")}
    assert {which: n for which, n in times.items() if n} == {("p", "a"): 2, ("p", "b"): 1, ("q", "a"): 1}


def test_an_effect_is_the_change_since():
    memory = InjectionMemory()
    memory.record("p", "a", 0.25, [1.0, 2.0], 0.125)
    memory.record("p", "b", 0.25)
    memory.record("q", "a", 0.5)
    assert memory.effects_on("r", 1.0) == []
    # 0.75 - 0.25, for both that were injected then
    assert memory.effects_on("p", 0.75) == [Effect([1.0, 2.0], 0.125, 0.5), Effect(None, None, 0.5)]
    assert memory.effects_on("p", 0.0) == []  # each is judged once
    assert memory.effects_on("q", 0.0) == [Effect(None, None, -0.5)]
    assert memory.times_injected("p", "a") == 1  # but not forgotten


def test_the_state_survives_json():
    memory = InjectionMemory()
    for number in range(5):
        memory.record(f"p{number % 2}", f"c{number}", number / 7, [number / 3, -1e-17], number / 11)
    memory.record("p0", "c0", 0.3)
    resumed = InjectionMemory()
    resumed.record("forgotten", "c", 0.0)
    resumed.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    assert resumed == memory
    assert resumed.times_injected("forgotten", "c") == 0
    assert [resumed.effects_on(p, 0.9) for p in ("p0", "p1")] == [memory.effects_on(p, 0.9) for p in ("p0", "p1")]
