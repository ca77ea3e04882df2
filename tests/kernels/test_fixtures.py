"""The fixtures of this folder leave alone what tests of other folders use."""

import torch


def test_poisoned_memory_is_made_where_it_is_asked_for():
    with torch.device("meta"):
        made = torch.empty(1)
    assert made.device.type == "meta"
    assert torch.empty(1).isnan()
