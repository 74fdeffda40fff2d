"""Between two micro-batches on a GPU, backward included, the host waits only where tests/rehearsal/paths.py allows it."""

from collections import Counter

import pytest

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.training.pair_module import PairModule
from tests.rehearsal.__main__ import Outcome, RealGpu
from tests.rehearsal.paths import FAMILY_NAMES, prepare

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_forward_and_backward_of_two_micro_batches(family):
    ready = prepare(family)
    module = PairModule(ready.policy, TrainConfig(model_name_or_path="x", train_file="x", output_dir="x"))

    def step():
        for pairs in (ready.pairs[:1], ready.pairs[1:]):
            module(pairs, 0.5)[0].backward()

    step()  # what is compiled and allocated the first time may wait
    gpu = RealGpu()
    with gpu.watching():
        step()
    assert Outcome(family, "step", Counter(gpu.waits)).too_many == {}
