"""The losses in plain Python floats, one pair at a time, and small ragged inputs for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from synpo_fast.losses import LOSSES, PairLogprobs

Response = Sequence[float]

KL = 0.3  # the reference point of kto

# One choice of options for every branch of every loss.
CASES: list[tuple[str, dict[str, float | str | bool]]] = [
    ("synpo", {}),
    ("synpo", {"alpha": 4.0, "beta": 0.5, "link": "logsigmoid"}),
    ("dpo", {}),
    ("dpo", {"variant": "hinge", "beta": 0.3}),
    ("dpo", {"variant": "ipo", "beta": 0.5}),
    ("dpo", {"label_smoothing": 0.2}),
    ("dpo", {"reference_free": True}),
    ("dpo", {"f_divergence": "js_divergence", "beta": 0.7}),
    ("dpo", {"ld_alpha": 0.3}),
    ("hinge", {"beta": 0.3, "f_divergence": "forward_kl"}),
    ("ipo", {"beta": 0.5, "ld_alpha": 0.0}),
    ("sigmoid_norm", {"beta": 2.0}),
    ("robust", {}),
    ("robust", {"label_smoothing": 0.2, "f_divergence": "alpha_divergence"}),
    ("exo_pair", {}),
    ("exo_pair", {"label_smoothing": 0.1, "reference_free": True}),
    ("discopop", {}),
    ("discopop", {"discopop_tau": 1.5, "f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    ("nca_pair", {"ld_alpha": 0.5}),
    ("bco_pair", {}),
    ("bco_pair", {"reference_free": True}),
    ("sppo_hard", {"beta": 0.5}),
    ("apo_zero", {}),
    ("apo_down", {"beta": 0.4}),
    ("aot", {}),
    ("aot", {"label_smoothing": 0.2, "ld_alpha": 0.4}),
    ("aot_unpaired", {"label_smoothing": 0.1}),
    ("simpo", {}),
    ("simpo", {"gamma": -0.3, "label_smoothing": 0.1}),
    ("orpo", {}),
    ("orpo", {"beta": 0.7, "nll_reduce": "token_mean"}),
    ("cpo", {}),
    ("cpo", {"variant": "hinge", "nll_weight": 0.5, "nll_reduce": "sum"}),
    ("cpo", {"label_smoothing": 0.3}),
    ("cpo_simpo", {}),
    ("cpo_simpo", {"gamma": 1.1, "label_smoothing": 0.2, "nll_weight": 0.4, "nll_reduce": "token_mean"}),
    ("synpo_ref", {}),
    ("synpo_ref", {"alpha": 4.0, "beta": 0.5, "link": "logsigmoid"}),
    ("kto", {}),
    ("kto", {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.6}),
    ("apo_zero_unpaired", {}),
    ("apo_zero_unpaired", {"beta": 0.4, "desirable_weight": 0.0, "undesirable_weight": 2.0}),
]
CASE_IDS = [name + "".join(f"-{key}={value}" for key, value in options.items()) for name, options in CASES]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def smoothed(z: float, eps: float) -> float:
    return -(1 - eps) * log_sigmoid(z) - eps * log_sigmoid(-z)


def mean(y: Response) -> float:
    return math.fsum(y) / len(y)


def synpo(chosen: Response, rejected: Response, *, alpha=30.0, beta=0.2, link="sigmoid") -> float:
    x = alpha * (math.exp(mean(chosen)) - math.exp(mean(rejected)))
    A = mean([math.exp(lp) for lp in chosen])
    return -(sigmoid(x) if link == "sigmoid" else log_sigmoid(x)) - beta * A


def synpo_ref(pair, reference, *, alpha=30.0, beta=0.2, link="sigmoid") -> float:
    gains = [math.exp(mean(y)) - math.exp(mean(ref)) for y, ref in zip(pair, reference, strict=True)]
    x = alpha * (gains[0] - gains[1])
    A = mean([math.exp(lp) for lp in pair[0]])
    return -(sigmoid(x) if link == "sigmoid" else log_sigmoid(x)) - beta * A


def ld_sum(pair, index: int, ld_alpha: float) -> float:
    shared = min(map(len, pair))
    return math.fsum(pair[index][:shared]) + ld_alpha * math.fsum(pair[index][shared:])


def f_score(r: float, divergence: str, coefficient: float) -> float:
    """f'(exp(r)) with the derivatives as the f-DPO paper lists them."""
    t = math.exp(r)
    if divergence == "forward_kl":
        return 1 - 1 / t
    if divergence == "js_divergence":
        return math.log(2 * t / (1 + t))
    if divergence == "alpha_divergence" and coefficient != 1:
        return (t ** (coefficient - 1) - 1) / (coefficient - 1)
    return r


