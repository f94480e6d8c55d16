"""Reduce rows of logits to what a loss needs, a chunk of rows at a time.

A language model's loss looks at (batch, time, vocabulary) logits and wants a few numbers per
token: the log-probability of a label, an entropy, a divergence from a reference. Autograd keeps
several arrays of the size of the logits for that. Here each chunk of rows is reduced, forgotten
and computed again for the gradient, which every reduction states in closed form. Logits may also
be given as `HiddenLogits`, hidden states and output layer: then the (batch, time, vocabulary)
array never exists.

For any D(p) over p = softmax(z), with g = dD/dp, the gradient is dD/dz = p (g - <p, g>).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._check import check_integer, check_interval

__all__ = [
    "HiddenLogits",
    "Logits",
    "RowReduction",
    "combine",
    "entropy",
    "forward_kl",
    "label_logp",
    "log_sum_exp",
    "reduce_rows",
    "reverse_kl",
    "softmax_pullback",
    "sum_rows",
    "tempered",
    "vocabulary_size",
]


class HiddenLogits(NamedTuple):
    """Logits not yet computed: ``hidden @ weight.T + bias``.

    Parameters
    ----------
    hidden : Tensor of shape (..., hidden_size)
        Last hidden states, as the output layer takes them.
    weight : Tensor of shape (vocabulary_size, hidden_size)
        The output layer (``lm_head.weight``).
    bias : Tensor of shape (vocabulary_size,), optional
        Its bias.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


Logits = Tensor | HiddenLogits
Pullback = Callable[[Tensor], Tensor]
RowReduction = Callable[..., tuple[Tensor, Pullback]]


def vocabulary_size(logits: Logits) -> int:
    """Number of tokens a row of logits scores."""
    return logits.weight.shape[0] if isinstance(logits, HiddenLogits) else logits.shape[-1]


