"""A caller's mistake is a ValueError that names the values; nothing crashes the process."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from synpo_fast import fused_linear_logprobs
from synpo_fast.ops import native_library
from tests.ops.linear_logprobs.problems import DEVICE

H, W, Y = torch.randn(4, 8), torch.randn(10, 8), torch.tensor([1, 2, 3, -100])


def call(hidden=H, weight=W, labels=Y, **options):
    return fused_linear_logprobs(hidden, weight, labels, **options)


MISTAKES = {
    "features": ({"hidden": torch.randn(4, 7)}, r"D=7 .*\[10, 8\]"),
    "label shape": ({"labels": torch.tensor([1, 2])}, r"\[4\], got \[2\]"),
    "weight dimensions": ({"weight": torch.randn(10)}, r"\[4, 8\] and \[10\]"),
    "empty head": ({"weight": torch.randn(0, 8)}, r"\[0, 8\]"),
    "no features": ({"hidden": torch.randn(4, 0), "weight": torch.randn(10, 0)}, r"\[10, 0\]"),
    "label too large": ({"labels": torch.tensor([1, 10, 3, 3])}, r"labels\[1\] = 10 .*\[0, 10\)"),
    "label negative": ({"labels": torch.tensor([1, 1, 3, -7])}, r"labels\[3\] = -7 "),
    "label after an ignored one": ({"labels": torch.tensor([-100, 1, 99, 3])}, r"labels\[2\] = 99 "),
    "other ignore_index": ({"ignore_index": -1}, r"labels\[3\] = -100 .*ignore_index=-1"),
    "float labels": ({"labels": Y.float()}, r"labels must hold integers, got torch.float32"),
    "bool labels": ({"labels": Y > 0}, r"labels must hold integers, got torch.bool"),
    "head of another dtype": ({"weight": W.bfloat16()}, r"weight is torch.bfloat16 but hidden is torch.float32"),
    "integer hidden": ({"hidden": H.long(), "weight": W.long()}, r"got torch.int64"),
    "complex hidden": ({"hidden": H.cfloat(), "weight": W.cfloat()}, r"got torch.complex64"),
    "bias shape": ({"bias": torch.randn(9)}, r"\[10\], got \[9\]"),
    "bias dtype": ({"bias": torch.randn(10).half()}, r"bias is torch.float16"),
    "rows shape": ({"rows": torch.tensor([0, 1])}, r"\[4\], got \[2\]"),
    "rows dtype": ({"rows": torch.zeros(4)}, r"rows must hold integers"),
    "row outside": ({"rows": torch.tensor([0, 1, 4, 0])}, r"rows\[2\] = 4 is outside \[0, 4\)"),
    "row negative": ({"rows": torch.tensor([0, -1, 2, 0])}, r"rows\[1\] = -1 "),
    "another device": ({"weight": W.to("meta")}, r"weight is on meta but hidden is on cpu"),
    "infinite scale": ({"logit_scale": float("inf")}, r"logit_scale must be finite in float32, got inf"),
    "nan scale": ({"logit_scale": float("nan")}, r"logit_scale must be finite in float32, got nan"),
    "zero scale": ({"logit_scale": 0.0}, r"logit_scale must not be 0"),
    "scale of another type": ({"logit_scale": "1"}, r"logit_scale must be a number, got '1'"),
    "huge scale": ({"logit_scale": 1e300}, r"logit_scale must be finite in float32, got 1e\+300"),
    "huge integer scale": ({"logit_scale": 10**400}, r"logit_scale must be finite in float32, got 10000"),
    "tiny softcap": ({"softcap": 1e-60}, r"softcap must not be 0 in float32, got 1e-60"),
    "huge ignore_index": (
        {"ignore_index": 2**70},
        r"ignore_index must be a 64-bit integer, got 1180591620717411303424",
    ),
    "rows into nothing": (
        {"hidden": torch.randn(0, 8), "rows": torch.zeros(4).long()},
        r"rows picks 4 rows but hidden \[0, 8\] has none",
    ),
    "negative softcap": ({"softcap": -1.0}, r"softcap must be positive, got -1.0"),
    "infinite softcap": ({"softcap": float("inf")}, r"softcap must be finite in float32"),
    "ignore_index of another type": ({"ignore_index": 1.5}, r"ignore_index must be a 64-bit integer, got 1.5"),
    "unknown backend": ({"backend": "cuda"}, r"one of reference, chunked, native, triton or None, got 'cuda'"),
    "not a tensor": ({"hidden": [[1.0]]}, r"hidden must be a tensor, got list"),
    "no labels": ({"labels": None}, r"labels must be a tensor, got NoneType"),
    "sparse hidden": ({"hidden": H.to_sparse()}, r"dense tensor"),
    "0-dimensional hidden": ({"hidden": torch.tensor(1.0)}, r"hidden must be \[..., D\]"),
}


@pytest.mark.parametrize("backend", ["reference", "chunked", "native", "triton", None])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, backend):
    if backend == "native" and not native_library.is_available():
        pytest.skip(str(native_library.reason_unavailable()))
    arguments, message = MISTAKES[mistake]
    on_device_only = ("label too large", "label negative", "label after", "other ignore", "row outside", "row negative")
    if backend == "triton":  # where there is a GPU it wants the tensors there, all but the one that is elsewhere
        given = {"hidden": H, "weight": W, "labels": Y, **arguments}
        arguments = {
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) and not value.is_meta else value
            for name, value in given.items()
        }
        message = message.replace("is on cpu", f"is on {DEVICE}")
    if backend == "triton" and mistake.startswith(on_device_only):
        assert torch.isnan(call(**{**arguments, "backend": backend})).any(), "out of range shows as NaN on a GPU"
        return
    with pytest.raises(ValueError, match=message):
        call(**{"backend": backend, **arguments})


class Quantised(torch.Tensor):
    """A tensor that wraps another, as torchao's quantised weights do."""

    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise AssertionError(f"the op must not compute with it, it called {func}")