def dpo_type(name: str, pairs, references, options) -> list[float]:
    """The losses of log-ratios to a reference. A batch at once, for the two that sort it."""
    given = {"beta": 0.1, "ld_alpha": 1.0, "f_divergence": "reverse_kl", "f_alpha_divergence_coef": 0.5, **options}
    beta, eps = given["beta"], given.get("label_smoothing", 1e-3 if name == "exo_pair" else 0.0)
    name = given.get("variant", name) if name == "dpo" else name
    sums = [[ld_sum(pair, i, given["ld_alpha"]) for i in (0, 1)] for pair in pairs]
    refs = [
        [0.0 if given.get("reference_free") else ld_sum(pair, i, given["ld_alpha"]) for i in (0, 1)]
        for pair in references
    ]
    ratios = [[s - ref for s, ref in zip(*two, strict=True)] for two in zip(sums, refs, strict=True)]
    if name.startswith("aot"):
        u = [r[0] for r in ratios] if name == "aot_unpaired" else [s[0] - s[1] for s in sums]
        v = [r[1] for r in ratios] if name == "aot_unpaired" else [s[0] - s[1] for s in refs]
        return [smoothed(beta * (each - sorted(v)[sorted(u).index(each)]), eps) for each in u]
    return [_of_pair(name, r, [len(y) for y in pair], beta, eps, given) for r, pair in zip(ratios, pairs, strict=True)]


