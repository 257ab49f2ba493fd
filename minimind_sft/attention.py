"""Causal attention over documents laid end to end: flat rows in, flat rows out, and never a glance across a boundary.

A micro-batch has no padding and no batch dimension (see `batching.py`), so attention is told where documents begin.
Three ways give the same numbers; `attention_backend` picks, and `fit` prints which:

- ``varlen``: FlashAttention's kernel for ragged batches (`torch.nn.attention.varlen`). Half precision, CUDA, sm_80 up.
- ``padded``: documents of like length (within a factor of two) together, filled up at the end, where causal attention
  never looks, so that no mask is needed. For CUDA wherever `varlen` does not run: any card, any precision, nothing to
  compile. (`flex_attention` under a block mask wants a compiler, and more shared memory in fp32 than most cards have.)
- ``per_document``: a Python loop over documents, each one plain causal SDPA. The one for CPU: measured there 7 % faster
  per real token than padded rows of 340 tokens and 27 % faster than packed rows under a block mask. Rows are parted by
  `split`, whose backward is one concatenation; slicing would write a full-size gradient for every document.

Grouped-query heads go through ``enable_gqa`` (on CPU 5 % faster than repeating keys and values).

Shapes: N tokens of all documents, D documents, H query heads, K key/value heads, E head dimension.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (N, H, E), k (N, K, E), v (N, K, E) -> (N, H, E)


@lru_cache
def attention_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int = 64) -> str:
    """The fastest attention that this device runs for queries of this type.

    Args:
        device: where the model is.
        dtype: type of the queries: autocast's under autocast, else the weights'.
        head_dim: FlashAttention takes multiples of 8 up to 256.

    Returns:
        One of ``varlen``, ``padded``, ``per_document``.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return backend_by_lengths(device)
    capability = torch.cuda.get_device_capability(device)
    flash = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256
    if flash and capability >= (8, 0) and torch.version.cuda is not None and _varlen_takes_groups():
        return "varlen"
    return backend_by_lengths(device)


def backend_by_lengths(device: torch.device) -> str:
    """``padded`` or ``per_document``: what this device runs for any queries, by boundaries that lie on the host."""
    return "padded" if device.type == "cuda" else "per_document"


def _varlen_takes_groups() -> bool:
    """Whether torch is new enough: the first releases of `varlen_attn` knew neither grouped heads nor windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"enable_gqa", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()


def needs_device_cu_seqlens(backend: str) -> bool:
    """Whether boundaries must lie on the accelerator. The others want them on the CPU: they read them, and a read from
    the accelerator would wait for everything queued there."""
    return backend == "varlen"


def attention_over_documents(backend: str, cu_seqlens: Tensor, max_length: int) -> Attend:
    """Attention for one micro-batch, to be shared by all layers.

    Args:
        backend: what `attention_backend` said.
        cu_seqlens: (D + 1,) int32, the first row of every document, then N. See `needs_device_cu_seqlens`.
        max_length: tokens of the longest document.

    Returns:
        A function of q, k, v.
    """
    if backend == "varlen":
        return _varlen(cu_seqlens, max_length)
    lengths = cu_seqlens.diff().tolist()
    if backend == "padded":
        return _padded(lengths)
    assert backend == "per_document", backend
    return _per_document(lengths)


def _per_document(lengths: list[int]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu" and q.dtype != torch.float32:  # in bf16, its backward takes four times as long
            with torch.autocast("cpu", enabled=False):
                return attend(q.float(), k.float(), v.float()).to(q.dtype)
        outputs = []
        for one_q, one_k, one_v in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            out = F.scaled_dot_product_attention(
                one_q.transpose(0, 1)[None],  # (1, H, T, E)
                one_k.transpose(0, 1)[None],
                one_v.transpose(0, 1)[None],
                is_causal=True,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    return attend


def _varlen(cu_seqlens: Tensor, max_length: int) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_length,
            max_length,
            window_size=(-1, 0),  # nothing to the right: causal
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(out, Tensor)
        return out

    return attend


def _padded(lengths: list[int]) -> Attend:
    documents_of: dict[int, list[int]] = {}  # by the power of two that their length reaches
    for number, length in enumerate(lengths):
        if length:
            documents_of.setdefault((length - 1).bit_length(), []).append(number)
    rows = torch.arange(sum(lengths)).split(lengths)
    shapes, orders, places = [], [], []
    for documents in documents_of.values():
        longest = max(lengths[number] for number in documents)
        shapes.append((len(documents), longest))
        orders.append(torch.cat([rows[number] for number in documents]))
        starts = range(0, len(documents) * longest, longest)
        places.append(torch.cat([rows[n] - rows[n][0] + at for n, at in zip(documents, starts, strict=True)]))
    order, sizes = torch.cat(orders), [len(order) for order in orders]
    indices = [order, order.argsort(), torch.cat(places)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if indices[0].device != q.device:  # the first layer takes them there
            indices[:] = [index.to(q.device, non_blocking=True) for index in indices]
        order, back, place = indices
        if q.shape[1] != k.shape[1]:  # not every kernel knows groups
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        outputs = []
        parts = [x.index_select(0, order).split(sizes) for x in (q, k, v)]
        for *part, at, shape in zip(*parts, place.split(sizes), shapes, strict=True):
            padded = [x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, at, x) for x in part]
            some_q, some_k, some_v = (x.unflatten(0, shape).transpose(1, 2) for x in padded)  # (D, H, T, E)
            out = F.scaled_dot_product_attention(some_q, some_k, some_v, is_causal=True)
            outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, at))
        return torch.cat(outputs).index_select(0, back)

    return attend


def document_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(N,) number of the document that each row belongs to, without waiting for the device."""
    documents = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return documents.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