@pytest.mark.parametrize("backend", ["reference", "chunked", "native", "triton", None])
def test_tensors_without_memory_are_refused_with_the_way_out(backend):
    """Their pointer is null: on a GPU the kernels would read address 0."""
    is_new = not dist.is_initialized()  # the trainer's tests may have left such a group in this process
    if is_new:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(torch.randn(10, 8, requires_grad=True), mesh, [Shard(0)])
        for weight in (sharded, torch.nn.Parameter(sharded)):
            with pytest.raises(ValueError, match=r"weight is a DTensor, sharded over .*weight\.full_tensor\(\)"):
                call(weight=weight, backend=backend)
        with pytest.raises(ValueError, match=r"bias is a DTensor.*bias\.full_tensor\(\)"):
            call(bias=sharded[:, 0], backend=backend)
        with pytest.raises(ValueError, match="hidden is a DTensor"):
            call(sharded[:4], sharded, backend=backend)
        if backend in ("chunked", "reference"):
            gathered = sharded.full_tensor()
            call(weight=gathered, backend=backend).sum().backward()
            assert sharded.grad is not None
    finally:
        if is_new:
            dist.destroy_process_group()
    for weight in (Quantised(W), torch.nn.Parameter(Quantised(W))):
        with pytest.raises(ValueError, match=r"weight is a Quantised, which has no memory .*weight\.dequantize\(\)"):
            call(weight=weight, backend=backend)
    with pytest.raises(ValueError, match=r"hidden is a AsyncCollectiveTensor, which has no memory .*hidden\.wait\(\)"):
        call(AsyncCollectiveTensor(H), backend=backend)


def test_parameters_and_subclasses_with_memory_are_taken():
    class Named(torch.Tensor):
        pass

    expected = call(backend="chunked")
    for weight in (torch.nn.Parameter(W), W.as_subclass(Named), torch.nn.Buffer(W)):
        assert torch.equal(call(weight=weight, backend="chunked"), expected)


