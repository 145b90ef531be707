"""What lies between two tokenizers: chat templates, plain text, single tokens, and the vocabulary map.

``template`` turns conversations into token ids and back; ``vocabulary`` shows a diffusion LM's tokens through a reward
model's embedding table.
"""

from . import template

__all__ = ["template"]
