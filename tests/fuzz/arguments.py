"""Arguments by type, shape, dtype, device and range: what is not accepted is refused by name, what is accepted works.

Each value comes with what is right: True (the call works, nothing of the result is NaN), False (a TypeError, ValueError
or RuntimeError whose message names the argument), or None (either of the two, where a limit is the machine's).
"""

from __future__ import annotations

import decimal
import fractions
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from entrgi_kernels import ops
from entrgi_kernels.names import SCORED_ALGS

from .case import prepare
from .draws import DTYPES, Draws, Failure, tensors_of
from .truth import acc_of

__all__ = ["prepare", "run"]

REFUSALS = (TypeError, ValueError, RuntimeError)
Verdict = bool | None

# Whatever somebody may hand over where a number is due.
THINGS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 2.0, 1e-8, math.nan, math.inf, -math.inf, 1e-45,
    5e-324, 1e308, 10**400, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63), -(2**63) - 1,
    "1", "", "half", b"1", [], [0.5], (0.5,), {}, set(), 1j, object(), len, fractions.Fraction(1, 2),
    decimal.Decimal("0.5"), np.float32(0.5), np.float64(0.25), np.int64(2), np.uint8(3), np.bool_(True), np.nan,
    np.array(1.0), np.array([1, 2]), torch.tensor(1.0), torch.tensor(1), torch.tensor([1.0]), torch.tensor([1, 2]),
    torch.tensor([1, 2, 3]), torch.tensor(True),
)  # fmt: skip


