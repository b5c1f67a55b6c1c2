"""The calibrated pruning methods in float64, straight from the papers: slow, plain, and written apart from the library's own.

Shapes throughout: weight ``[N, K]``, Hessian ``[K, K]`` (the mean over tokens of x xᵀ), masks bool ``[N, K]``, true where a
weight is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slidesparse.format import Scheme
from slidesparse.pattern import Pattern

# The layers that the methods are tried on.


@dataclass(frozen=True)
class Layer:
    """A linear layer's weight ``[N, K]`` and Hessian ``[K, K]``, both float32, and the tokens that the Hessian was taken from."""

    weight: Tensor
    hessian: Tensor
    tokens: int

    @property
    def norms(self) -> Tensor:
        """Float32 ``[K]``: root of the mean over tokens of x_k²."""
        return self.hessian.diagonal().double().sqrt().float()


def random_layer(
    n: int, k: int, tokens: int, rng: torch.Generator, *, decay: float = 0.7, mixed: float = 1, loud: float = 10, dead: int = 0
) -> Layer:
    """Inputs x = z A whose spectrum falls as i^-decay, a few channels ``loud`` times as loud, ``dead`` silent ones.

    ``mixed`` says how much of A is random, the rest being I: at 0 and without decay, inputs do not depend on one another. Every
    row of the weight has a scale of its own, and about one weight in a hundred is an outlier.
    """
    spectrum = torch.arange(1, k + 1, dtype=torch.float64) ** -decay
    mixing = mixed * torch.randn(k, k, generator=rng, dtype=torch.float64) + (1 - mixed) * torch.eye(k, dtype=torch.float64)
    x = (torch.randn(tokens, k, generator=rng, dtype=torch.float64) * spectrum) @ mixing
    x += 0.02 * torch.randn(tokens, k, generator=rng, dtype=torch.float64)
    order = torch.randperm(k, generator=rng)
    x[:, order[: 1 + k // 64]] *= loud
    x[:, order[k - dead :]] = 0
    weight = torch.randn(n, k, generator=rng) * torch.rand(n, 1, generator=rng).mul(3).exp() * 0.01
    weight *= torch.where(torch.rand(n, k, generator=rng) < 0.01, 10.0, 1.0)
    return Layer(weight, (x.T @ x / tokens).float(), tokens)


def varied_layers(count: int, patterns: Sequence[Pattern], rng: torch.Generator) -> list[tuple[Pattern, Layer]]:
    """Inputs from independent to nearly of low rank, with channels of all loudnesses, and calibration on few and on many tokens."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=rng))

    cases = []
    for i in range(count):
        k = 2 * draw(10, 100)
        decay, mixed, loud = 2 * float(torch.rand(1, generator=rng)), (0, 0.1, 1)[draw(0, 3)], (1, 5, 20)[draw(0, 3)]
        shape = draw(1, 40), k, draw(4, 6 * k)
        layer = random_layer(*shape, rng, decay=decay * mixed, mixed=mixed, loud=loud, dead=draw(0, 3))
        cases.append((patterns[i % len(patterns)], layer))
    return cases


# What is lost.


def output_errors(weight: Tensor, solution: Tensor, hessian: Tensor) -> Tensor:
    """Float64 ``[N]``: the mean over tokens of (s·x − w·x)², row by row."""
    difference = solution.double() - weight.double()
    return ((difference @ hessian.double()) * difference).sum(-1)


def layer_error_oracle(weight: Tensor, solution: Tensor, hessian: Tensor) -> float:
    """tr((S−W) H (S−W)ᵀ) / tr(W H Wᵀ): the share of the output's energy that pruning loses."""
    lost, all_of_it = output_errors(weight, solution, hessian).sum(), output_errors(weight, torch.zeros_like(weight), hessian).sum()
    return float(lost / all_of_it)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping · mean(diag H) · I in float64."""
    h = hessian.double()
    return h + damping * h.diagonal().mean() * torch.eye(h.shape[0], dtype=torch.float64)


def damped_error(layer: Layer, solution: Tensor, damping: float = 0.01) -> float:
    """What ADMM makes small. Without the damping, loud or dead inputs may turn the order of two solutions around."""
    return layer_error_oracle(layer.weight, solution, damped(layer.hessian, damping))


def excess(layer: Layer, solution: Tensor, damping: float = 0.01) -> float:
    """How far a solution's damped error lies above the least that its own support allows, as a share of that."""
    h = damped(layer.hessian, damping)
    least = layer_error_oracle(layer.weight, best_on_support(layer.weight, solution != 0, h), h)
    return layer_error_oracle(layer.weight, solution, h) / least - 1


# Masks.


def keep_of_group(scores: Tensor, pattern: Pattern) -> Tensor:
    """Scores ``[N, width]`` of one group's weights → what stays of them.

    A unit's score is the sum of its weights' scores; the smallest go, ties to the lowest index. A last group that is
    narrower than the pattern's lacks units; those count as gone already.
    """
    units = scores.unflatten(-1, (-1, pattern.unit)).sum(-1)
    count = units.shape[1]
    going = max(0, pattern.dropped - (pattern.group - count))
    keep = torch.ones(units.shape, dtype=torch.bool)
    for row, values in enumerate(units.tolist()):
        for unit in sorted(range(count), key=lambda i: (values[i], i))[:going]:
            keep[row, unit] = False
    return keep.repeat_interleave(pattern.unit, dim=-1)


def wanda_oracle(weight: Tensor, pattern: Pattern, hessian: Tensor) -> Tensor:
    """What Wanda keeps (Sun et al., arXiv 2306.11695): the score of a weight is |w_ij| · ‖x_j‖₂, compared within a row.

    ‖x_j‖ is known here up to the number of tokens: it is the root of the Hessian's diagonal.
    """
    scores = weight.double().abs() * hessian.double().diagonal().sqrt()
    width = pattern.group * pattern.unit
    keep = torch.ones(weight.shape, dtype=torch.bool)
    for first in range(0, weight.shape[1], width):
        keep[:, first : first + width] = keep_of_group(scores[:, first : first + width], pattern)
    return keep


# SparseGPT.


def sparsegpt_oracle(
    weight: Tensor, pattern: Pattern, hessian: Tensor, block: int = 128, damping: float = 0.01, *, wrong: str = ""
) -> tuple[Tensor, Tensor]:
    """Solution float64 ``[N, K]`` and mask of SparseGPT (Frantar and Alistarh, arXiv 2301.00774, Algorithm 1, n:m form).

    H⁻¹ = Uᵀ U of the damped H. A group's mask is chosen when its first column is reached, by w²/U_cc²; a column's error then
    goes to later columns: of its block at once, of later blocks when the block is done. ``block`` is cut to whole groups.

    ``wrong`` names a defect to build in, for tests of the tests: "deaf" keeps a column's error from later columns, "blocked"
    from later blocks, "magnitude" chooses by w², "early" chooses all masks at the start, "unsquared" scores by w²/U_cc.
    """
    w, h = weight.double().clone(), damped(hessian, damping)
    n, k = w.shape
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).mT
    pivots = upper.diagonal()
    divisors = {"magnitude": torch.ones_like(pivots), "unsquared": pivots}.get(wrong, pivots**2)
    width = pattern.group * pattern.unit
    block = max(1, block // width) * width
    keep = torch.ones(n, k, dtype=torch.bool)
    for first in range(0, k, block):
        last = min(first + block, k)
        errors = torch.zeros(n, last - first, dtype=torch.float64)
        for c in range(first, last):
            if c % width == 0:
                source = weight.double() if wrong == "early" else w
                keep[:, c : c + width] = keep_of_group(source[:, c : c + width] ** 2 / divisors[c : c + width], pattern)
            errors[:, c - first] = torch.where(keep[:, c], 0, w[:, c]) / pivots[c]
            w[:, c] = torch.where(keep[:, c], w[:, c], 0)
            if wrong != "deaf":
                w[:, c + 1 : last] -= torch.outer(errors[:, c - first], upper[c, c + 1 : last])
        if wrong not in ("deaf", "blocked"):
            w[:, last:] -= errors @ upper[first:last, last:]
    return w, keep


def surgeon_oracle(weight: Tensor, pattern: Pattern, hessian: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """The same solution and mask by the optimal brain surgeon (Hassibi and Stork, 1993), without Cholesky or blocks.

    Column by column: the Hessian of the columns not yet passed is inverted anew, the cost of a weight is w²/[H⁻¹]_cc, and
    taking a weight away moves the later ones by −w/[H⁻¹]_cc · [H⁻¹]_c.
    """
    w, h = weight.double().clone(), damped(hessian, damping)
    n, k = w.shape
    inverses = [torch.linalg.inv(h[c:, c:]) for c in range(k)]
    width = pattern.group * pattern.unit
    keep = torch.ones(n, k, dtype=torch.bool)
    for c, inverse in enumerate(inverses):
        if c % width == 0:
            last = min(c + width, k)
            costs = torch.stack([w[:, j] ** 2 / inverses[j][0, 0] for j in range(c, last)], dim=-1)
            keep[:, c:last] = keep_of_group(costs, pattern)
        gone = torch.where(keep[:, c], 0, w[:, c])
        w[:, c:] -= torch.outer(gone / inverse[0, 0], inverse[0])
        w[:, c] = torch.where(keep[:, c], w[:, c], 0)
    return w, keep


def best_on_support(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Float64 ``[N, K]``: per row the least-squares solution among those that are zero outside ``mask``.

    (s − w) H (s − w)ᵀ is smallest where H_SS s_S = H_S: w, the normal equations on the support S. Of many solutions (a
    Hessian without full rank) the shortest.
    """
    w, h = weight.double(), hessian.double()
    solution = torch.zeros_like(w)
    for row in range(w.shape[0]):
        support = mask[row].nonzero().squeeze(-1)
        if support.numel():
            known = (h[support] @ w[row]).unsqueeze(-1)
            solution[row, support] = torch.linalg.lstsq(h[support][:, support], known, driver="gelsd").solution.squeeze(-1)
    return solution


# Rounding to 8 bits.


def grid_of(scheme: Scheme) -> Tensor:
    """Float64, ascending: every value that the scheme's 8-bit weights may hold, without their scale."""
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(scheme.dtype).double()
    return codes[codes.abs() <= scheme.bound].unique()


def nearest(wanted: Tensor, grid: Tensor) -> Tensor:
    """Index into ``grid`` of the value nearest to each of ``wanted``; the lower of two."""
    return (wanted.double().unsqueeze(-1) - grid).abs().argmin(-1)


def quantised_error(values: Tensor, scale: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """`layer_error_oracle` of values · scale: ``values [N, K]`` of an 8-bit dtype, ``scale [N, 1]``."""
    return layer_error_oracle(weight, values.double() * scale.double(), hessian)


def rounding_oracle(solution: Tensor, weight: Tensor, hessian: Tensor, scale: Tensor, scheme: Scheme, reach: int) -> Tensor:
    """Values float64 ``[N, K]`` of the least error, by trying every combination of grid values; zeros stay zeros.

    Every non-zero may take its nearest grid value or one up to ``reach`` steps away: for rows of a few weights only.
    """
    grid = grid_of(scheme)
    best = torch.zeros(solution.shape, dtype=torch.float64)
    for row in range(solution.shape[0]):
        choices = []
        for value in solution[row].double():
            middle = int(nearest(value / scale[row].double(), grid))
            choices.append([0.0] if value == 0 else grid[max(0, middle - reach) : middle + reach + 1].tolist())
        tries = torch.tensor(list(itertools.product(*choices)), dtype=torch.float64)
        errors = output_errors(weight[row].expand_as(tries), tries * scale[row].double(), hessian)
        best[row] = tries[errors.argmin()]
    return best


def largest_gain(values: Tensor, scale: Tensor, solution: Tensor, weight: Tensor, hessian: Tensor, scheme: Scheme) -> float:
    """The most that one entry's move to a neighbouring grid value would take off its row's error, over Σ|w_i H_ij w_j|.

    At most 0 where no single move helps. Entries that are zero in ``solution`` may not move.
    """
    grid, most = grid_of(scheme), -float("inf")
    for row in range(values.shape[0]):
        w, s = weight[row].double(), scale[row].double()
        size = float(w.abs() @ hessian.double().abs() @ w.abs())
        now = output_errors(w.unsqueeze(0), values[row : row + 1].double() * s, hessian)
        for column in solution[row].nonzero().flatten().tolist():
            here = int(nearest(values[row, column].double(), grid))
            for there in {max(0, here - 1), min(len(grid) - 1, here + 1)}:
                moved = values[row : row + 1].double().clone()
                moved[0, column] = grid[there]
                most = max(most, float(now - output_errors(w.unsqueeze(0), moved * s, hessian)) / size)
    return most
