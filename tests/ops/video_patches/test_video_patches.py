"""video_patches: the reference against the definition in fp64, the kernel against the reference to the bit."""

import itertools
import math

import pytest
import torch

from synpo_fast.ops.linear_logprobs import triton_support
from synpo_fast.ops.video_patches import Packing, reference, video_patches
from synpo_fast.ops.video_patches.video_patches import _choose_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # pixels are levels / 255

# (frames, size, packing): small, because the interpreter takes 20 ms for a row of a tile.
CASES = {
    "patches of two frames, an odd T, up and down": ((3, 11, 7), (8, 12), Packing(2, 2, 2)),
    "T = 2 in threes, two tiles": ((2, 4, 14), (12, 12), Packing(2, 3, 3)),
    "patches of one frame and one pixel": ((2, 5, 3), (4, 6), Packing(1, 2, 1)),
    "several tiles in each direction": ((1, 5, 4), (11, 130), None),
    "one pixel to many": ((2, 1, 1), (3, 4), None),
    "many to one pixel": ((1, 11, 7), (1, 1), None),
    "one row, shrunk 13 times": ((1, 1, 40), (1, 3), None),
    "shrunk 8 times": ((1, 16, 17), (2, 2), None),
    "height kept": ((2, 9, 7), (9, 12), None),
    "width kept": ((1, 9, 7), (5, 7), None),
    "size kept": ((2, 6, 10), (6, 10), None),
    "size kept, packed": ((1, 6, 12), (6, 12), Packing(3, 2, 2)),
}


