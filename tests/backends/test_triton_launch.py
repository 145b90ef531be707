"""How kernels are launched: what was compiled is found by a key of this project's own, no coarser than Triton's."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process: nothing is dispatched", allow_module_level=True)

from benchmarks.tools import gate  # noqa: E402
from entrgi_kernels.backends.triton import aot, launch  # noqa: E402
from entrgi_kernels.backends.triton.launch import Matrix  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
CASES = [
    (7, 5008, 144, BF16, BF16),
    (64, 5008, 144, BF16, BF16),
    (300, 5008, 144, BF16, BF16),
    (301, 5008, 144, BF16, BF16),
    (1, 16, 16, BF16, BF16),
    (64, 50_257, 100, BF16, BF16),
    (64, 5008, 144, FP32, FP32),
    (64, 5008, 144, FP32, BF16),
    (64, 5001, 1, FP32, FP32),
]


@pytest.fixture
def split():
    """A launch's options, as :func:`launch.launch` makes them, apart from the kernel's constants."""

    def of(options):
        own = {name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        return own, {name: value for name, value in options.items() if name not in own}

    return of


def test_launches_of_one_key_are_compiled_alike(split):
    """Every launch of all raw functions on an H100: one key, one entry of Triton's own cache."""
    machine, found, made, again = gate.MACHINES["sm_90"], [], {}, 0
    with aot.recording(machine, found.append):
        triton_records = launch.recorder

        def record(kernel, args, options):
            nonlocal again
            triton_records(kernel, args, options)
            # A compiled kernel is given all of its parameters in their order: arguments, then constants.
            assert set(kernel.arg_names[len(args) :]) == set(split(options)[1])
            kind = launch.key(kernel, args, *split(options))
            assert made.setdefault(kind, found[-1]) == found[-1]
            again += 1

        launch.recorder = record
        for case in CASES:
            for _ in aot.calls(*case):
                pass
    assert again > 300 and len(set(made.values())) > 100
    assert len(made) <= 1.2 * len(set(made.values())), (
        "much finer than Triton's: compiled kernels would be looked for again"
    )


def test_a_new_number_of_rows_is_no_new_key(split):
    machine, kinds = gate.MACHINES["sm_90"], {}
    with aot.recording(machine, lambda _: None):
        for n in (290, 303, 320):
            kinds[n] = set()
            launch.recorder = lambda kernel, args, options, n=n: kinds[n].add(launch.key(kernel, args, *split(options)))
            for _ in aot.calls(n, 5008, 144, BF16, BF16):
                pass
    assert kinds[290] == kinds[303] == kinds[320]


def test_every_pointer_of_every_kernel_is_marked():
    """A vector over rows that is not would be compiled again whenever N moves it to another place."""
    found = []
    with aot.recording(gate.MACHINES["sm_90"], lambda _: None):
        triton_records = launch.recorder

        def record(kernel, args, options):
            triton_records(kernel, args, options)
            found.extend(
                (kernel.fn.__annotations__.get(name), kernel.fn.__name__, name)
                for name, arg in zip(kernel.arg_names, args, strict=False)
                if not isinstance(arg, int | float)
            )

        launch.recorder = record
        for case in CASES[:3]:
            for _ in aot.calls(*case):
                pass
    assert {mark for mark, *_ in found} == {"Vector", "Matrix"}, [one for one in found if one[0] is None]
    with pytest.raises(TypeError, match="_new_kernel: lse_ptr not marked: expected Vector or Matrix"):

        @launch.kernel("n")
        def _new_kernel(logits_ptr: Matrix, lse_ptr, n):
            pass


class Kernel:
    """Stands for a kernel that Triton compiles at its first launch of a kind."""

    do_not_specialize = ("n",)
    do_not_specialize_on_alignment = ("maximum_ptr",)
    arg_names = ("logits_ptr", "maximum_ptr", "n", "v", "scale", "BLOCK", "SECOND")

    def __init__(self):
        self.fn, self.compilations, self.launches = object(), 0, []

    def __getitem__(self, grid):
        def compile_and_run(*args, **options):
            self.compilations += 1
            self.launches.append((grid, args, (options["BLOCK"], options["SECOND"])))
            return Compiled(self)

        return compile_and_run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launches.append((grid, args[:-2], args[-2:]))


def test_what_was_compiled_is_launched_again_with_its_constants_in_their_order(monkeypatch):
    monkeypatch.setattr(launch, "compiled_kinds", {})
    kernel, options = Kernel(), {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    memory = torch.zeros(1024)
    base = dict(logits=memory, maximum=memory, n=5, v=64, scale=0.5, meta={"SECOND": True, "BLOCK": 128})

    def go(**changes):
        now = {**base, **changes}
        args = [now[name] for name in ("logits", "maximum", "n", "v", "scale")]
        launch.launch_on(
            kernel, now.get("grid", (3, 2)), args, now.get("options", options), now["meta"], now.get("device", 0)
        )
        return kernel.compilations

    assert go() == 1 and go() == 1
    grid, args, constants = kernel.launches[-1]
    assert grid == (3, 2, 1) and constants == (128, True) and args[2:] == (5, 64, 0.5)
    # These change nothing in the machine code ...
    assert (
        go(n=16) == 1 and go(scale=2.0) == 1 and go(maximum=memory[1:]) == 1 and go(grid=(7,)) == 1 and go(v=128) == 1
    )
    assert kernel.launches[-2][0] == (7, 1, 1)
    # ... and each of these does.
    changes = [
        dict(logits=memory[1:]), dict(logits=memory.bfloat16()), dict(maximum=memory.double()), dict(v=1), dict(v=65),
        dict(v=1 << 31), dict(n=1 << 31), dict(meta={"SECOND": False, "BLOCK": 128}), dict(device=1),
        dict(options=options | {"num_warps": 8}),
    ]  # fmt: skip
    for expected, change in enumerate(changes, start=2):
        assert go(**change) == expected, change
        assert go(**change) == expected, change


def test_a_launch_that_was_kept_from_compiling_is_not_remembered(monkeypatch):
    monkeypatch.setattr(launch, "compiled_kinds", {})
    kernel = Kernel()
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *args, **options: None)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    launch.launch_on(
        kernel, (1,), [torch.zeros(16), torch.zeros(16), 1, 16, 1.0], options, {"BLOCK": 1, "SECOND": 1}, 0
    )
    assert launch.compiled_kinds == {}
