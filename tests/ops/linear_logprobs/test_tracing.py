"""torch.compile, tensors without values, torch.func and double backward."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from synpo_fast import fused_linear_logprobs
from synpo_fast.ops import native_library
from tests.ops.linear_logprobs.problems import device_of


class Model(torch.nn.Module):
    """A trunk and a head, the loss of a batch with ignored labels and repeated rows."""

    def __init__(self, backend: str | None, **options) -> None:
        super().__init__()
        self.trunk = torch.nn.Linear(12, 16)
        self.head = torch.nn.Linear(16, 40)
        self.backend, self.options = backend, options

    def forward(self, x, labels, rows):
        hidden = torch.relu(self.trunk(x))
        logps = fused_linear_logprobs(
            hidden, self.head.weight, labels, bias=self.head.bias, rows=rows, backend=self.backend, **self.options
        )
        return -(logps * torch.linspace(0.5, 2.0, labels.shape[0], device=x.device)).sum()


@pytest.mark.parametrize("backend", [None, "chunked", "native", "triton"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen head", "trainable head"])
def test_a_compiled_model_trains_the_same(backend, frozen):
    torch.compiler.reset()
    device = device_of(backend or "chunked", torch.float32)
    model = Model(backend, softcap=8.0).to(device)
    model.head.requires_grad_(not frozen)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for num_labels in (9, 14, 14):  # another length compiles with a symbolic one
        x, rows = torch.randn(7, 12, device=device), torch.randint(7, (num_labels,), device=device)
        labels = torch.randint(40, (num_labels,), device=device)
        labels[::3] = -100
        grads = []
        for run in (model, compiled):
            model.zero_grad(set_to_none=True)
            loss = run(x, labels, rows)
            loss.backward()
            grads.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        assert len(grads[0]) == (3 if frozen else 5)
        for eager, traced in zip(*grads, strict=True):
            torch.testing.assert_close(traced, eager)


def test_the_operators_pass_torchs_own_checks():
    hidden, weight = torch.randn(6, 8), torch.randn(20, 8)
    labels = torch.tensor([1, -100, 3, 4, -100, 19])
    forward = torch.ops.synpo_fast.linear_logprobs_forward
    arguments = (hidden, weight, labels, None, None, 1.0, None, -100, True, 2, True, True, True, "chunked")
    torch.library.opcheck(forward, arguments)
    saved = forward(*arguments)[:4]
    torch.library.opcheck(
        torch.ops.synpo_fast.linear_logprobs_backward,
        (torch.randn(6), hidden, weight, labels, None, None, *saved, 1.0, None, -100, True, True, True, "chunked"),
    )


def test_tensors_without_values():
    hidden = torch.empty(3, 5, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(20, 8, device="meta", dtype=torch.bfloat16)
    logps = fused_linear_logprobs(hidden, weight, torch.empty(3, 5, device="meta", dtype=torch.long))
    logps.sum().backward()
    assert logps.shape == (3, 5) and logps.dtype == torch.float32 and logps.is_meta
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    with FakeTensorMode():
        fake = fused_linear_logprobs(
            torch.randn(4, 8), torch.randn(9, 8), torch.zeros(4, dtype=torch.long), backend="chunked"
        )
    assert fake.shape == (4,) and fake.dtype == torch.float32


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_double_backward_raises(backend):
    if backend == "native" and not native_library.is_available():
        pytest.skip(str(native_library.reason_unavailable()))
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"differentiated once.*backend='reference'"):
        logps = fused_linear_logprobs(hidden, weight, labels, backend=backend)
        torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    logps = fused_linear_logprobs(hidden, weight, labels, backend="reference")
    (grad,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    grad.square().sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_torch_func_raises():
    weight, labels = torch.randn(9, 8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"does not support torch.func"):
        torch.func.grad(lambda h: fused_linear_logprobs(h, weight, labels).sum())(torch.randn(4, 8))
    with pytest.raises(RuntimeError, match=r"does not support torch.func"):
        torch.vmap(lambda h: fused_linear_logprobs(h, weight, labels))(torch.randn(2, 4, 8))
