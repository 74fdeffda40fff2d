"""The problem that every contestant gets, its fp64 truth, and the error against it.

Hidden states and head are Gaussian. The head's entries have standard deviation 0.02, as in trained models. The hidden states are
scaled so that the softmax has a mean entropy of 1.5 nats, like a language model's on its own text. Labels are drawn from that
softmax: most are likely tokens, some are not. The rows are sequences of up to 1024 tokens whose last part is the response; the
prompt before it is ignored (-100). The upstream gradient is fixed and differs from token to token, as a preference loss's does:
negative on the first half of the sequences (chosen), positive on the second (rejected).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.head.shapes import Shape

IGNORE_INDEX = -100
SEQUENCE_LENGTH = 1024
TARGET_ENTROPY = 1.5
HEAD_STD = 0.02
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A result is wrong if its error is above WRONG_FACTOR times eager's, plus WRONG_SLACK.
WRONG_FACTOR = 4.0
WRONG_SLACK = {torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float32: 1e-6}


@dataclass(frozen=True)
class Inputs:
    """The tensors of one problem. `hidden` and `weight` require gradients if the case needs them."""

    hidden: Tensor  # [R, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [R] int64, IGNORE_INDEX where ignored
    upstream: Tensor  # [R] fp32: d loss / d log-prob, 0 where ignored
    head: str = "frozen"  # or "trainable"
    mode: str = "train"  # or "no_grad"

    @property
    def valid(self) -> Tensor:
        """[N] int64: the rows whose label is not ignored."""
        return (self.labels != IGNORE_INDEX).nonzero().squeeze(1)

    def case(self, *, head: str, mode: str) -> Inputs:
        """A copy whose tensors require the gradients that `head` and `mode` need. Raises ValueError for other values."""
        if head not in ("frozen", "trainable") or mode not in ("train", "no_grad"):
            raise ValueError(f"head must be frozen or trainable and mode train or no_grad, not {head!r} and {mode!r}")
        train = mode == "train"
        return replace(
            self,
            hidden=self.hidden.detach().requires_grad_(train),
            weight=self.weight.detach().requires_grad_(train and head == "trainable"),
            head=head,
            mode=mode,
        )


@dataclass(frozen=True)
class Result:
    """The results of a contestant: log-probs [R] (0 for ignored rows) and the gradients that the case needs."""

    log_probs: Tensor
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None


@dataclass(frozen=True)
class Truth:
    """The exact values in fp64: of a sample of rows, and of the head's gradient for a sample of vocabulary rows."""

    rows: Tensor  # [K] rows compared: valid ones, and some ignored ones whose values must be 0
    log_probs: Tensor  # [K]
    grad_hidden: Tensor  # [K, D]
    vocabulary: Tensor  # [U]
    grad_weight: Tensor | None  # [U, D]