@pytest.fixture(params=["reference", "triton"])
def backend(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


def device_of(backend: str) -> str:
    """The device to test on. The reference is bit-exact only on CPUs."""
    return DEVICE if backend == "triton" else "cpu"


def random_frames(*shape: int, contrast: bool = False) -> torch.Tensor:
    """contrast: only 0 and 255, so that the filter's overshoot is cut on both sides."""
    frames = torch.randint(256, (*shape, 3), dtype=torch.uint8)
    return (frames > 127).to(torch.uint8) * 255 if contrast else frames


def defined_weights(n_in: int, n_out: int) -> torch.Tensor:
    """[n_out, n_in] fp64, one value at a time from the definition: Keys' cubic with a = -1/2, widened where it shrinks."""
    scale = n_in / n_out
    widened = max(scale, 1.0)
    weights = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i, j in itertools.product(range(n_out), range(n_in)):
        x = abs(j + 0.5 - scale * (i + 0.5)) / widened
        if x < 1:
            weights[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1
        elif x < 2:
            weights[i, j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return weights / weights.sum(1, keepdim=True)


def levels_of(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.double().cpu() * 255).round()


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("shape, size", [((2, 41, 30), (16, 24)), ((1, 17, 36), (39, 19)), ((9, 19, 1), (14, 3))])
def test_against_the_definition(shape, size, contrast):
    """Rounded after each axis, columns first. Weights of 16 bits may move a value that lies near a half."""
    frames = random_frames(*shape, contrast=contrast)
    pixels = video_patches(frames, size=size, **LEVELS, backend="reference")
    rows = (frames.permute(0, 3, 1, 2).double() @ defined_weights(shape[2], size[1]).T).round().clamp(0, 255)
    expected = (defined_weights(shape[1], size[0]) @ rows).round().clamp(0, 255)
    difference = (levels_of(pixels) - expected).abs()
    assert pixels.shape == (shape[0], 3, *size)
    assert difference.max() <= 1 and (difference == 0).double().mean() >= 0.97


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_the_reference(case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize("case", ["several tiles in each direction", "size kept, packed"])
def test_the_kernel_equals_the_reference_in_bfloat16(case):
    check_case(case, torch.bfloat16)


def check_case(case: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    shape, size, packing = CASES[case]
    frames = random_frames(*shape, contrast=dtype == torch.float16)
    options = {"size": size, "mean": MEAN, "std": STD, "packing": packing, "dtype": dtype}
    expected = video_patches(frames, **options, backend="reference")
    pixels = video_patches(frames.to(DEVICE), **options, backend="triton")
    assert pixels.dtype == dtype and torch.equal(pixels.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, size, packing",
    [
        ((5, 1080, 1920), (448, 784), Packing(14, 2, 2)),
        ((3, 2160, 3840), (378, 378), None),
        ((9, 240, 426), (448, 784), Packing(16, 2, 1)),
    ],
)
def test_real_sizes_on_a_gpu(shape, size, packing):
    frames = random_frames(*shape)
    options = {"size": size, "mean": MEAN, "std": STD, "packing": packing}
    expected = video_patches(frames, **options)
    assert torch.equal(video_patches(frames.cuda(), **options).cpu(), expected)
    eager = video_patches(frames.cuda(), **options, backend="reference").cpu()
    assert (eager - expected).abs().max() <= 1.01 / 255 / min(STD)


@pytest.mark.parametrize("packing", [Packing(2, 2, 2), Packing(2, 2, 1), Packing(2, 1, 2), Packing(2, 3, 3)], ids=str)
def test_packing_order(packing):
    """Against loops that name every index. T = 5 needs padding by 0 or 1."""
    P, h, w = packing.patch_size, 6, 12
    frames = random_frames(5, h * P, w * P)
    size = (h * P, w * P)
    pixels = video_patches(frames, size=size, **LEVELS, packing=packing, backend="reference")
    t = -(-5 // packing.temporal_patch_size)
    assert packing.grid(5, size) == (t, h, w)
    rows = []
    blocks = itertools.product(range(t), range(0, h, packing.merge_size), range(0, w, packing.merge_size))
    for time, top, left in blocks:
        for i, j in itertools.product(range(packing.merge_size), repeat=2):
            y, x = (top + i) * P, (left + j) * P
            at = [min(time * packing.temporal_patch_size + dt, 4) for dt in range(packing.temporal_patch_size)]
            rows.append(torch.stack([frames[at, y : y + P, x : x + P, c] for c in range(3)]).flatten().tolist())
    assert levels_of(pixels).tolist() == rows


def test_normalising():
    frames = random_frames(1, 14, 15)
    exact = (frames.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    for dtype, error in ((torch.float32, 2**-22), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)):
        pixels = video_patches(frames, size=(14, 15), mean=MEAN, std=STD, dtype=dtype, backend="reference")
        torch.testing.assert_close(pixels.double(), exact.permute(0, 3, 1, 2), rtol=error, atol=error)


def test_a_flat_picture_stays_flat(backend):
    frames = torch.full((1, 13, 7, 3), 200, dtype=torch.uint8, device=device_of(backend))
    pixels = video_patches(frames, size=(5, 9), **LEVELS, backend=backend)
    assert levels_of(pixels).unique().tolist() == [200]


def test_views_are_read_where_they_lie(backend):
    whole = random_frames(3, 4, 6)
    channels_first = whole.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    options = {"size": (3, 7), "mean": MEAN, "std": STD}
    for view in (whole[1::2], channels_first[:1], whole[:1, 1:, 2:5], whole[:1].expand(2, -1, -1, -1)):
        expected = video_patches(view.contiguous(), **options, backend="reference")
        assert torch.equal(video_patches(view.to(device_of(backend)), **options, backend=backend).cpu(), expected)


@pytest.mark.parametrize("packing", [None, Packing(2, 2, 2)])
def test_the_reference_takes_a_few_frames_at_a_time(monkeypatch, packing):
    """Its memory besides the result depends on the chunk, not on the video; its result does not depend on the chunk."""
    frames = random_frames(11, 6, 6)
    options = {"size": (8, 8), "mean": MEAN, "std": STD, "packing": packing, "backend": "reference"}
    at_once = video_patches(frames, **options)
    seen = []
    resize = reference.resize_frames
    monkeypatch.setattr(reference, "resize_frames", lambda part, size: seen.append(len(part)) or resize(part, size))
    for frames_at_a_time in (1, 3, 4, 100):
        seen.clear()
        monkeypatch.setattr(reference, "CHUNK_BYTES", frames_at_a_time * 4 * 3 * 8 * 8)
        assert torch.equal(video_patches(frames, **options), at_once)
        assert sum(seen) == 11 and max(seen) <= max(frames_at_a_time, 1 if packing is None else 2)


def test_a_bounded_grid_takes_every_tile(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from synpo_fast.ops.video_patches import triton_launch

    frames = random_frames(3, 2, 3)
    options = {"size": (10, 132), "mean": MEAN, "std": STD}  # 12 tiles
    monkeypatch.setattr(triton_launch, "MAX_PROGRAMS", 5)
    pixels = video_patches(frames.to(DEVICE), **options, backend="triton")
    assert torch.equal(pixels.cpu(), video_patches(frames, **options, backend="reference"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": torch.zeros(2, 4, 4, 3)}, r"uint8 \[T, H, W, 3\].*float32 \[2, 4, 4, 3\]"),
        ({"frames": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, r"\[2, 3, 4, 4\]"),
        ({"frames": torch.zeros(4, 4, 3, dtype=torch.uint8)}, r"\[4, 4, 3\]"),
        ({"frames": torch.zeros(0, 4, 4, 3, dtype=torch.uint8)}, r"\[0, 4, 4, 3\]"),
        ({"frames": torch.zeros(2, 0, 4, 3, dtype=torch.uint8)}, r"\[2, 0, 4, 3\]"),
        ({"size": (0, 4)}, r"size must be .* got \(0, 4\)"),
        ({"size": (4.0, 4)}, r"\(4.0, 4\)"),
        ({"size": (4,)}, r"\(4,\)"),
        ({"mean": (0.5, 0.5)}, r"3 finite values.*\(0.5, 0.5\)"),
        ({"mean": (0.5, 0.5, math.nan)}, "nan"),
        ({"std": (0.5, 0.0, 0.5)}, r"std above 0.*\(0.5, 0.0, 0.5\)"),
        ({"dtype": torch.float64}, "float64"),
        ({"packing": Packing(3, 1)}, r"multiples of patch_size \* merge_size = 3 \* 1, got \(4, 4\)"),
        ({"packing": Packing(2, 4)}, r"2 \* 4, got \(4, 4\)"),
        ({"backend": "native"}, "reference, triton or None, got 'native'"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "frames": torch.zeros(2, 4, 4, 3, dtype=torch.uint8), "size": (4, 4), "mean": MEAN, "std": STD, **change
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        video_patches(arguments.pop("frames"), **arguments)


@pytest.mark.parametrize("values", [(0,), (2, -1), (2, 1, 0), (1.5,), (True,)])
def test_a_packing_of_nothing_is_refused(values):
    with pytest.raises(ValueError, match="positive int"):
        Packing(*values)


def test_the_cpu_has_the_reference(monkeypatch):
    frames = random_frames(1, 4, 4)
    options = {"size": (6, 6), "mean": MEAN, "std": STD}
    assert torch.equal(video_patches(frames, **options), video_patches(frames, **options, backend="reference"))
    monkeypatch.setattr(triton_support, "interpreting", lambda: False)
    monkeypatch.setattr(triton_support, "_installed", lambda: True)
    with pytest.raises(ValueError, match=r"backend='triton' cannot be used here.*CUDA tensors, frames are on cpu"):
        video_patches(frames, **options, backend="triton")


def test_a_gpu_without_triton_is_told(monkeypatch):
    monkeypatch.setattr(triton_support, "_installed", lambda: False)
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert _choose_backend(torch.device("cuda"), None) == "reference"
    with pytest.raises(ValueError, match="triton is not installed"):
        _choose_backend(torch.device("cuda"), "triton")