def real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def integral(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _scalar_tensor(value: Any) -> bool:
    """A number all the same, if one may be given as a tensor."""
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype != torch.bool


def temperature(value: Any) -> Verdict:
    if _scalar_tensor(value):
        return None
    return real(value) and (value == 0 or 1e-12 <= value <= 1e12)


def top_p(value: Any) -> Verdict:
    if _scalar_tensor(value):
        return None
    return value is None or (real(value) and 0 < value <= 1)


def top_k(value: Any) -> Verdict:
    if value is None:
        return True
    return integral(value) and 1 <= value < 1 << 63


def seed(value: Any) -> Verdict:
    if isinstance(value, torch.Tensor):
        return value.dtype == torch.int64 and (value.dim() == 0 or value.shape == (2,))
    return integral(value) and -(1 << 63) <= value < 1 << 63


def counter(value: Any) -> Verdict:
    if isinstance(value, torch.Tensor):
        return value.dtype == torch.int64 and value.dim() == 0
    return integral(value) and 0 <= value < 1 << 32


def lr(value: Any) -> Verdict:
    return None if _scalar_tensor(value) else real(value) and 0 <= value <= 1e12


def scale(value: Any) -> Verdict:
    return None if _scalar_tensor(value) else real(value) and -1e12 <= value <= 1e12


def eps(value: Any) -> Verdict:
    return None if _scalar_tensor(value) else real(value) and 1e-12 <= value <= 1e12


def betas(value: Any) -> Verdict:
    return isinstance(value, tuple) and len(value) == 2 and all(real(beta) and 0 <= beta < 1 for beta in value)


NUMBERS: dict[str, Callable[[Any], Verdict]] = {
    "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "counter": counter, "lr": lr, "eps": eps,
    "betas": betas, "scale": scale,
}  # fmt: skip


class Given:
    """One valid call: the operator's name, its arguments, and the sizes and dtypes behind them."""

    def __init__(self, d: Draws) -> None:
        self.n, self.v, self.d = d.integer(1, 4), d.integer(1, 9), d.integer(1, 6)
        self.dtype = d.pick(DTYPES)
        self.table_dtype = self.dtype if d.chance(0.7) else d.pick(DTYPES)
        self.name = d.pick(tuple(_OPERATORS))
        d.note(operator=self.name, n=self.n, v=self.v, d=self.d, dtype=self.dtype, table=self.table_dtype)
        self.arguments: dict[str, Any] = {}
        for argument in _OPERATORS[self.name]:
            self.arguments[argument] = self.valid(argument, d)
        if isinstance(self.arguments.get("out"), torch.Tensor) != isinstance(self.arguments.get("index"), torch.Tensor):
            self.arguments["out"] = self.arguments["index"] = None
        if isinstance(self.arguments.get("seed"), torch.Tensor):
            self.arguments["counter"] = 0

    def valid(self, argument: str, d: Draws) -> Any:
        n, v, width = self.n, self.v, self.d
        if argument in ("logits", "hidden"):
            return torch.from_numpy(d.normal(n, v if argument == "logits" else width)).to(self.dtype)
        if argument in ("table", "head"):
            return torch.from_numpy(d.normal(v, width)).to(self.table_dtype)
        if argument == "grad":
            return torch.from_numpy(d.normal(n, width)).to(self.table_dtype)
        if argument in ("tokens", "targets"):
            optional = argument == "tokens" and self.name == "entrgi_embedding"
            return None if optional and d.chance(0.5) else d.integers(0, v - 1, n)
        if argument == "keys":
            return d.pick([None, torch.arange(n) * 3])
        if argument == "bias":
            return d.pick([None, torch.from_numpy(d.normal(v)).to(self.table_dtype)])
        if argument == "weight":
            return d.pick(["entropy", "one", "zero", torch.rand(n), lambda entropy, size: entropy / 9])
        if argument == "out":
            return d.pick([None, torch.zeros(n + 1, width, dtype=self.table_dtype)])
        if argument == "index":
            return torch.arange(n)
        if argument == "state":
            return ops.entrgi_embedding(self.arguments["logits"], self.arguments["table"], backend="eager").state
        if argument == "adam":
            return d.pick([None, ops.AdamState.zeros(self.arguments["logits"])])
        simple: dict[str, list[Any]] = {
            "temperature": [1.0, 0, 0.5, np.float32(0.5)], "top_p": [None, 0.9, 1], "top_k": [None, 1, np.int64(3)],
            "seed": [0, 7, torch.tensor(3), torch.tensor([3, 4])], "counter": [0, 5], "lr": [0.1, 0],
            "scale": [0.1, -2], "alg": list(SCORED_ALGS), "eps": [1e-8], "betas": [(0.9, 0.999)], "keep": [True, False],
            "backend": ["auto", "eager", "native"],
        }  # fmt: skip
        return d.pick(simple[argument])

    def call(self) -> Any:
        arguments = dict(self.arguments)
        positional = [arguments.pop(name) for name in _POSITIONAL[self.name]]
        return getattr(ops, self.name)(*positional, **arguments)


_DRAW = ("temperature", "top_p", "top_k", "seed", "counter", "keys")
_OPERATORS = {
    "softmax_entropy": ("logits", "temperature", "backend"),
    "sample_tokens": ("logits", *_DRAW, "backend"),
    "soft_embedding": ("logits", "table", "temperature", "backend"),
    "entrgi_embedding": ("logits", "table", *_DRAW, "weight", "tokens", "out", "index", "backend"),
    "guidance_update_": ("logits", "grad", "table", "state", "lr", "adam", "betas", "eps", "keep", "backend"),
    "first_order_update_": ("logits", "grad", "table", "tokens", "scale", "backend"),
    "unmask_confidence": ("logits", "tokens", "alg", "temperature", "top_p", "top_k", "backend"),
    "token_log_prob": ("hidden", "head", "targets", "bias", "backend"),
}
_TOKENED, _UPDATES = ("unmask_confidence", "first_order_update_"), ("guidance_update_", "first_order_update_")
_POSITIONAL = {
    name: tuple(a for a in arguments if a in ("logits", "grad", "table", "state", "hidden", "head", "targets"))
    + (("tokens",) if name in _TOKENED else ())
    for name, arguments in _OPERATORS.items()
}


_BY_ROW = {"logits", "hidden", "grad", "tokens", "targets", "keys", "weight", "index", "state"}


def _tensor(d: Draws, given: Given, name: str, t: torch.Tensor) -> tuple[str, Any, Verdict]:
    """(what was done, the value, what is right) for an argument that is a tensor."""
    written = name in ("out",) or (name == "logits" and given.name in _UPDATES)
    floating = t.is_floating_point()
    # With nobody else who has rows or columns, any number of them will do.
    tensors = (torch.Tensor, ops.ForwardState)
    others = {key for key, value in given.arguments.items() if isinstance(value, tensors) and key != name}
    alone = name == "logits" and not {"table", "tokens"} & others
    rows_free = name == "out" or not others & _BY_ROW and name in ("logits", "hidden", "targets")
    if name == "head":
        rows_free = "bias" not in others
    columns_free = alone or (name == "logits" and given.name == "unmask_confidence")
    columns_free |= name == "table" and not {"out", "grad"} & others
    how = d.pick(["thing", "dims", "rows", "columns", "dtype", "device", "layout", "same", "same"])
    if how == "thing":
        value = d.pick([t.tolist(), 1.5, 3, "logits", {}, object(), t.float().numpy(), [t], (t, t), None])
        optional = name in ("tokens", "keys", "bias", "weight", "out", "index") and given.name not in _TOKENED
        right: Verdict = False
        if value is None and optional:
            right = True if name in ("keys", "bias") or (name == "tokens") else None
            if name in ("out", "index"):
                right = False  # one without the other
        return f"{type(value).__name__}", value, right
    if how == "dims":
        value = d.pick([t[None], t.reshape(-1) if t.dim() == 2 else t[:, None], t.reshape(-1)[0]])
        return f"shape {list(value.shape)}", value, False
    if how == "rows":
        value = d.pick([t[:-1], torch.cat([t, t]), t[:0], torch.cat([t, t[:1]])])
        fits = value.shape[0] == t.shape[0]
        if name == "out":
            return f"{value.shape[0]} rows", value, None if value.shape[0] < given.n + 1 else True
        if name == "head" and not fits:  # fewer: a target may lie outside, which is its caller's affair
            return f"{value.shape[0]} rows", value, None if len(value) and rows_free else False
        return f"{value.shape[0]} rows", value, fits or rows_free
    if how == "columns" and t.dim() == 2:
        value = d.pick([t[:, :-1], torch.cat([t, t], dim=1), t[:, :0]])
        # A token may then lie outside the vocabulary, which is its caller's affair.
        right = False if value.shape[1] == 0 or not columns_free else True if alone or name == "table" else None
        return f"{value.shape[1]} columns", value, right
    if how == "dtype":
        other = d.pick([torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8, *DTYPES])
        value = t.to(other)
        right = other == t.dtype
        if floating and other in DTYPES:
            right = None if written else True
            if name == "out":
                right = other == t.dtype
            if (
                name == "table"
                and given.name == "guidance_update_"
                or name == "table"
                and given.arguments.get("out") is not None
            ):
                right = None
        return f"{other}", value, right
    if how == "device":
        return "on meta", t.to("meta"), None if alone else False  # as torch itself takes it: shapes alone
    if how == "layout":
        if t.numel() == 0:
            return "as it is", t, True
        make = {
            "expanded": lambda: t[:1].expand(t.shape),
            "reversed strides": lambda: t.clone() if t.dim() < 2 else t.T.contiguous().T,
            "sparse": lambda: t.to_sparse(), "negated view": lambda: torch._neg_view(t),
            "every other": lambda: torch.cat([t, t], dim=-1)[..., ::2],
            "a parameter": lambda: t.clone().requires_grad_(),
        }  # fmt: skip
        kinds = [k for k in make if floating or k not in ("negated view", "a parameter")]
        kind = d.pick(kinds)
        right = None
        if kind in ("sparse", "negated view"):
            right = False
        elif not written and kind != "a parameter":
            right = True
        if kind == "expanded" and name == "index":
            right = None
        return kind, make[kind](), right
    return "as it is", t, True


def _other(d: Draws, given: Given, name: str) -> tuple[str, Any, Verdict]:
    """As :func:`_tensor`, for the rest."""
    old = given.arguments[name]
    if name in NUMBERS:
        things: tuple[Any, ...] = THINGS
        if name == "betas":
            things = (
                *THINGS,
                (0.9,),
                (0.9, 1.0),
                (-0.1, 0.9),
                (0.5, 0.5, 0.5),
                (None, 0.9),
                ("a", "b"),
                (0, 0),
                (math.nan, 0.5),
            )
        value = d.pick(things)
        right = NUMBERS[name](value)
        if name == "seed" and right and isinstance(value, torch.Tensor) and value.dim() == 1:
            right = (
                given.arguments["counter"] == 0 if not isinstance(given.arguments["counter"], torch.Tensor) else False
            )
        if (
            name == "counter"
            and isinstance(given.arguments["seed"], torch.Tensor)
            and given.arguments["seed"].dim() == 1
        ):
            right = True if type(value) is int and value == 0 else None if right and value == 0 else False
            right = None if isinstance(value, (bool, float)) else right  # equal to 0 is good enough there
        if name == "betas" and isinstance(value, list):
            right = False
        return repr(value)[:60], value, right
    if name == "backend":
        value = d.pick(["auto", "eager", "native", "triton", "cuda", "cutlass", "", None, 3, ["eager"], b"eager", True])
        right = None if value == "native" else value in ("auto", "eager") if isinstance(value, str) else False
        return repr(value), value, right
    if name == "alg":
        value = d.pick([*SCORED_ALGS, "origin", "", None, 3, ["entropy"], b"entropy", {}])
        return repr(value), value, isinstance(value, str) and value in SCORED_ALGS
    if name == "keep":
        value = d.pick([True, False])
        return repr(value), value, True
    if name == "weight":
        value, right = d.pick(
            [("linear", False), (None, False), (0.5, False), ([0.5], False), (b"one", False), (3, False),
             (lambda entropy, v: 0.5, False), (lambda entropy, v: entropy[:0], False), (lambda entropy, v: None, False),
             (lambda entropy, v: entropy.double(), True), (torch.zeros(given.n), True), ("one", True)]
        )  # fmt: skip
        return repr(value)[:30], value, right
    if name == "state":
        return _state(d, given, old)
    if name == "adam":
        return _adam(d, given)
    value = d.pick([1.5, "x", {}, object(), [1]])  # an optional tensor that was not given
    return repr(value)[:30], value, False


def _state(d: Draws, given: Given, old: ops.ForwardState) -> tuple[str, Any, Verdict]:
    acc = acc_of(given.arguments["logits"], given.arguments["table"])
    other = torch.float32 if acc == torch.float64 else torch.float64
    label, value, right = d.pick(
        [
            ("None", None, False), ("a tuple", tuple(old), False), ("a dict", old._asdict(), False),
            ("soft None", old._replace(soft=None), False), ("soft of rows", old._replace(soft=old.soft[:-1]), False),
            ("soft of other dtype", old._replace(soft=old.soft.to(other)), False),
            ("soft on meta", old._replace(soft=old.soft.to("meta")), False),
            ("logsumexp None", old._replace(logsumexp=None), False),
            ("logsumexp of rows", old._replace(logsumexp=old.logsumexp[:-1]), False),
            ("logsumexp of other dtype", old._replace(logsumexp=old.logsumexp.to(other)), False),
            ("logsumexp 2-d", old._replace(logsumexp=old.logsumexp[:, None]), False),
            ("temperature nan", old._replace(temperature=math.nan), False),
            ("temperature -1", old._replace(temperature=-1.0), False),
            ("temperature None", old._replace(temperature=None), False), ("as it is", old, True),
        ]
    )  # fmt: skip
    return label, value, right


def _adam(d: Draws, given: Given) -> tuple[str, Any, Verdict]:
    x = given.arguments["logits"]
    state = ops.AdamState
    m, v, _ = vars(state.zeros(x)).values()
    double = m.new_zeros(2 * x.numel())
    shared = state(double[: x.numel()].view(x.shape), double[1 : x.numel() + 1].view(x.shape))
    apart = None if x.numel() == 1 else False
    label, value, right = d.pick(
        [
            ("a tuple", (m, v), False), ("a number", 3, False), ("a dict", {"exp_avg": m}, False),
            ("None inside", state(None, None), False), ("one None", state(m, None), False),
            ("lists inside", state(m.tolist(), v.tolist()), False), ("rows", state(m[:-1], v[:-1]), False),
            ("int", state(m.long(), v.long()), False), ("meta", state(m.to("meta"), v.to("meta")), False),
            ("step -1", state(m, v, -1), False), ("step 2.5", state(m, v, 2.5), False),
            ("step None", state(m, v, None), False),
            ("step 2^70", state(m, v, 1 << 70), False), ("step '1'", state(m, v, "1"), False),
            ("step True", state(m, v, True), None),
            ("step 3", state(m, v, 3), True), ("fresh", state.zeros(x), True),
            ("one tensor for both", state(m, m), False),
            ("overlapping", shared, apart),
            ("the logits themselves", state(x, v), False), ("expanded", state(m[:1, :1].expand(x.shape), v), apart),
            ("float32", state.zeros(x, torch.float32), True),
        ]
    )  # fmt: skip
    return label, value, right


def run(d: Draws) -> dict[str, int]:
    given = Given(d)
    changed: list[tuple[str, str, Verdict]] = []
    name = d.pick(tuple(given.arguments))
    old = given.arguments[name]
    change = (
        _tensor(d, given, name, old)
        if isinstance(old, torch.Tensor) and name not in NUMBERS
        else _other(d, given, name)
    )
    changed.append((name, change[0], change[2]))
    given.arguments[name] = change[1]
    d.note(argument=name, given=change[0])
    outcome = _outcome(given, changed)
    d.check_memory()
    return {f"{given.name} {outcome}": 1}


def _outcome(given: Given, changed: list[tuple[str, str, Verdict]]) -> str:
    """How the call ended; raises Failure where that is not right."""
    (name, label, right), where = changed[0], given.name
    try:
        result = given.call()
    except IndexError as error:  # of an index, Python's own name for it (and the documented one of `index`)
        if right is True or name not in ("index", "out", "logits", "tokens"):
            raise Failure(f"{where}: {name} {label}: IndexError: {error}") from error
        return "refused"
    except REFUSALS as error:
        message = str(error)
        kind = type(error)
        if right is True:
            raise Failure(f"{where}: {name} {label} is valid, but {kind.__name__}: {message}") from error
        if not any(word in message for word in _words(name)):
            raise Failure(
                f"{where}: {name} {label}: the message does not name it: {kind.__name__}: {message}"
            ) from error
        return "refused"
    except Exception as error:
        raise Failure(f"{where}: {name} {label}: {type(error).__name__}: {error}") from error
    if right is False:
        raise Failure(f"{where}: {name} {label} was accepted")
    if right and any(t.is_floating_point() and not t.is_meta and t.isnan().any() for t in tensors_of(result)):
        raise Failure(f"{where}: {name} {label} gives NaN")
    return "served"


def _words(name: str) -> tuple[str, ...]:
    """What a message may call an argument; a clash of two may name the other."""
    return {
        "adam": ("adam", "exp_avg"), "table": ("table", "grad", "state"), "state": ("state", "temperature"),
        "logits": ("logits", "table", "tokens", "keys", "grad", "out", "index", "weight", "state"),
        "counter": ("counter", "seed"),
        "hidden": ("hidden", "head", "targets"), "head": ("head", "hidden", "bias"), "seed": ("seed", "counter"),
    }.get(name, (name,))  # fmt: skip