def valid_mask(num_rows: int, share: float) -> Tensor:
    """[R] bool, true on the last `share` of every sequence, at least one row of each. Raises ValueError for bad arguments."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of valid rows must be in (0, 1], not {share}")
    if num_rows < 1:
        raise ValueError(f"rows must be at least 1, not {num_rows}")
    start = torch.arange(num_rows) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
    length = (num_rows - start).clamp(max=SEQUENCE_LENGTH)
    prompt = (length * (1 - share)).round().long().clamp(max=length - 1)
    return torch.arange(num_rows) - start >= prompt


def make_inputs(
    shape: Shape, *, num_rows: int, valid: float, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = (normal(shape.V, shape.D) * HEAD_STD).to(dtype)
    hidden = normal(num_rows, shape.D)
    hidden = (hidden * _entropy_scale(hidden[:64], weight)).to(dtype)

    mask = valid_mask(num_rows, valid).to(device)
    rows = mask.nonzero().squeeze(1)
    labels = torch.full((num_rows,), IGNORE_INDEX, device=device)
    for block in rows.split(1024):
        probabilities = (hidden[block] @ weight.T).float().softmax(-1)
        labels[block] = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    size = 0.5 + torch.rand(num_rows, generator=generator, device=device)
    num_sequences = -(-num_rows // SEQUENCE_LENGTH)
    if num_sequences > 1:
        rejected = torch.arange(num_rows, device=device) // SEQUENCE_LENGTH >= num_sequences // 2
    else:
        rejected = torch.arange(num_rows, device=device) >= rows[len(rows) // 2]
    sign = torch.where(rejected, 1.0, -1.0)
    upstream = torch.where(mask, sign * size / len(rows), 0.0)
    return Inputs(hidden, weight, labels, upstream)


def _entropy_scale(hidden: Tensor, weight: Tensor) -> float:
    """The factor on `hidden` with which the softmax has a mean entropy of TARGET_ENTROPY, found by bisection."""
    logits = hidden @ weight.float().T

    def mean_entropy(scale: float) -> float:
        log_probs = (logits * scale).log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1).mean().item()

    low, high = 0.0, 1.0
    while mean_entropy(high) > TARGET_ENTROPY:
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(middle) > TARGET_ENTROPY else (low, middle)
    return high


def fp64_truth(inputs: Inputs, *, num_rows: int, num_vocabulary: int = 1024, with_weight: bool = True) -> Truth:
    """Computes the exact values in fp64, from the inputs as rounded to their dtype.

    Log-probs and the hidden gradient are for at most `num_rows` valid rows. The head's gradient sums over all valid rows, so it
    costs a pass over all of them; it is kept for `num_vocabulary` vocabulary rows, of which up to half are labels.
    """
    device, valid = inputs.hidden.device, inputs.valid
    generator = torch.Generator().manual_seed(1)

    def pick(candidates: Tensor, count: int) -> Tensor:
        return candidates[torch.randperm(len(candidates), generator=generator)[:count].to(device)]

    sample = pick(valid, num_rows)
    labels = pick(inputs.labels[valid].unique(), num_vocabulary // 2)
    others = pick(torch.arange(inputs.weight.shape[0], device=device), num_vocabulary - len(labels))
    vocabulary = torch.cat([labels, others]).unique()

    weight = inputs.weight.detach().double()
    log_probs, grad_hidden = [], []
    grad_weight = torch.zeros(len(vocabulary), weight.shape[1], dtype=torch.float64, device=device)
    rest = valid[~torch.isin(valid, sample)] if with_weight else valid[:0]
    for rows, sampled in [(rows, True) for rows in sample.split(256)] + [(rows, False) for rows in rest.split(256)]:
        hidden = inputs.hidden[rows].detach().double()
        target = inputs.labels[rows].unsqueeze(1)
        log_softmax = (hidden @ weight.T).log_softmax(-1)
        upstream = inputs.upstream[rows].double().unsqueeze(1)
        if sampled:
            log_probs.append(log_softmax.gather(1, target).squeeze(1))
        dlogits = log_softmax.exp_().mul_(-upstream).scatter_add_(1, target, upstream)
        if sampled:
            grad_hidden.append(dlogits @ weight)
        if with_weight:
            grad_weight += dlogits[:, vocabulary].T @ hidden
        del log_softmax, dlogits

    ignored = pick((inputs.labels == IGNORE_INDEX).nonzero().squeeze(1), 64)
    return Truth(
        rows=torch.cat([sample, ignored]),
        log_probs=torch.cat([*log_probs, weight.new_zeros(len(ignored))]),
        grad_hidden=torch.cat([*grad_hidden, weight.new_zeros(len(ignored), weight.shape[1])]),
        vocabulary=vocabulary,
        grad_weight=grad_weight if with_weight else None,
    )


def relative_error(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth||; inf or nan if the output is not finite."""
    return ((out.double() - truth).norm() / truth.norm()).item()


def errors(result: Result, truth: Truth, inputs: Inputs) -> dict[str, float]:
    """Relative errors of everything that the case computes. Raises ValueError if the result lacks one of them."""
    found = {"log_probs": relative_error(_part(result.log_probs, inputs.labels.shape)[truth.rows], truth.log_probs)}
    if inputs.mode == "train":
        grad_hidden = _part(result.grad_hidden, inputs.hidden.shape)
        found["grad_hidden"] = relative_error(grad_hidden[truth.rows], truth.grad_hidden)
        if inputs.head == "trainable":
            assert truth.grad_weight is not None
            grad_weight = _part(result.grad_weight, inputs.weight.shape)
            found["grad_weight"] = relative_error(grad_weight[truth.vocabulary], truth.grad_weight)
    return found


def _part(tensor: Tensor | None, shape: torch.Size) -> Tensor:
    if tensor is None or tensor.shape != shape:
        found = "nothing" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
        raise ValueError(f"expected a tensor of shape {tuple(shape)}, got {found}")
    return tensor.detach()


def why_wrong(found: dict[str, float], eager: dict[str, float], dtype: torch.dtype) -> str | None:
    """Describes the first error above WRONG_FACTOR times eager's plus slack; None if there is none. NaN is wrong."""
    for name, error in found.items():
        limit = WRONG_FACTOR * eager[name] + WRONG_SLACK[dtype]
        if not error <= limit:
            return f"error of {name} is {error:.1e}; the limit is {limit:.1e} ({WRONG_FACTOR:g}x eager's, plus slack)"
    return None
