"""One denoising step's inner loop: logits under optimisation, their blend of embeddings, and Adam."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import AdamState, EntrgiEmbedding, ForwardState, _common, entrgi_embedding, guidance_update_
from ..ops.guidance_update import hyperparameters, moment_dtype
from .memory import Memory, Name
from .weights import WeightFunction, resolve_weight

_MOMENTS: tuple[tuple[Name, Name], ...] = (("exp_avg", "moved exp_avg"), ("exp_avg_sq", "moved exp_avg_sq"))


class LogitOptimizer:
    """Moves logits toward a lower loss of their entropy-weighted embedding (arXiv 2602.05000, Algorithm 1).

    For anybody's own loop::

        optimizer = LogitOptimizer(logits, table, lr=0.5, temperature=0.7, top_p=0.95)
        for _ in range(3):
            blend = optimizer.embed()
            loss = -reward(blend.embedding).sum()
            loss.backward()
            optimizer.step(blend.embedding.grad)
        logits = optimizer.phi

    Adam's state is fresh: make a new optimiser for every denoising step.

    Args:
        phi: [N, V] logits, float64/float32/bfloat16/float16; changed **in place** by :meth:`step`.
        table: [V, D] embeddings, a row per vocabulary entry.
        lr: learning rate, eta. It, temperature and top_p may be 0-d tensors on the CPU, read at each call.
        temperature: tau of the soft embedding and of the draw, from 1e-12 to 1e12; 0 draws the argmax and blends at
            temperature 1.
        weight: "entropy" (or "linear"), "one", "zero", another weight's name, or a callable of (entropy [N], V).
        top_k, top_p: filters of the draw; None keeps all.
        seed, counter, keys: of the draw, as in :func:`entrgi_kernels.ops.sample_tokens`; each :meth:`embed` adds one to
            `counter`. `seed` may also be an int64 tensor [M, 2], the (seed, counter) of each :meth:`embed` in turn: a
            CUDA graph replays with new numbers when its content is changed between replays.
        betas, eps: Adam's; eps from 1e-12 to 1e12.
        state_dtype: dtype of Adam's moments or its name, not float16; None takes that of phi, float32 for float16.
        keep_state: False when only one :meth:`step` will follow: the moments are then never formed (M = 1). With more,
            the last one is told by ``step(grad, last=True)``.
        memory: memory for the moments and for :meth:`moved_rows`, used again by the next optimiser that is given the
            same; None takes fresh memory.
        backend: "auto" or the name of a backend.

    Raises:
        ValueError, TypeError: bad shapes, dtypes or settings.
        BackendUnavailableError: an explicit backend that cannot serve.
    """

    def __init__(
        self,
        phi: torch.Tensor,
        table: torch.Tensor,
        *,
        lr: float | torch.Tensor = 0.5,
        temperature: float | torch.Tensor = 1.0,
        weight: str | WeightFunction = "entropy",
        top_k: int | None = None,
        top_p: float | torch.Tensor | None = None,
        seed: int | torch.Tensor = 0,
        counter: int = 0,
        keys: torch.Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        state_dtype: torch.dtype | str | None = None,
        keep_state: bool = True,
        memory: Memory | None = None,
        backend: str = "auto",
    ) -> None:
        _common.check_logits(phi, "phi")
        _common.check_table(phi, table, "phi")
        if phi.requires_grad and phi.is_leaf:
            raise ValueError("phi requires grad: pass phi.detach(), it is changed in place outside of autograd")
        # What a call would refuse is refused here, before a reward has run.
        _common.check_temperature(temperature)
        _common.check_filters(top_k, top_p)
        _common.check_backend(backend)
        lr, beta1, beta2, eps = hyperparameters(lr, betas, eps)
        _common.check_apart(("phi",), (phi,))
        seeds = seed if isinstance(seed, torch.Tensor) and seed.dim() == 2 else None
        if seeds is None:
            _common.make_rng(phi[:0], seed, 0)
        elif seeds.shape[1] != 2 or seeds.dtype != torch.int64 or seeds.device != phi.device:
            raise ValueError(
                f"seed is a {seeds.dtype} tensor of shape {list(seeds.shape)} on {seeds.device}: expected int64 [M, 2] "
                f"on {phi.device}"
            )
        if keys is not None:
            _common.check_vector(phi, keys, "keys", torch.int64, called="phi")
        if not _common.is_integer(counter) or counter < 0:
            raise ValueError(f"counter={counter!r}: expected an integer >= 0")
        moments_in = moment_dtype(phi.dtype, state_dtype)
        if not isinstance(keep_state, bool):
            raise TypeError(f"keep_state={keep_state!r}: expected True or False")
        if memory is not None and not isinstance(memory, Memory):
            raise TypeError(f"memory is {type(memory).__name__}: expected None or Memory")
        self.phi = phi.detach()
        self.table = table.detach()
        self._forward: dict[str, Any] = dict(
            temperature=temperature, top_k=top_k, top_p=top_p, keys=keys, backend=backend, weight=resolve_weight(weight)
        )
        self._update: dict[str, Any] = dict(lr=lr, betas=(beta1, beta2), eps=eps, backend=backend)
        self._seed, self._seeds, self._counter, self._draws = seed, seeds, counter, 0
        self.memory = Memory() if memory is None else memory
        self._state_dtype = moments_in
        self._keep_state = keep_state
        self._adam: AdamState | None = None
        self._state: ForwardState | None = None
        self._ended = False

    @property
    def argmax(self) -> torch.Tensor:
        """[N] int64: each row's most likely token at the last :meth:`embed`."""
        if self._state is None:
            raise RuntimeError("argmax is known after embed()")
        return self._state.argmax

    def embed(
        self,
        tokens: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> EntrgiEmbedding:
        """The blend at the present logits; its `.embedding` [N, D] is a leaf that collects a gradient.

        With `out` and `index` the blend's rows are written into a reward's input where it lies, nothing is copied::

            inputs = table[tokens]                                  # [R, L, D], once a denoising step
            index = rows * L + slots                                # [N], the masked ones
            blend = optimizer.embed(out=inputs.view(-1, D), index=index)
            (-reward(blend.embedding.view(R, L, D)).sum()).backward()
            optimizer.step(blend.embedding.grad[index])

        Args:
            tokens: int64 [N] hard tokens; None draws them.
            out, index: [M, D] and int64 [N], see :func:`entrgi_kernels.ops.entrgi_embedding`. `.embedding` is then a
                leaf on the memory of `out`, of its shape: good until that is written to again.
        """
        seed, counter = self._seed, self._counter + self._draws
        if self._seeds is not None:
            if self._draws >= len(self._seeds):
                raise ValueError(
                    f"seed has {len(self._seeds)} rows, one an embed(): expected one more for embed() number "
                    f"{self._draws + 1}"
                )
            seed, counter = self._seeds[self._draws], 0
        with torch.no_grad():
            blend = entrgi_embedding(
                self.phi,
                self.table,
                tokens=tokens,
                seed=seed,
                counter=counter,
                out=out,
                index=index,
                **self._forward,
            )
        self._state = blend.state
        self._draws += 1
        return blend._replace(embedding=blend.embedding.detach().requires_grad_())

    @torch.no_grad()
    def step(self, grad: torch.Tensor, last: bool = False) -> None:
        """Take one Adam step from `grad` = d loss/d embedding [N, D] of the last :meth:`embed`; moves phi in place.

        Args:
            last: no step follows: Adam's moments are not kept.

        Raises:
            ValueError, TypeError: a gradient of another shape or dtype.
            RuntimeError: without a fresh embed(), or after a step whose moments were not kept.
        """
        state = self._ready()
        if not isinstance(last, bool):
            raise TypeError(f"last={last!r}: expected True or False")
        keep = self._keep_state and not last
        if keep and self._adam is None:
            # Not cleared: a first step takes the moments as zero.
            like = self.phi.shape, self._state_dtype, self.phi.device
            first, second = (self.memory.take(name, *like) for name, _ in _MOMENTS)
            self._adam = AdamState(first, second)
        guidance_update_(self.phi, grad, self.table, state, adam=self._adam, keep=keep, **self._update)
        self._state = None
        self._ended = not keep

    @torch.no_grad()
    def moved_rows(self, grad: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What :meth:`step` would make of some rows, as a copy; phi and the state stay as they are.

        For a last step of which only some rows are wanted. May be called again with other rows: the result is good
        until then.

        Args:
            grad: d loss/d embedding [N, D] of the last :meth:`embed`.
            rows: int64 [n].

        Returns:
            [n, V] of phi's dtype.

        Raises:
            RuntimeError: without a fresh embed(), or after a step whose moments were not kept.
        """
        state = self._ready()
        n, d = self.phi.shape[0], self.table.shape[1]
        _common.check_matrix(grad, "grad", f"[{n}, {d}], that of the embedding")
        if grad.shape != (n, d):
            raise ValueError(f"grad has shape {list(grad.shape)}: expected [{n}, {d}], that of the embedding")
        if not isinstance(rows, torch.Tensor) or rows.dim() != 1 or rows.dtype != torch.int64:
            raise TypeError(f"rows={rows!r}: expected an int64 tensor [n]")
        moved, adam = self.memory.rows("moved phi", self.phi, rows), None
        if self._adam is not None:
            moments = zip(_MOMENTS, (self._adam.exp_avg, self._adam.exp_avg_sq), strict=True)
            first, second = (self.memory.rows(moved_name, moment, rows) for (_, moved_name), moment in moments)
            adam = AdamState(first, second, self._adam.step)
        guidance_update_(moved, grad[rows], self.table, state.rows(rows), adam=adam, keep=False, **self._update)
        return moved

    def _ready(self) -> ForwardState:
        if self._state is None:
            raise RuntimeError("step() needs an embed() before it: the gradient belongs to that embedding")
        if self._ended:
            raise RuntimeError("a step after one with last=True or keep_state=False: Adam's moments were not kept")
        return self._state
