"""What a cache with room takes of the memory."""

import pytest
import torch

from tests.models import tiny_model
from tests.sampling.reference import PROMPTS, Guidance
from trl_selective.sampling import kv
from trl_selective.sampling.kv import REPACK_ABOVE, STEP, RoomyLayer

ROWS, HEADS, SIZE = 2, 3, 4


def layer_of(num_columns: int, max_columns: int) -> RoomyLayer:
    layer = RoomyLayer(max_columns)
    layer.update(*torch.randn(2, ROWS, HEADS, num_columns, SIZE))
    return layer


def bytes_held(layer: RoomyLayer) -> int:
    return sum(states.untyped_storage().nbytes() for states in (layer.keys, layer.values))


def test_a_layer_that_grew_holds_its_new_memory_alone():
    layer = layer_of(5, max_columns=2000)
    before = layer.keys.clone()
    layer.reserve(layer.room + 1)
    assert torch.equal(layer.keys, before)
    assert bytes_held(layer) == 2 * ROWS * HEADS * layer.room * SIZE * 4


@pytest.mark.parametrize(
    ("num_columns", "max_columns", "room"),
    [
        (5, 10_000, 5 + 256),  # short ones grow by as much
        (4000, 10_000, 4500),  # long ones by an eighth
        (4000, 4300, 4300),  # but not beyond what there may be
        (500, 400, 500),  # save for what is there
    ],
)
def test_room_is_for_what_may_still_come(num_columns, max_columns, room):
    assert 0 <= layer_of(num_columns, max_columns).room - room < STEP


@pytest.mark.parametrize("kind", ["stepwise", "coin", 4])
def test_caches_of_a_rollout_have_room_for_its_longest_row_and_some_holes(kind, monkeypatch):
    monkeypatch.setattr(kv, "STEP", 1)
    rooms = []
    reserve = RoomyLayer.reserve
    monkeypatch.setattr(RoomyLayer, "reserve", lambda self, num: reserve(self, num) or rooms.append(self.room))
    Guidance("constant", max_weight=0.2).sample(kind, tiny_model(1), tiny_model(2), PROMPTS * 3, length=20)
    longest = max(map(len, PROMPTS)) + 20
    assert longest - 1 <= max(rooms) <= REPACK_ABOVE * longest
