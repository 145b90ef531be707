"""Stand-ins for models and sampler, so that the application's own behaviour is tested in milliseconds."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import html.parser
import json
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from entrgi import loading
from entrgi_kernels.guidance.config import GuidanceConfig
from entrgi_kernels.guidance.results import GenerationResult, Sample, Stats, StepTrace

WORDS = [" the", " soup", " was", " very", " good", " bad", " cold", " </script><b>", ".", " I", " lov", "ed"]
EOS, MASK = len(WORDS), len(WORDS) + 1
LIFT = {"none": 0.0, "expectation": 2.0, "aps": 1.5, "first_order": 1.0, "entrgi": 2.5}


class FakeTokenizer:
    eos_token_id = EOS

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(WORDS[i] for i in ids if i < EOS)


class FakeSampler:
    """Draws by (seed, prompt, occurrence, sample) alone, as the real one does; guided methods earn more."""

    def __init__(self, config: GuidanceConfig, lift: dict[str, float]) -> None:
        self.config = config
        self.lift = lift
        self.stop_after: int | None = None  # raise `stop_by` once so many prompts are done
        self.stop_by: BaseException = KeyboardInterrupt()
        self.prompts_seen: list[Any] = []

    def stream(
        self,
        prompts: Any,
        *,
        trace: bool = False,
        progress: bool | None = None,
        only: Any = None,
        **settings: Any,
    ) -> Iterator[tuple[int, Any]]:
        if settings:
            self.config = self.config.replace(**settings)
        self.stats = Stats()
        seen: collections.Counter[str] = collections.Counter()
        for index, prompt in enumerate(prompts):
            if only is not None and index not in only:
                seen[json.dumps(prompt)] += 1
                continue
            if len(self.prompts_seen) == self.stop_after:
                raise self.stop_by
            self.prompts_seen.append(prompt)
            text = json.dumps(prompt)
            samples = [self.sample((text, seen[text], k), trace) for k in range(self.config.num_samples)]
            seen[text] += 1
            yield index, GenerationResult(prompt, samples, self.config)

    def sample(self, key: tuple[Any, ...], trace: bool) -> Sample:
        digest = hashlib.sha256(repr((self.config.seed, key)).encode()).digest()
        slots, method = self.config.max_new_tokens, self.config.method
        length = 1 + digest[0] % (slots - 1)
        tokens = [digest[i % 32] % EOS if i < length else EOS for i in range(slots)]
        reward = digest[1] / 128 - 1 + self.lift.get(method, 1.0)
        steps = []
        for step in range(slots // 2):
            done = 2 * step
            steps.append(
                StepTrace(
                    step=step,
                    tokens=[*tokens[: done + 2], *[MASK] * (slots - done - 2)],
                    entropy=[None if i < done else digest[i % 32] / 100 for i in range(slots)],
                    weight=[None if i < done or method == "none" else digest[i % 32] / 256 for i in range(slots)],
                    committed=[done, done + 1],
                    reward=reward * (step + 1) / (slots // 2),
                    reward_before=None if method == "none" else 0.1,
                    reward_after=None if method == "none" else 0.2,
                )
            )
        text = FakeTokenizer().decode(tokens)
        return Sample(text, tokens, reward, steps if trace else None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Puts the stand-ins in place; ``.samplers`` lists those that were made, ``.lift`` what methods earn."""
    state = types.SimpleNamespace(
        samplers=[], lift=dict(LIFT), prepare=lambda sampler: None, loads=0, tokenizer=FakeTokenizer()
    )

    def load(args: Any, *, judge: bool = False, reuse: loading.Loaded | None = None) -> loading.Loaded:
        state.loads += 1
        # tiny=False: the built-in models' own measures need the models themselves.
        return loading.Loaded(None, FakeTokenizer(), None, None, model_name="fake", reward_name="fake", tiny=False)

    def make_sampler(loaded: loading.Loaded, config: GuidanceConfig) -> FakeSampler:
        sampler = FakeSampler(config, state.lift)
        state.prepare(sampler)
        state.samplers.append(sampler)
        return sampler

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(loading, "make_sampler", make_sampler)
    monkeypatch.setattr(loading, "check_prompts", lambda prompts, loaded, place: None)
    monkeypatch.setattr(loading, "prompt_tokens", lambda sampler, prompt: 10)
    return state


@pytest.fixture
def entrgi() -> Callable[..., int]:
    """Runs ``entrgi`` with these arguments in this process and returns its exit code."""
    from entrgi.cli import main

    return lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def tiny_weights() -> None:
    """Skips where the built-in models have not been trained."""
    from entrgi import tiny

    try:
        for name in tiny.MODELS:
            tiny.weights_path(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def answers_ctrl_c() -> Iterator[None]:
    """Commands started here answer SIGINT, though a script that tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _limited_files(size: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def limited_files() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """``with limited_files(size)``: no file can grow beyond `size` bytes, as on a full disk."""
    return _limited_files


class Page(html.parser.HTMLParser):
    """An HTML page as a browser takes it apart: its tags, links, table cells and scripts, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.scripts: list[str] = []
        self._into: list[str] | None = None
        self.feed(text)

    @property
    def data(self) -> Any:
        """The JSON of the first script, which is where our reports keep their data."""
        return json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "poster")]
        into = self.scripts if tag == "script" else self.cells if tag in ("td", "th") else None
        if into is not None:
            into.append("")
            self._into = into

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "td", "th"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data


@pytest.fixture
def parse_page() -> type[Page]:
    """Takes an HTML text apart."""
    return Page
