"""What integrations share: what guide() was given, the handle it leaves behind, networks only their loop runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..guidance.results import GenerationResult, Stats
from ..guidance.sampler import GuidedSampler
from ..models.modules import module_device, module_dtype, output_head
from .steering import Steering

if TYPE_CHECKING:
    from typing_extensions import Self

ATTRIBUTE = "entrgi"
_MISSING = object()

# Networks whose logits some guidance moves, with what was guided: two of them would move the same logits twice.
_guided_networks: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@dataclass
class Parts:
    """What guide() was given beside its target; see there."""

    reward_model: Any = None
    tokenizer: PreTrainedTokenizerBase | None = None
    reward_tokenizer: PreTrainedTokenizerBase | None = None
    unmatched: str = "unk"
    mask_token_id: int | None = None
    shift: bool | None = None
    cfg_scale: float | None = None
    canvas: Callable[..., Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def sampler(self, model: Any, tokenizer: Any = None) -> GuidedSampler:
        """The sampler of these parts for a network or an adapter; `tokenizer` is the target's own, if it has one.

        Raises:
            TypeError: no reward model, or no tokenizer.
        """
        tokenizer = tokenizer if self.tokenizer is None else self.tokenizer
        for name, value in (("reward_model", self.reward_model), ("tokenizer", tokenizer)):
            if value is None:
                raise TypeError(f"guide() needs a {name} for this kind of target: pass guide(target, {name}=...)")
        own = isinstance(model, ForeignModel)
        return GuidedSampler(
            model,
            self.reward_model,
            tokenizer,
            self.reward_tokenizer,
            unmatched=self.unmatched,
            mask_token_id=None if own else self.mask_token_id,
            shift=None if own else self.shift,
            **self.settings,
        )


@dataclass
class ForeignModel:
    """A network that only its own loop knows how to call: what steering needs to know of it, and no way to run it.

    Attributes: see :class:`entrgi_kernels.models.DiffusionModel`.
    """

    module: nn.Module
    mask_token_id: int | None
    vocab_size: int
    shift: bool = False

    @classmethod
    def of(cls, module: nn.Module, mask_token_id: int | None, shift: bool = False) -> ForeignModel:
        """Of a network with a vocabulary head, or with the size of its vocabulary in its config.

        Raises:
            ValueError: neither is there.
        """
        head: Any = output_head(module)
        config: Any = getattr(module, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        size: Any = head.weight.shape[0] if head is not None and hasattr(head, "weight") else None
        size = size or getattr(text, "vocab_size", None)
        if size is None:
            raise ValueError(f"{type(module).__name__} tells no vocabulary size: expected a head or config.vocab_size")
        return cls(module, mask_token_id, size, shift)

    @property
    def device(self) -> torch.device:
        """The device that the network takes its inputs on."""
        return module_device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return module_dtype(self.module)

    def masked_logits(self, canvas: torch.Tensor, attention: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Not to be had: see :meth:`refuse`."""
        self.refuse()

    def refuse(self) -> NoReturn:
        """Say that nobody but its own loop runs this network.

        Raises:
            TypeError: always, with the way out.
        """
        raise TypeError(
            f"{type(self.module).__name__} is run by its own loop alone: use the target's own call, or give "
            "GuidedSampler an adapter that follows entrgi_kernels.models.DiffusionModel"
        )