def _of_pair(name: str, r, lengths, beta: float, eps: float, given) -> float:
    x, y = beta * r[0], beta * r[1]
    by_response = {
        "nca_pair": lambda: -log_sigmoid(x) - 0.5 * (log_sigmoid(-x) + log_sigmoid(-y)),
        "bco_pair": lambda: -log_sigmoid(x) - log_sigmoid(-y),
        "sppo_hard": lambda: (r[0] - 0.5 / beta) ** 2 + (r[1] + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - sigmoid(x) + sigmoid(y),
        "apo_down": lambda: sigmoid(x) + 1 - sigmoid(x - y),
    }
    if name in by_response:
        return by_response[name]()
    s = [f_score(each, given["f_divergence"], given["f_alpha_divergence_coef"]) for each in r]
    z, d = beta * (s[0] - s[1]), s[0] / lengths[0] - s[1] / lengths[1]
    tau = given.get("discopop_tau", 0.05)
    return {
        "dpo": lambda: smoothed(z, eps),
        "hinge": lambda: max(0.0, 1 - z),
        "ipo": lambda: (d - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": lambda: -log_sigmoid(beta * d),
        "robust": lambda: (eps * log_sigmoid(-z) - (1 - eps) * log_sigmoid(z)) / (1 - 2 * eps),
        "exo_pair": lambda: sigmoid(z) * math.log(sigmoid(z) / (1 - eps)) + sigmoid(-z) * math.log(sigmoid(-z) / eps),
        "discopop": lambda: -log_sigmoid(z) * (1 - sigmoid(z / tau)) + math.exp(-z) * sigmoid(z / tau),
    }[name]()


def kto_response(y, reference, desirable, *, kl, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0) -> float:
    gain = beta * (math.fsum(y) - math.fsum(reference) - kl)
    return desirable_weight * (1 - sigmoid(gain)) if desirable else undesirable_weight * (1 - sigmoid(-gain))


def simpo(chosen: Response, rejected: Response, *, beta=2.0, gamma=0.5, label_smoothing=0.0) -> float:
    return smoothed(beta * (mean(chosen) - mean(rejected)) - gamma, label_smoothing)


def odds_ratio(chosen: Response, rejected: Response, *, beta=0.1) -> float:
    def log_odds(m: float) -> float:
        return m - math.log(-math.expm1(m))

    return -beta * log_sigmoid(log_odds(mean(chosen)) - log_odds(mean(rejected)))


def cpo_contrast(chosen: Response, rejected: Response, *, beta=0.1, variant="sigmoid", label_smoothing=0.0) -> float:
    h = math.fsum(chosen) - math.fsum(rejected)
    return max(0.0, 1 - beta * h) if variant == "hinge" else smoothed(beta * h, label_smoothing)


def nll(targets: Sequence[Response], reduce: str) -> list[float]:
    if reduce == "token_mean":
        return [-mean(y) for y in targets]
    if reduce == "sum":
        return [-math.fsum(y) for y in targets]
    total = sum(len(y) for y in targets)
    return [-math.fsum(y) * len(targets) / total for y in targets]


def losses(name, pairs, reference_pairs, options) -> list[float]:
    """Loss per pair; pairs and reference_pairs are lists of (chosen, rejected)."""
    if name == "synpo_ref":
        return [synpo_ref(pair, reference, **options) for pair, reference in zip(pairs, reference_pairs, strict=True)]
    if name in ("kto", "apo_zero_unpaired"):
        point = {"kto": KL, "apo_zero_unpaired": 0.0}[name]
        return [
            mean(
                [
                    kto_response(y, ref, i == 0, kl=point, **options)
                    for i, (y, ref) in enumerate(zip(*both, strict=True))
                ]
            )
            for both in zip(pairs, reference_pairs, strict=True)
        ]
    if LOSSES[name].reward == "beta*r":
        return dpo_type(name, pairs, reference_pairs, options)
    if name in ("synpo", "simpo"):
        return [{"synpo": synpo, "simpo": simpo}[name](*pair, **options) for pair in pairs]
    rest = dict(options)
    weight, reduce = rest.pop("nll_weight", 1.0), rest.pop("nll_reduce", "batch_token_mean")
    contrast = {"orpo": odds_ratio, "cpo": cpo_contrast, "cpo_simpo": simpo}[name]
    nlls = nll([chosen for chosen, _ in pairs], reduce)
    return [contrast(*pair, **rest) + weight * value for pair, value in zip(pairs, nlls, strict=True)]


def ragged_pairs(lengths: Sequence[tuple[int, int]], *, seed: int = 0, low: float = -3.0):
    """Couples of random log-probs in (low, 0), as lists of floats."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[float]:
        return (low * torch.rand(n, generator=generator, dtype=torch.float64) - 1e-3).tolist()

    return [(draw(num_chosen), draw(num_rejected)) for num_chosen, num_rejected in lengths]


def as_logprobs(pairs, dtype=torch.float64, **extra) -> PairLogprobs:
    tensors = [tuple(torch.tensor(y, dtype=dtype) for y in pair) for pair in pairs]
    return PairLogprobs.from_pairs(tensors, kl=torch.tensor(KL, dtype=dtype), **extra)


def with_grad(policy: PairLogprobs) -> tuple[PairLogprobs, Tensor, Tensor]:
    """Returns the pairs over new leaves that require grad, and those leaves."""
    chosen = policy.chosen.clone().requires_grad_()
    rejected = policy.rejected.clone().requires_grad_()
    return replace(policy, chosen=chosen, rejected=rejected), chosen, rejected
