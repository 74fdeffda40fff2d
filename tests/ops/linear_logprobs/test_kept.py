"""Log-probs whose exponentials are kept, called directly: ignored labels, repeated rows, memory that was not written."""

import pytest
import torch

from synpo_fast.ops.linear_logprobs.kept import linear_logprobs_kept
from synpo_fast.ops.linear_logprobs.problem import make_problem
from tests.ops.linear_logprobs.problems import BACKEND_DTYPES, NAMES, allowed, device_of, error, make_case, run_eager

KEPT = [(pair, name) for pair, name in zip(BACKEND_DTYPES, NAMES, strict=True) if pair[0] != "reference"]
OPTIONS = {
    "plain": {},
    "repeated rows": {"num_hidden": 11},
    "bias, scale, softcap": {"bias": True, "logit_scale": 1.5, "softcap": 6.0},
}


@pytest.mark.parametrize(("backend", "dtype"), [pair for pair, _ in KEPT], ids=[name for _, name in KEPT])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dim", [15, 16], ids=["odd rows", "rows on 16-byte boundaries"])
def test_gradients_from_kept_exponentials(backend, dtype, options, dim, monkeypatch):
    device = device_of(backend, dtype)
    case = make_case(45, dim, 9001 if backend == "native" else 90, ignored=0.4, **OPTIONS[options]).rounded(dtype)
    truth, eager = run_eager(case, torch.float64), run_eager(case, dtype)
    on_device = {
        name: None if tensor is None else tensor.to(device, dtype)
        for name, tensor in (("hidden", case.hidden), ("weight", case.weight), ("bias", case.bias))
    }
    problem = make_problem(
        on_device["hidden"], on_device["weight"], case.labels.to(device), bias=on_device["bias"],
        rows=None if case.rows is None else case.rows.to(device),
        logit_scale=case.options.get("logit_scale", 1.0), softcap=case.options.get("softcap"), ignore_index=-100,
    )  # fmt: skip
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    kept = linear_logprobs_kept(problem, backend=backend)
    grads = kept.gradients(case.upstream.float().to(device), case.bias is not None)
    found = dict(zip(("hidden", "weight", "bias"), grads, strict=True))
    assert error(kept.logps.double().cpu(), truth.logps) <= allowed(error(eager.logps, truth.logps), dtype)
    for name, true in truth.grads.items():
        ours, theirs = error(found[name].double().cpu(), true), error(eager.grads[name], true)
        assert ours <= allowed(theirs, dtype), f"{name}: error {ours:.3g}, eager {theirs:.3g} in {dtype}"
