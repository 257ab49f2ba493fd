"""Causal attention over documents laid end to end: flat rows in, flat rows out, and never a glance across a boundary.

A micro-batch has no padding and no batch dimension (see `batching.py`), so attention is told where documents begin.
Three ways give the same numbers; `attention_backend` picks, and `fit` prints which:

- ``varlen``: FlashAttention's kernel for ragged batches (`torch.nn.attention.varlen`). Half precision, CUDA, sm_80 up.
- ``flex``: `flex_attention` with a block mask, compiled. Any precision on CUDA; one mask per micro-batch.
- ``per_document``: a Python loop over documents, each one plain causal SDPA. The one for CPU: measured there 7 % faster
  per real token than padded rows of 340 tokens and 27 % faster than packed rows under a block mask. Rows are parted by
  `split`, whose backward is one concatenation; slicing would write a full-size gradient for every document.

Grouped-query heads go through ``enable_gqa`` (on CPU 5 % faster than repeating keys and values).

Shapes: N tokens of all documents, D documents, H query heads, K key/value heads, E head dimension.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (N, H, E), k (N, K, E), v (N, K, E) -> (N, H, E)

FLEX_HEAD_DIM = 16  # the least that flex_attention compiles on CUDA
BACKENDS = ("varlen", "flex", "per_document")


@lru_cache
def attention_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int = 64) -> str:
    """The fastest attention that this device runs for queries of this type.

    Args:
        device: where the model is.
        dtype: type of the queries: autocast's under autocast, else the weights'.
        head_dim: FlashAttention takes multiples of 8 up to 256, flex 16 and more.

    Returns:
        One of ``varlen``, ``flex``, ``per_document``.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return "per_document"
    capability = torch.cuda.get_device_capability(device)
    flash = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256
    if flash and capability >= (8, 0) and torch.version.cuda is not None and _varlen_takes_groups():
        return "varlen"
    if capability >= (7, 0) and head_dim >= FLEX_HEAD_DIM and find_spec("triton") is not None:
        return "flex"
    return "per_document"


def _varlen_takes_groups() -> bool:
    """Whether torch is new enough: the first releases of `varlen_attn` knew neither grouped heads nor windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"enable_gqa", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()


def needs_device_cu_seqlens(backend: str) -> bool:
    """Whether boundaries must lie on the accelerator. ``per_document`` wants them on the CPU: it reads them, and a read
    from the accelerator would wait for everything queued there."""
    return backend != "per_document"


def attention_over_documents(backend: str, cu_seqlens: Tensor, max_length: int, num_tokens: int) -> Attend:
    """Attention for one micro-batch, to be shared by all layers.

    Args:
        backend: what `attention_backend` said.
        cu_seqlens: (D + 1,) int32, the first row of every document, then N. See `needs_device_cu_seqlens`.
        max_length: tokens of the longest document.
        num_tokens: N.

    Returns:
        A function of q, k, v.
    """
    if backend == "varlen":
        return _varlen(cu_seqlens, max_length)
    if backend == "flex":
        return _flex(cu_seqlens, num_tokens)
    assert backend == "per_document", backend
    return _per_document(cu_seqlens.diff().tolist())


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


def _flex(cu_seqlens: Tensor, num_tokens: int) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask

    document = document_of_token(cu_seqlens, num_tokens)

    def same_document_and_not_later(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (query >= key)

    mask = create_block_mask(
        same_document_and_not_later, None, None, num_tokens, num_tokens, device=str(cu_seqlens.device)
    )
    flex_attention = _compiled_flex_attention() if cu_seqlens.is_cuda else _flex_attention()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, N, E)
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    return attend


def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@lru_cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Uncompiled, it would hold all N x N scores. Dynamic, since every micro-batch has another N."""
    return torch.compile(_flex_attention(), dynamic=True)


def document_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(N,) number of the document that each row belongs to, without waiting for the device."""
    documents = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return documents.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