class Handle:
    """What is left on a patched target as ``target.entrgi``; also a context manager that removes itself.

    Attributes:
        state: what the target is, in a word.
        integration: the name of the way in, as in docs/integrations.md.
    """

    state: ClassVar[str]

    def __init__(self, target: Any, integration: str) -> None:
        self.integration = integration
        self._target = target
        self._undo: list[Callable[[], Any]] = []
        self._pauses = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The target as it was before, while inside."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def remove(self) -> None:
        """Restore the target; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # ---- what integrations call

    @property
    def active(self) -> bool:
        """False while paused."""
        return self._pauses == 0

    def patch(self, name: str, value: Any, owner: Any = None) -> None:
        """Set an attribute of an instance (the target, or a part of it), remembering what the instance itself held."""
        self._undo.append(self._set(name, value, owner))

    @contextlib.contextmanager
    def patched(self, name: str, value: Any, owner: Any = None) -> Iterator[None]:
        """:meth:`patch`, while inside."""
        undo = self._set(name, value, owner)
        try:
            yield
        finally:
            undo()

    def _set(self, name: str, value: Any, owner: Any) -> Callable[[], None]:
        content = (self._target if owner is None else owner).__dict__
        held = content.get(name, _MISSING)
        content[name] = value

        def undo() -> None:
            if held is _MISSING:
                content.pop(name, None)
            else:
                content[name] = held

        return undo

    def on_remove(self, action: Callable[[], Any]) -> None:
        """Have something done by :meth:`remove`; last come, first done."""
        self._undo.append(action)


class Guidance(Handle):
    """The handle that guide() leaves on its target.

    Attributes:
        sampler: the :class:`GuidedSampler` that holds models and settings; None where the target brings all of them.
        steering: what moves logits inside a loop of the target's own; None where its call is replaced as a whole.
        rewards: final rewards of the last guided call, one number a sequence, a prompt's samples together.
        results: what the last :meth:`generate` returned.
    """

    state = "guided"

    def __init__(self, target: Any, integration: str, seed: int | None) -> None:
        super().__init__(target, integration)
        self.sampler: GuidedSampler | None = None
        self.steering: Steering | None = None
        self.rewards: list[float] = []
        self.results: list[GenerationResult] = []
        self._seed = seed
        self._stats = Stats()

    # ---- what users call

    @property
    def stats(self) -> Stats:
        """What the last guided call did."""
        return self._stats if self.sampler is None else self.sampler.stats

    @stats.setter
    def stats(self, stats: Stats) -> None:
        if self.sampler is None:
            self._stats = stats
        else:
            self.sampler.stats = stats

    def generate(self, prompts: Any, **settings: Any) -> list[GenerationResult]:
        """From text: see :meth:`GuidedSampler.generate`. Without a seed, one is drawn from torch's own generator.

        Raises:
            TypeError: a target that only its own loop can run.
        """
        if self.sampler is None:
            raise TypeError(f"a target of kind {self.integration!r} brings its own models: use GuidedSampler for text")
        if isinstance(self.sampler.model, ForeignModel):
            self.sampler.model.refuse()
        settings.setdefault("seed", self.seed())
        with self.paused():
            self.results = self.sampler.generate(prompts, **settings)
        self.rewards = [reward for result in self.results for reward in result.rewards]
        return self.results

    def score(self, sequences: torch.Tensor) -> list[float]:
        """Final rewards of what the target's last guided call returned, also kept in :attr:`rewards`.

        For loops whose end cannot be seen from inside the model (a function that calls ``model(x).logits``).

        Args:
            sequences: [B, S] int64, prompts and responses, rows in the order of the call.

        Raises:
            RuntimeError: no guided call was made yet.
        """
        if self.steering is None or not self.steering.started:
            raise RuntimeError("score() needs a guided call of the target before it: its prompts are what is scored")
        self.rewards = self.steering.score(sequences)
        return self.rewards

    # ---- what integrations call

    def seed(self) -> int:
        """The seed of the target's next call: the one given to guide(), else one from torch's own generator."""
        return int(torch.randint(1 << 62, ()).item()) if self._seed is None else self._seed

    def claim(self, network: nn.Module) -> None:
        """Note that this guidance moves a network's logits.

        Raises:
            ValueError: another one does.
        """
        name = type(self._target).__name__
        if network in _guided_networks:
            raise ValueError(
                f"the {type(network).__name__} of this {name} is guided already, through {_guided_networks[network]}: "
                "remove() that guidance first"
            )
        _guided_networks[network] = name
        self._undo.append(lambda: _guided_networks.pop(network, None))


def check_free(target: Any) -> None:
    """Raise unless a handle may be left on the target.

    Raises:
        ValueError: there is one, or something else of its name.
    """
    held = getattr(target, "__dict__", {}).get(ATTRIBUTE)
    if isinstance(held, Handle):
        raise ValueError(f"this {type(target).__name__} is {held.state} already: call its .{ATTRIBUTE}.remove() first")
    if hasattr(target, ATTRIBUTE):
        raise ValueError(
            f"this {type(target).__name__} has an attribute {ATTRIBUTE!r} of its own, where the handle would be: "
            "delete it, or use GuidedSampler, which patches nothing"
        )


class Integration:
    """One kind of target. To add one, subclass it in a file of its own and enter it in ``INTEGRATIONS``.

    Attributes:
        name: what ``guide(integration=...)`` calls it.
    """

    name: ClassVar[str]

    @staticmethod
    def recognises(target: Any) -> bool:
        """Whether a target is of this kind; what it can do is asked, not what its class is called."""
        raise NotImplementedError

    @staticmethod
    def attach(target: Any, guidance: Guidance, parts: Parts) -> None:
        """Guide the target, through :meth:`Guidance.patch` and :meth:`Guidance.on_remove` alone.

        Raises:
            ValueError, TypeError: it cannot be guided; the message says why.
        """
        raise NotImplementedError
