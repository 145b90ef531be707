"""The method's operators, registered with torch as ``entrgi::*``.

Every operator has a fake (so that it compiles with ``fullgraph=True``), an autograd formula where a gradient exists,
and a ``backend=`` argument. One file an operator, all in the same order: maths, registration, fake, autograd, public
function.
"""

from ..backends import BackendInfo, BackendUnavailableError, backends
from ._common import make_rng
from .entrgi_embedding import EntrgiEmbedding, ForwardState, entrgi_embedding
from .first_order_update import first_order_update_
from .guidance_update import AdamState, guidance_update_
from .sample_tokens import sample_tokens
from .soft_embedding import soft_embedding
from .softmax_entropy import softmax_entropy
from .token_log_prob import token_log_prob
from .unmask_confidence import unmask_confidence

__all__ = [
    "AdamState",
    "BackendInfo",
    "BackendUnavailableError",
    "EntrgiEmbedding",
    "ForwardState",
    "backends",
    "entrgi_embedding",
    "first_order_update_",
    "guidance_update_",
    "make_rng",
    "sample_tokens",
    "soft_embedding",
    "softmax_entropy",
    "token_log_prob",
    "unmask_confidence",
]
