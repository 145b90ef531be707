"""The published code of block-causal models, unedited, with tiny random weights: ``--integrations FOLDER``.

FOLDER holds checkouts named ``dllm`` (ZHZisZZ/dllm, for LLaDA2 and 2.1) and ``dllm-rl`` (Gen-Verse/dLLM-RL, for SDAR
and TraDo), and ``fast-dllm-v2``, the Python files of Efficient-Large-Model/Fast_dLLM_v2_7B.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from entrgi_kernels import models
from entrgi_kernels.models import BlockCausal, compat
from tests.models.test_block_causal import B, canvases, generate
from tests.models.test_masked_diffusion import MASK, PAD, V

BASE = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=PAD, initializer_range=0.2,
)  # fmt: skip
EXPERTS = dict(
    head_dim=8, num_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
    num_shared_experts=1, first_k_dense_replace=1, use_bias=False, attention_dropout=0.0,
)  # fmt: skip
# folder, files' names behind "modeling" and "configuration", settings
CODE = {
    "LLaDA2": ("dllm/dllm/pipelines/llada2/models", "_llada2_moe", EXPERTS),
    "LLaDA2.1": ("dllm/dllm/pipelines/llada21/models", "_llada21_moe", EXPERTS),
    "SDAR": ("dllm-rl/models/sdar", "_sdar", dict(head_dim=8, fuse_cross_entropy=False, use_sliding_window=False)),
    "Fast-dLLM v2": ("fast-dllm-v2", "", dict(bd_size=B)),
}


def flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What SDAR's code takes from a package for GPUs: a norm; its attention is not reached."""

    def rms_norm_fn(x, weight=None, bias=None, eps=1e-6):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    for name in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton", "flash_attn.ops.triton.layer_norm"):
        module = ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        module.rms_norm_fn = rms_norm_fn
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=list(CODE))
def published(request, monkeypatch) -> nn.Module:
    """A network of the published code."""
    folder = request.config.getoption("--integrations")
    if folder is None:
        pytest.skip("needs the published code: --integrations FOLDER")
    path, suffix, settings = CODE[request.param]
    if not Path(folder, path).is_dir():
        pytest.skip(f"no {path} in {folder}")
    if request.param == "SDAR":
        flash_attention(monkeypatch)
    if request.param == "Fast-dLLM v2":
        pytest.importorskip("einops")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compat.provide_default_rope()
        compat.provide_older_names()
        package = ModuleType("published")
        package.__path__ = [str(Path(folder, path))]
        for name in [name for name in sys.modules if name.split(".")[0] == "published"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "published", package)
        code = importlib.import_module(f"published.modeling{suffix}")
        configuration = importlib.import_module(f"published.configuration{suffix}")
        (kind,) = [
            c for n, c in vars(code).items() if n.endswith(("ForCausalLM", "ModelLM")) and issubclass(c, nn.Module)
        ]
        config = getattr(configuration, kind.config_class.__name__)(**BASE, **settings)
        config._attn_implementation = "sdpa"
        torch.manual_seed(0)
        return kind(config).double().eval()


@pytest.mark.filterwarnings("ignore")
def test_kept_blocks_change_nothing(published):
    model = models.wrap(published, mask_token_id=MASK, block_length=B)
    assert isinstance(model, BlockCausal) and model.keeps_blocks
    assert model.shift == model.runs_apart == (type(published).__name__ == "Fast_dLLM_QwenForCausalLM")
    tokens, attention, start = canvases(repeats=2)

    def check(tokens, attention, masked, logits):
        # LLaDA2 hands out float32.
        torch.testing.assert_close(logits, model.masked_logits(tokens, attention, masked), rtol=1e-6, atol=1e-6)

    assert generate(model, model.forwards(tokens, attention, start, 2), tokens, attention, start, check) == 4


@pytest.mark.filterwarnings("ignore")
def test_the_model_s_own_greedy_loop(published):
    """LLaDA2's ``generate`` runs whole canvases under its own mask: one token a step, the most probable one."""
    if not hasattr(published, "_get_num_transfer_tokens"):
        pytest.skip("only LLaDA2's loop has this rule")
    model = models.wrap(published.bfloat16(), mask_token_id=MASK, block_length=B)  # its mask is of that dtype
    prompt = torch.tensor([[7, 21, 33, 4, 50, 12]])
    given = dict(block_length=B, steps=B, gen_length=8, threshold=2.0, eos_id=V + 1, mask_id=MASK)
    expected = published.generate(inputs=prompt, **given)
    tokens = torch.cat([prompt, torch.full((1, 10), MASK)], dim=1)  # it fills the last block
    forwards = model.forwards(tokens, torch.ones_like(tokens, dtype=torch.bool), 6)
    for first in (4, 8, 12):
        forwards.open(tokens, torch.tensor([first]))
        while bool((masked := (tokens == MASK) & (torch.arange(16) >= first) & (torch.arange(16) < first + B)).any()):
            logits = forwards.masked_logits(tokens, masked)
            probability, drawn = logits.softmax(-1).max(-1)
            best = masked.flatten().nonzero()[int(probability.argmax()), 0]
            tokens[0, best] = drawn[probability.argmax()]
    assert torch.equal(tokens[:, 6 : 6 + expected.shape[1]], expected)
