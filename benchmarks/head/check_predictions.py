"""Measures the Triton kernels on a GPU, each kernel by itself, and prints predicted beside measured times.

    python benchmarks/head/check_predictions.py [--shapes headline] [--rows 512 4096 16384] [--repeats 5]

Timed are the forward with a frozen head, and the gradient of a trained head that keeps no exponentials. The times are
torch.profiler's. A ratio far from 1 names the constant of the model that is wrong: see "Predicted times" in
synpo_fast/ops/linear_logprobs/README.md.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

if __package__ in (None, ""):  # started by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.head.shapes import Shape, find_shapes
from synpo_fast import fused_linear_logprobs
from synpo_fast.ops.linear_logprobs.triton_config import KernelConfig, cut_forward, cut_weight_grad, kernel_config
from synpo_fast.ops.linear_logprobs.triton_time_model import backward_products, forward_products, product_time

KERNELS = {
    "exponentials": "_exp_logits_forward_kernel",
    "weighted": "_weighted_rows_kernel",
    "logit_grads": "_logit_grads_backward_kernel",
    "weight_grad": "_weight_grad_backward_kernel",
}


def predicted_times(shape: Shape, num_rows: int, config: KernelConfig, programs: int) -> dict[str, float]:
    """Seconds of each kernel, over all its launches in one forward or backward pass."""
    head = (shape.D, shape.V, 2, config)
    cuts, columns = cut_forward(num_rows, *head, programs), cut_weight_grad(num_rows, *head, programs)
    times = dict.fromkeys(KERNELS.values(), 0.0)
    products = [*forward_products(cuts, *head, programs), *backward_products(num_rows, *head, columns)]
    for product in products:
        times[KERNELS[product.kernel]] += product.launches * product_time(product, config.chip, programs)
    return times


def measured_times(shape: Shape, num_rows: int, repeats: int) -> dict[str, float]:
    """Seconds of each kernel on the GPU, the mean of `repeats` passes."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(num_rows, shape.D, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(shape.V, shape.D, device="cuda", generator=generator).mul_(0.02).bfloat16()
    labels = torch.randint(shape.V, (num_rows,), device="cuda", generator=generator)
    x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    frozen = _kernel_times(lambda: fused_linear_logprobs(x, weight, labels, backend="triton"), repeats)
    logps = fused_linear_logprobs(hidden, w, labels, keep_bytes=0, backend="triton").sum()
    trained = _kernel_times(lambda: torch.autograd.grad(logps, w, retain_graph=True), repeats)
    return trained | frozen


def _kernel_times(run: Callable[[], object], repeats: int) -> dict[str, float]:
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1e6 / repeats for event in profile.key_averages()}


def comparison(shape: Shape, num_rows: int, predicted: dict[str, float], measured: dict[str, float]) -> list[str]:
    """A line for each kernel: predicted and measured milliseconds, ratio, TFLOP/s. A kernel without a time is an error."""
    lines = []
    for kernel, seconds in predicted.items():
        if not measured.get(kernel):
            raise ValueError(f"{kernel} has no measured time; measured were: {', '.join(sorted(measured)) or 'none'}")
        rate = 2 * num_rows * shape.D * shape.V / measured[kernel] / 1e12
        lines.append(
            f"{shape.D}x{shape.V:<7} {num_rows:>6} {kernel:30} {1e3 * seconds:9.3f} {1e3 * measured[kernel]:9.3f} "
            f"{measured[kernel] / seconds:6.2f} {rate:8.0f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["headline"], metavar="DxV", help="shapes of the head")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 4096, 16384], help="rows of hidden states")
    parser.add_argument("--repeats", type=int, default=5, help="passes over which times are averaged")
    options = parser.parse_args()
    try:
        shapes = find_shapes(options.shapes)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("this needs a GPU; the predictions alone are in benchmarks/results/predicted/triton_head.md")
    properties = torch.cuda.get_device_properties("cuda")
    config = kernel_config(torch.bfloat16, 10 * properties.major + properties.minor)
    print(f"{properties.name}: {properties.multi_processor_count} multiprocessors, torch {torch.__version__}")
    print(f"{'head':12} {'rows':>6} {'kernel':30} {'predicted':>9} {'measured':>9} {'ratio':>6} {'TFLOP/s':>8}")
    for shape in shapes:
        for rows in options.rows:
            predicted = predicted_times(shape, rows, config, properties.multi_processor_count)
            print("\n".join(comparison(shape, rows, predicted, measured_times(shape, rows, options.repeats))))


if __name__ == "__main__":
    main()