def reduce_rows(
    reduction: RowReduction,
    logits: Logits,
    *sides: Logits,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Values of a row reduction for every row of logits, differentiable in the logits.

    The gradient is formed by computing each chunk again, so that between forward and backward
    nothing of the size of the logits is kept.

    Parameters
    ----------
    reduction : callable
        ``reduction(rows, *side_rows)`` with rows of shape (n, vocabulary_size) in float32 or
        float64 returns values of shape (n, k) and a pullback: a function that is called at most
        once and maps an upstream gradient of shape (n, k) to the gradient with respect to the
        rows. It must not write to its arguments.
    logits : Tensor of shape (..., vocabulary_size) or HiddenLogits
        Any floating dtype; the arithmetic is float32, or float64 for float64 logits. The matrix
        product of `HiddenLogits` runs in the dtype of autocast where that is on.
    *sides : Tensor of shape (..., any) or HiddenLogits
        What else the reduction needs per row: labels, reference logits. No gradient flows into
        them.
    mask : BoolTensor of shape (...), optional
        Rows to compute. The others get the value 0 and no gradient, and cost nothing.
    chunk_size : int, optional
        Rows a chunk; the default keeps a chunk in a few MB on a CPU and a few hundred on a GPU.

    Returns
    -------
    Tensor of shape (..., k)
        In float32, or float64 for float64 logits.

    Raises
    ------
    TypeError
        If the logits are no floating-point tensor.
    ValueError
        If the leading shapes of logits, sides and mask disagree.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import label_logp, reduce_rows
    >>> logits = torch.zeros(2, 3, 10, requires_grad=True)
    >>> labels = torch.arange(6).reshape(2, 3)
    >>> reduce_rows(label_logp, logits, labels).shape
    torch.Size([2, 3, 1])
    """
    rows, tensors = _rows(logits, sides, mask, chunk_size)
    return _ReduceRows.apply(reduction, rows, *tensors)


def sum_rows(
    reduction: RowReduction,
    logits: Logits,
    *sides: Logits,
    weights: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of a row reduction over all rows, and the values themselves.

    As the weights are known, the gradient is formed during the forward pass, and neither the
    reduction nor the product with the output layer is repeated. (Not for float16, whose gradients
    would vanish before a gradient scaler can lift them: they wait for the backward pass.)

    Parameters
    ----------
    reduction, logits, *sides, mask, chunk_size
        As for `reduce_rows`.
    weights : Tensor of shape (...) or (..., k)
        Weight of each row, or of each value of each row; constants.

    Returns
    -------
    total : Tensor, a scalar
        ``(weights * values).sum()``, differentiable in the logits.
    values : Tensor of shape (..., k)
        Detached; 0 where the mask is False.

    Raises
    ------
    TypeError
        If the logits are no floating-point tensor.
    ValueError
        If shapes disagree, or if `weights` requires a gradient.
    """
    if weights.requires_grad:
        raise ValueError("weights must be constants, got a tensor that requires a gradient")
    rows, tensors = _rows(logits, sides, mask, chunk_size)
    lead = len(rows.shape)
    if tuple(weights.shape[:lead]) != rows.shape or weights.dim() > lead + 1:
        raise ValueError(
            f"weights must have shape {rows.shape} or {rows.shape} + (k,), "
            f"got {tuple(weights.shape)}"
        )
    weights = weights.to(rows.dtype)
    if weights.dim() == lead:
        weights = weights.unsqueeze(-1)
    return _SumRows.apply(reduction, rows, weights, *tensors)


def label_logp(logits: Tensor, labels: Tensor) -> tuple[Tensor, Pullback]:
    """Log-probability of each row's label; 0 without a gradient where the label is negative.

    Parameters
    ----------
    logits : Tensor of shape (n, vocabulary_size)
    labels : LongTensor of shape (n,)
    """
    logp = logits.log_softmax(-1)
    valid = (labels >= 0).unsqueeze(-1)
    index = labels.clamp(min=0).unsqueeze(-1)
    values = torch.where(valid, logp.gather(-1, index), 0)

    def pullback(upstream: Tensor) -> Tensor:
        upstream = torch.where(valid, upstream, 0)
        return logp.exp_().mul_(-upstream).scatter_add_(-1, index, upstream)

    return values, pullback


def log_sum_exp(logits: Tensor) -> tuple[Tensor, Pullback]:
    """Log of the sum of exponentials of each row."""
    values = logits.logsumexp(-1, keepdim=True)
    return values, lambda upstream: logits.softmax(-1).mul_(upstream)


def entropy(logits: Tensor) -> tuple[Tensor, Pullback]:
    """Entropy of each row's softmax, in nats."""
    logp = finite_log_softmax(logits)
    p = logp.exp()
    values = -rowwise_dot(p, logp)
    return values, lambda upstream: logp.add_(values).mul_(p).mul_(-upstream)


def forward_kl(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Pullback]:
    """KL(reference || model) of each row.

    Parameters
    ----------
    logits, ref_logits : Tensor of shape (n, vocabulary_size)
    """
    check_same_vocabulary(logits, ref_logits)
    logp, ref_logp = finite_log_softmax(logits), finite_log_softmax(ref_logits)
    ref_p = ref_logp.exp()
    values = rowwise_dot(ref_p, ref_logp.sub_(logp))
    return values, lambda upstream: logp.exp_().sub_(ref_p).mul_(upstream)


def reverse_kl(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Pullback]:
    """KL(model || reference) of each row.

    Parameters
    ----------
    logits, ref_logits : Tensor of shape (n, vocabulary_size)
    """
    check_same_vocabulary(logits, ref_logits)
    logp, ref_logp = finite_log_softmax(logits), finite_log_softmax(ref_logits)
    p = logp.exp()
    ratio = logp.sub_(ref_logp)
    values = rowwise_dot(p, ratio)
    return values, lambda upstream: ratio.sub_(values).mul_(p).mul_(upstream)


def combine(*parts: tuple[RowReduction, Sequence[int]]) -> RowReduction:
    """One reduction with the columns of several, so that logits are computed and read once.

    Parameters
    ----------
    *parts : pair of reduction and indices
        Each reduction with the positions of its side inputs among the sides of the whole.

    Returns
    -------
    callable
        A row reduction whose values are the parts' values side by side.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import combine, entropy, label_logp, reduce_rows
    >>> both = combine((label_logp, [0]), (entropy, []))
    >>> reduce_rows(both, torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])).shape
    torch.Size([4, 2])
    """

    def combined(logits: Tensor, *sides: Tensor) -> tuple[Tensor, Pullback]:
        results = [part(logits, *(sides[i] for i in indices)) for part, indices in parts]
        widths = [values.shape[-1] for values, _ in results]

        def pullback(upstream: Tensor) -> Tensor:
            total: Tensor | None = None
            for (_, part), piece in zip(results, upstream.split(widths, dim=-1), strict=True):
                total = part(piece) if total is None else total.add_(part(piece))
            if total is None:
                return torch.zeros_like(logits)
            return total

        return torch.cat([values for values, _ in results], dim=-1), pullback

    return combined


def tempered(reduction: RowReduction, temperature: float) -> RowReduction:
    """A reduction of logits divided by a temperature, side logits included.

    Parameters
    ----------
    reduction : callable
        A row reduction.
    temperature : float
        Above 0. Floating-point sides as wide as the logits are divided too.
    """
    check_interval("temperature", temperature, 0, closed="neither")
    if temperature == 1:
        return reduction

    def divided(logits: Tensor, *sides: Tensor) -> tuple[Tensor, Pullback]:
        cooled = [
            side / temperature if side.is_floating_point() and side.shape == logits.shape else side
            for side in sides
        ]
        values, pullback = reduction(logits / temperature, *cooled)
        return values, lambda upstream: pullback(upstream).div_(temperature)

    return divided


def softmax_pullback(p: Tensor, g: Tensor) -> Tensor:
    """Gradient with respect to logits of what has the gradient `g` with respect to p.

    Parameters
    ----------
    p : Tensor of shape (n, vocabulary_size)
        Probabilities, the softmax of the logits.
    g : Tensor of shape (n, vocabulary_size)
        Derivatives with respect to p; any constant may be added to a row.

    Returns
    -------
    Tensor of shape (n, vocabulary_size)
        ``p * (g - <p, g>)``.
    """
    return (g - rowwise_dot(p, g)).mul_(p)


def rowwise_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of the rows of two matrices, of shape (n, 1), without their product."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def finite_log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax whose -inf (a forbidden token) is a finite number, so that 0 times it is 0."""
    return logits.log_softmax(-1).clamp_(min=-1e30)


def check_same_vocabulary(logits: Logits, ref_logits: Logits, name: str = "ref_logits") -> None:
    """Raise ValueError unless both score the same number of tokens."""
    n, n_ref = vocabulary_size(logits), vocabulary_size(ref_logits)
    if n != n_ref:
        raise ValueError(
            f"logits and {name} must have the same vocabulary, got {n} and {n_ref} tokens "
            "(was one of the embeddings resized?)"
        )


class _Rows(NamedTuple):
    """How the flat list of tensors is read row by row."""

    shape: tuple[int, ...]
    layout: tuple[bool, ...]  # for logits and each side: is it a HiddenLogits (three tensors)?
    chosen: Tensor | None  # the rows to compute, where not all of them
    n_rows: int
    chunk_size: int  # rows of one product with the output layer
    block_size: int | None  # rows of one reduction, within a chunk
    dtype: torch.dtype
    product_dtype: torch.dtype | None  # of autocast, where on

    def chunks(self) -> list[slice | Tensor]:
        # At least one chunk, perhaps an empty one: it tells the number of values a row.
        starts = range(0, max(self.n_rows, 1), self.chunk_size)
        slices = [slice(start, min(start + self.chunk_size, self.n_rows)) for start in starts]
        return list(slices) if self.chosen is None else [self.chosen[s] for s in slices]

    def blocks(self, n: int) -> list[slice]:
        """Rows of a chunk to reduce at once: all of them, or on a CPU what fits into the cache."""
        size = self.block_size or max(n, 1)
        return [slice(start, start + size) for start in range(0, max(n, 1), size)]

    def read(self, tensors: Sequence[Tensor | None], rows: slice | Tensor) -> list[Tensor]:
        """Logits and sides of some rows, in the dtype of the arithmetic."""
        result, position = [], 0
        for hidden in self.layout:
            tensor = tensors[position]
            assert tensor is not None
            part = tensor[rows]
            if hidden:
                weight, bias = tensors[position + 1], tensors[position + 2]
                assert weight is not None
                part = F.linear(part, weight, bias)
            position += 3 if hidden else 1
            result.append(part.to(self.dtype) if part.is_floating_point() else part)
        return result


def _rows(
    logits: Logits, sides: Sequence[Logits], mask: Tensor | None, chunk_size: int | None
) -> tuple[_Rows, list[Tensor | None]]:
    first = logits.hidden if isinstance(logits, HiddenLogits) else logits
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise TypeError(
            "logits must be a floating-point tensor or HiddenLogits, got "
            f"{first.dtype if isinstance(first, Tensor) else type(first).__name__}"
        )
    if first.dim() < 1:
        raise ValueError("logits must have at least one dimension, got a scalar")
    shape = tuple(first.shape[:-1])
    device = first.device.type
    autocast = torch.is_autocast_enabled(device)
    product_dtype = torch.get_autocast_dtype(device) if autocast else None
    tensors: list[Tensor | None] = []
    layout = []
    for i, argument in enumerate((logits, *sides)):
        hidden = isinstance(argument, HiddenLogits)
        layout.append(hidden)
        lead = argument.hidden if isinstance(argument, HiddenLogits) else argument
        if tuple(lead.shape[: len(shape)]) != shape:
            raise ValueError(
                f"side input {i} must have the leading shape {shape} of the logits, "
                f"got shape {tuple(lead.shape)}"
            )
        flat = lead.reshape(-1, *lead.shape[len(shape) :])
        kept: list[Tensor | None] = [flat]
        if isinstance(argument, HiddenLogits):
            weight, bias = argument.weight, argument.bias
            if weight.dim() != 2 or weight.shape[1] != lead.shape[-1]:
                raise ValueError(
                    f"weight must have shape (vocabulary_size, {lead.shape[-1]}), as hidden has "
                    f"{lead.shape[-1]} entries, got shape {tuple(weight.shape)}"
                )
            product = product_dtype or torch.promote_types(lead.dtype, weight.dtype)
            kept = [None if part is None else part.to(product) for part in (flat, weight, bias)]
        if i > 0:
            kept = [None if part is None else part.detach() for part in kept]
        tensors += kept
    chosen = None
    n_rows = first[..., :1].numel()
    if mask is not None:
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(
                f"mask must be a bool tensor of shape {shape}, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        where = mask.reshape(-1).nonzero().squeeze(-1)
        if len(where) < n_rows:
            chosen, n_rows = where, len(where)
    if chunk_size is None:
        chunk_size = _default_chunk_size(vocabulary_size(logits), any(layout), device)
    check_integer("chunk_size", chunk_size, 1)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    block_size = (
        _CPU_BLOCK // vocabulary_size(logits) or 1 if device == "cpu" and layout[0] else None
    )
    rows = _Rows(shape, tuple(layout), chosen, n_rows, chunk_size, block_size, dtype, product_dtype)
    return rows, tensors


# Elements that several arrays of fit into a core's cache.
_CPU_BLOCK = 2**18


def _default_chunk_size(n_vocabulary: int, hidden: bool, device: str) -> int:
    # On a CPU, rows that exist are best reduced inside the cache; a product with the output
    # layer needs more rows to pay for reading the layer. A GPU needs work for all its cores.
    n_elements = (2**23 if hidden else _CPU_BLOCK) if device == "cpu" else 2**25
    return max(1, n_elements // max(n_vocabulary, 1))


def _reduce(
    reduction: RowReduction,
    rows: _Rows,
    tensors: Sequence[Tensor | None],
    upstream: Tensor | None,
    gradients: "_Gradients | None",
) -> Tensor:
    """Values of shape (all rows, k), and with `gradients` the gradients for `upstream`."""
    first = tensors[0]
    assert first is not None
    values: Tensor | None = None
    # The dtype of the products was fixed at the door; the reductions stay in float32.
    with torch.autocast(first.device.type, enabled=False):
        for chunk in rows.chunks():
            logits, *sides = rows.read(tensors, chunk)
            parts = []
            for block in rows.blocks(len(logits)):
                part, pullback = reduction(logits[block], *(side[block] for side in sides))
                parts.append(part)
                if gradients is None or upstream is None:
                    continue
                gradient = pullback(upstream[chunk][block].expand_as(part))
                if rows.layout[0]:
                    logits[block] = gradient  # a product of our own, which is not needed again
                else:
                    gradients.add(chunk, gradient)
            if gradients is not None and rows.layout[0]:
                gradients.add(chunk, logits)
            part = torch.cat(parts)
            if values is None:
                values = part.new_zeros(first.shape[0], part.shape[-1])
            values[chunk] = part
    assert values is not None
    return values


class _ReduceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reduction: RowReduction, rows: _Rows, *tensors: Tensor | None) -> Tensor:
        ctx.reduction, ctx.rows = reduction, rows
        ctx.save_for_backward(*tensors)
        values = _reduce(reduction, rows, tensors, None, None)
        return values.reshape(*rows.shape, values.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, tensors = ctx.rows, ctx.saved_tensors
        upstream = upstream.reshape(-1, upstream.shape[-1])
        gradients = _Gradients(rows, tensors, ctx.needs_input_grad[2:])
        _reduce(ctx.reduction, rows, tensors, upstream, gradients)
        return None, None, *gradients.all()


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, reduction: RowReduction, rows: _Rows, weights: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[3:]
        first = tensors[0]
        assert first is not None
        now = any(needed) and first.dtype != torch.float16
        gradients = _Gradients(rows, tensors, needed) if now else None
        flat_weights = weights.reshape(-1, weights.shape[-1])
        values = _reduce(reduction, rows, tensors, flat_weights, gradients)
        ctx.reduction, ctx.rows, ctx.weights = reduction, rows, flat_weights
        ctx.gradients = gradients
        ctx.save_for_backward(*tensors)
        values = values.reshape(*rows.shape, values.shape[-1])
        ctx.mark_non_differentiable(values)
        return (values * weights).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            scaled = [g if g is None else g.mul_(upstream) for g in gradients.all()]
            return None, None, None, *scaled
        # The second time: what the first gave away may have changed.
        rows, tensors = ctx.rows, ctx.saved_tensors
        gradients = _Gradients(rows, tensors, ctx.needs_input_grad[3:])
        _reduce(ctx.reduction, rows, tensors, ctx.weights * upstream, gradients)
        return None, None, None, *gradients.all()


class _Gradients:
    """Gradients of logits, or of hidden states, weight and bias, filled chunk by chunk."""

    def __init__(
        self, rows: _Rows, tensors: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> None:
        self.rows, self.tensors = rows, tensors
        self.is_hidden = rows.layout[0]
        self.gradients: list[Tensor | None] = [None] * len(tensors)
        for i, tensor in enumerate(tensors[: 3 if self.is_hidden else 1]):
            if tensor is None or not needed[i]:
                continue
            if i == 0:
                complete = rows.chosen is None
                allocate = torch.empty_like if complete else torch.zeros_like
                self.gradients[i] = allocate(tensor)
            else:  # sums over all rows, hence in the dtype of the arithmetic
                self.gradients[i] = torch.zeros_like(tensor, dtype=rows.dtype)

    def add(self, chunk: slice | Tensor, gradient: Tensor) -> None:
        first = self.tensors[0]
        assert first is not None
        if not self.is_hidden:
            if self.gradients[0] is not None:
                self.gradients[0][chunk] = gradient.to(first.dtype)
            return
        of_hidden, of_weight, of_bias = self.gradients[:3]
        if of_bias is not None:
            of_bias += gradient.sum(0)
        gradient = gradient.to(first.dtype)
        if of_hidden is not None:
            weight = self.tensors[1]
            assert weight is not None
            of_hidden[chunk] = gradient @ weight
        if of_weight is not None:
            if of_weight.dtype == gradient.dtype:
                of_weight.addmm_(gradient.T, first[chunk])
            else:
                of_weight += gradient.T @ first[chunk]

    def all(self) -> list[Tensor | None]:
        return [
            None if gradient is None else gradient.to(tensor.dtype)  # type: ignore[union-attr]
            for gradient, tensor in zip(self.gradients, self.tensors, strict=True)
        ]
