"""Which attention kernel the host has chosen."""

from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from afcache._typing import HostModule
from afcache.functional.model import AttentionKernel, scaled_dot_product_attention


def attention_backend(transformer: HostModule) -> Any:
    """The name that `transformer.set_attention_backend` chose, or None for torch's own kernels.

    Raises:
        NotImplementedError: backends differ between blocks.

    """
    backends = {processor._attention_backend for processor in transformer.attn_processors.values()}
    if len(backends) > 1:
        raise NotImplementedError(
            f"attention backends differ between blocks ({sorted(map(str, backends))}); set one for the whole model with "
            "transformer.set_attention_backend(name)."
        )
    return backends.pop() if backends else None


def attention_kernel(transformer: HostModule) -> AttentionKernel:
    """The kernel of `attention_backend`: diffusers' dispatcher, or torch's scaled dot product attention."""
    backend = attention_backend(transformer)
    if backend is None:
        return scaled_dot_product_attention

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        by_token = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return dispatch_attention_fn(*by_token, backend=backend).transpose(1, 2)

    return kernel