def test_an_impossible_backend_says_why(monkeypatch):
    with pytest.raises(ValueError, match=r"native.*float64"):
        call(H.double(), W.double(), backend="native")
    with pytest.raises(ValueError, match=r"triton.*float64"):
        call(H.double(), W.double(), backend="triton")
    with pytest.raises(ValueError, match=r"native.*meta|native.*no compiled library|meta"):
        monkeypatch.setattr(native_library, "reason_unavailable", lambda: "no compiled library")
        call(backend="native")


def test_the_native_operators_check_for_themselves():
    """torch.ops can be called without the Python in front of it."""
    if not native_library.is_available():
        pytest.skip(str(native_library.reason_unavailable()))
    forward = torch.ops.synpo_fast_native.linear_logprobs_forward
    with pytest.raises(ValueError, match="label 10 at position 1 is outside"):
        forward(H, W, torch.tensor([1, 10, 3, 3]), None, 1.0, None, *_results(4))
    for place, name in enumerate(("logps", "normalisers", "direction", "exponentials", "stats")):
        wrong = list(_results(4))
        wrong[place] = wrong[place].new_empty(5, *wrong[place].shape[1:])
        with pytest.raises(ValueError, match=f"{name} must be contiguous|exponentials of 5 rows cannot be kept"):
            forward(H, W, torch.tensor([1, 2, 3, 3]), None, 1.0, None, *wrong)


def _results(num_rows):
    """Tensors that the native forward fills, for H and W."""
    shapes = ((num_rows,), (num_rows, 2), (num_rows, H.shape[1]), (num_rows, W.shape[0]), (num_rows, 4))
    return tuple(torch.empty(shape) for shape in shapes)


def test_a_missing_native_library_is_said_once(monkeypatch):
    from synpo_fast.ops.linear_logprobs import backends

    monkeypatch.setattr(native_library, "reason_unavailable", lambda: "not built here")
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="'chunked', not 'native': not built here"):
        call()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


any_number = st.one_of(st.floats(), st.integers(-3, 3), st.none(), st.booleans(), st.text(max_size=2))
any_dtype = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
     torch.complex64]
)  # fmt: skip
any_shape = st.lists(st.integers(0, 5), min_size=0, max_size=3)


@pytest.mark.parametrize("backend", ["chunked", "native", "triton"])
@settings(max_examples=300)
@given(data=st.data())
def test_fuzz(backend, data):
    """Arguments of any shape, dtype and value: a result of the right shape or a ValueError, never anything else."""
    draw = data.draw
    wild = draw(st.booleans())
    dtype = draw(any_dtype) if wild else torch.float32
    hidden = torch.zeros(draw(any_shape) if wild else [4, 3]).to(dtype)
    weight = torch.zeros(draw(any_shape) if wild else [5, 3]).to(draw(any_dtype) if wild else dtype)
    label = st.integers(-(2**62), 2**62) if wild else st.integers(-101, 6)
    labels = torch.tensor(draw(st.lists(label, min_size=0 if wild else 4, max_size=4)), dtype=torch.int64)
    if wild and draw(st.booleans()):
        labels = labels.to(draw(any_dtype))
    options = {}
    if draw(st.booleans()):
        options["logit_scale"] = draw(any_number)
    if draw(st.booleans()):
        options["softcap"] = draw(any_number)
    if draw(st.booleans()):
        options["rows"] = torch.tensor(draw(st.lists(st.integers(-2, 5), max_size=4)), dtype=torch.int64)
    if draw(st.booleans()):
        options["bias"] = torch.zeros(draw(st.integers(0, 6)))
    try:
        logps = fused_linear_logprobs(hidden, weight, labels, backend=backend, **options)
    except ValueError as error:
        assert len(str(error)) > 20
    else:
        assert logps.shape == labels.shape and logps.is_floating_point()
