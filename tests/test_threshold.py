"""The threshold while training: measured once a batch, over all processes, and continued from a checkpoint."""

import json

import pytest
import torch

from tests.processes import Processes
from trl_selective.functional.thresholds import NUM_BINS
from trl_selective.threshold import EntropyThreshold

QUANTILE, VOCAB = 0.8, 50
BIN = 0.0005  # log(50) / 8192 = 0.00048


def make(init=None, floor=0.0, sum_over_processes=lambda counts: counts) -> EntropyThreshold:
    return EntropyThreshold(VOCAB, quantile=QUANTILE, init=init, floor=floor, sum_over_processes=sum_over_processes)


def see(threshold: EntropyThreshold, values: torch.Tensor) -> None:
    threshold.histogram.update(values, torch.ones_like(values, dtype=torch.bool))


def quantile(values: torch.Tensor) -> float:
    return torch.quantile(values, QUANTILE, interpolation="nearest").item()


def test_a_measurement_is_the_quantile_of_what_was_seen_since_the_last():
    threshold, first, second = make(), 3 * torch.rand(501), torch.rand(301)
    see(threshold, first[:200])
    see(threshold, first[200:])
    assert threshold.value is None  # nothing counts before it is measured
    assert threshold.measure() == threshold.value == pytest.approx(quantile(first), abs=BIN)
    see(threshold, second)
    assert threshold.value == pytest.approx(quantile(first), abs=BIN)
    assert threshold.measure() == pytest.approx(quantile(second), abs=BIN)


def test_before_the_first_measurement_it_is_init():
    assert make().measure() is None
    threshold = make(init=2.5)
    assert threshold.measure() == threshold.value == 2.5
    see(threshold, torch.full((3,), 1.0))
    assert threshold.measure() == pytest.approx(1.0, abs=BIN)
    # a batch without on-policy tokens leaves the last value
    assert threshold.measure() == pytest.approx(1.0, abs=BIN)


def test_the_floor_bounds_what_is_measured():
    threshold = make(init=0.5, floor=1.5)
    assert threshold.measure() == 0.5
    see(threshold, torch.full((3,), 1.0))
    assert threshold.measure() == 1.5
    see(threshold, torch.full((3,), 2.0))
    assert threshold.measure() == pytest.approx(2.0, abs=BIN)


def test_all_processes_measure_the_quantile_of_all_tokens():
    """Not the mean of quantiles: one process sees few tokens, and large ones."""
    processes = Processes(3)
    parts = [torch.rand(1000), torch.rand(500), 2 + torch.rand(40)]
    thresholds = [make(sum_over_processes=processes.sum_for(rank)) for rank in range(3)]
    for threshold, part in zip(thresholds, parts, strict=True):
        see(threshold, part)
    values = processes.run(lambda rank: thresholds[rank].measure())
    assert len(set(values)) == 1
    assert values[0] == pytest.approx(quantile(torch.cat(parts)), abs=BIN)
    assert abs(values[0] - sum(map(quantile, parts)) / 3) > 0.1


def test_the_state_of_all_processes_is_saved_once_and_counted_once():
    processes = Processes(2)
    parts = [torch.rand(1000), 1 + torch.rand(300)]
    thresholds = [make(init=0.7, sum_over_processes=processes.sum_for(rank)) for rank in range(2)]
    for threshold, part in zip(thresholds, parts, strict=True):
        see(threshold, part)
    states = processes.run(lambda rank: thresholds[rank].state_dict())
    assert states[0] == states[1]
    assert sum(states[0]["entropy_counts"].values()) == 1300

    resumed = [make(init=99.0, sum_over_processes=processes.sum_for(rank)) for rank in range(2)]
    for rank, threshold in enumerate(resumed):
        see(threshold, torch.full((5,), 3.0))  # forgotten
        threshold.load_state_dict(json.loads(json.dumps(states[0])), is_main_process=rank == 0)
        assert threshold.value == 0.7
    values = processes.run(lambda rank: resumed[rank].measure())
    assert values == processes.run(lambda rank: thresholds[rank].measure())
    assert values[0] == pytest.approx(quantile(torch.cat(parts)), abs=BIN)


def test_the_state_survives_json():
    threshold = make(init=1.25)
    see(threshold, torch.rand(100))
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(threshold.state_dict())), is_main_process=True)
    assert resumed.value == 1.25
    assert torch.equal(resumed.histogram.counts, threshold.histogram.counts)
    assert resumed.measure() == threshold.measure()


def test_a_state_before_any_measurement():
    resumed = make(init=9.0)
    resumed.load_state_dict(make().state_dict(), is_main_process=True)
    assert resumed.measure() is None


@pytest.mark.parametrize("counts", [{"0": -1}, {"-1": 1}, {str(NUM_BINS): 1}, {"0": 1, "5": -1}])
def test_counts_that_cannot_be_are_refused(counts):
    make().load_state_dict(
        {"entropy_threshold": 1.0, "entropy_counts": {"0": 0, str(NUM_BINS - 1): 1}}, is_main_process=True
    )
    with pytest.raises(ValueError, match="counts out of range"):
        make().load_state_dict({"entropy_threshold": 1.0, "entropy_counts": counts}, is_main_process=True)
