"""What an evaluation is: a YAML file of models, datasets, methods, temperatures and seeds, checked when it is read.

Every value that can change a text is part of the configuration's identity, which is stored with the results; what only
says how to run or to look (device, judges, the report's reference) is not.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrgi_kernels.names import METHODS, SEARCHES

from .. import __version__, tables
from ..digests import digest
from ..errors import UsageError, read_text, require
from ..loading import SPEED_ONLY
from ..tables import LABELS, SYMBOLS
from ..verified import check_guided, is_verifier
from .specs import TINY, check_judges

if TYPE_CHECKING:
    from entrgi_kernels.guidance.config import GuidanceConfig

MAX_BEST_OF = 1024  # samples a prompt
# Settings that are axes of the grid, or set elsewhere.
_AXES = ("method", "weight", "temperature", "seed")
# What means something to some methods alone: two configurations that differ in the others' settings alone are one.
_ADAM_ONLY = ("weight", "learning_rate", "betas", "eps", "state_dtype")
_FIRST_ORDER_ONLY = ("guidance_scale",)
_SEARCH_ONLY = frozenset(name for kind in SEARCHES.values() for name in kind.settings)
_FREE = ("name", "device", "judges", "reference")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Where prompts come from.

    Attributes:
        name: as the tables show it.
        path: "tiny" (prompts of the built-in models), a local .jsonl/.json/.csv/.tsv/.parquet/.txt file, or a dataset
            of the Hugging Face hub.
        split, subset: of a hub dataset.
        field: column that holds the prompt: a string, or a list of {"role", "content"} turns.
        num_prompts: how many; None takes all.
        shuffle: None keeps the order; "seed" shuffles with each run's own seed, as the published code does, so that
            every seed sees other prompts; a number shuffles with that.
    """

    name: str
    path: str
    split: str = "train"
    subset: str | None = None
    field: str = "prompt"
    num_prompts: int | None = None
    shuffle: str | int | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation; see docs/evaluation.md for the file's format.

    Attributes:
        name: of the evaluation.
        model: diffusion language model: "tiny", a folder or a Hugging Face name.
        rewards: reward models, likewise, or verifiers ("verifier:json"), which no method but "none" takes. Each is a
            value of one axis of the grid.
        datasets: where prompts come from.
        methods: names, or mappings of a method and settings; a list as a setting's value is swept.
        searches: names, or mappings of a search and settings, likewise; each goes with every method that names no
            search of its own. None given: the search is a setting like others.
        temperatures, seeds: axes of the grid.
        settings: of :class:`entrgi_kernels.guidance.config.GuidanceConfig`, for all methods.
        best_of: samples a prompt of methods without guidance and search: a number, None for `num_samples`, or "auto",
            which raises it until best-of-N costs as many FLOPs as the most expensive of the others.
        judges: mappings, see :mod:`.specs`.
        traces: prompts of the first seed of every dataset whose denoising is recorded for replays.
        reference: label of the method that others are compared with in the tables (besides best-of-N).
        dtype, trust_remote_code, device: for loading models.
    """

    name: str = "evaluation"
    model: str = TINY
    rewards: tuple[str, ...] = (TINY,)
    datasets: tuple[Dataset, ...] = (Dataset(TINY, TINY, num_prompts=24),)
    methods: tuple[Any, ...] = tuple(METHODS)
    searches: tuple[Any, ...] = ()
    temperatures: tuple[float, ...] = (0.7,)
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    best_of: int | str | None = None
    judges: tuple[Mapping[str, Any], ...] = ()
    traces: int = 0
    reference: str = LABELS["entrgi"]
    dtype: str = "auto"
    trust_remote_code: bool = False
    device: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values, from which :func:`from_dict` makes the same configuration."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def identity(self) -> dict[str, Any]:
        """The part that results depend on; as it was before there were searches, where there are none."""
        content = {name: value for name, value in self.to_dict().items() if name not in _FREE}
        return content if self.searches else {k: v for k, v in content.items() if k != "searches"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method under one temperature and seed, on one dataset with one reward model.

    Attributes:
        key: identifies all that its samples depend on, but for the prompt.
        label: of the method and what it was changed in, as the tables show it.
        config: the sampler's settings, temperature and seed included.
        compared: K of the comparison, the first so many of its samples; the rest, drawn where `best_of` says so, serve
            the compute-matched comparison alone.
    """

    key: str
    label: str
    dataset: str
    reward: str
    config: GuidanceConfig
    compared: int

    def describe(self) -> dict[str, Any]:
        """What the results say of the cell."""
        return {
            "label": self.label,
            "dataset": self.dataset,
            "reward_model": self.reward,
            "compared": self.compared,
            "settings": self.config.to_dict(),
        }


def presets() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = resources.files(__package__).joinpath("configs")
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_config(name: str, overrides: Mapping[str, Any] | None = None) -> EvaluationConfig:
    """A configuration from a YAML file, or one of :func:`presets` by its name.

    Args:
        name: path or preset.
        overrides: values that replace the file's; a dotted name reaches into `settings`.

    Raises:
        UsageError: an unreadable file, an unknown key, a value that is not accepted.
    """
    yaml = require("yaml", "reading a configuration", "evaluate")
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        if name not in presets():
            raise UsageError(f"no configuration {name!r}: expected a .yaml file or one of {', '.join(presets())}")
        text = resources.files(__package__).joinpath("configs", f"{name}.yaml").read_text(encoding="utf-8")
    else:
        text = read_text(path)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{name}: expected a mapping, got {type(content).__name__}")
    content.setdefault("name", path.stem)
    for key, value in (overrides or {}).items():
        target, _, rest = key.partition(".")
        if rest:
            content.setdefault(target, {})
            if not isinstance(content[target], dict):
                raise UsageError(f"{key}: {target} is no mapping")
            content[target][rest] = value
        else:
            content[key] = value
    return from_dict(content, name)


def from_dict(content: Mapping[str, Any], where: str = "configuration") -> EvaluationConfig:
    """A checked configuration from plain values.

    Raises:
        UsageError: the message names the key and what is accepted.
    """
    names = [field.name for field in dataclasses.fields(EvaluationConfig)]
    _known(content, names, where)
    try:  # digests are made of it
        json.dumps(content, ensure_ascii=False, skipkeys=True, default=str).encode("utf-8")
    except ValueError as error:  # a lone surrogate, or a list that holds itself
        raise UsageError(f"{where}: expected plain values and valid Unicode: {error}") from None
    values = dict(content)
    for name in ("rewards", "temperatures", "seeds", "methods", "searches", "datasets", "judges"):
        if name in values:
            given = values[name]
            values[name] = tuple(given) if isinstance(given, (list, tuple)) else (given,)
            if name not in ("judges", "searches") and (not values[name] or given is None):
                raise UsageError(f"{where}: {name} is empty: expected at least one")
    for name in ("name", "model", "reference", "dtype", "device"):
        if not isinstance(values.get(name, ""), str):
            raise UsageError(f"{where}: {name}={values[name]!r}: expected text")
    for name in ("judges", "searches"):
        values[name] = tuple(entry for entry in values.get(name, ()) if entry is not None)
    if "datasets" in values:
        values["datasets"] = tuple(_dataset(entry, where) for entry in values["datasets"])
        labels = [dataset.name for dataset in values["datasets"]]
        if len(set(labels)) < len(labels):
            raise UsageError(f"{where}: two datasets have one name: {', '.join(labels)}; give each its own `name`")
    settings = values.get("settings") or {}
    if not isinstance(settings, Mapping):
        raise UsageError(f"{where}: settings={settings!r}: expected a mapping of settings and values")
    values["settings"] = dict(settings)
    homes = dict(zip(_AXES, ("methods", "methods", "temperatures", "seeds"), strict=True))
    for axis, home in {**homes, **({"search": "searches"} if values["searches"] else {})}.items():
        if axis in values["settings"]:
            raise UsageError(f"{where}: settings.{axis} is an axis of the grid: use {home}")
    if "temperatures" in values:
        values["temperatures"] = tuple(_number(t, f"{where}: temperatures") for t in values["temperatures"])
    seeds = values.get("seeds", ())
    if not all(type(seed) is int and -(1 << 63) <= seed < 1 << 63 for seed in seeds):
        raise UsageError(f"{where}: seeds={list(seeds)!r}: expected integers of 64 bits")
    if any(not isinstance(reward, str) for reward in values.get("rewards", ())):
        raise UsageError(f"{where}: rewards={list(values['rewards'])!r}: expected names or folders of models")
    best_of = values.get("best_of")
    if not (best_of in (None, "auto") or (type(best_of) is int and 1 <= best_of <= MAX_BEST_OF)):
        raise UsageError(
            f"{where}: best_of={best_of!r}: expected a number of samples up to {MAX_BEST_OF}, auto, or null"
        )
    if not isinstance(values.get("traces", 0), int) or values.get("traces", 0) < 0:
        raise UsageError(f"{where}: traces={values['traces']!r}: expected a number of prompts >= 0")
    config = EvaluationConfig(**values)
    uses_tiny = {config.model == TINY, *(r == TINY for r in config.rewards if not is_verifier(r))}
    if len(uses_tiny) == 2:
        raise UsageError(
            f"{where}: the tiny models speak a vocabulary of their own: model and rewards are all tiny or none"
        )
    check_judges(config.judges, config.model)
    for _, settings, _ in methods_of(config):
        for reward in config.rewards:
            check_guided(reward, settings)
    return config


def methods_of(config: EvaluationConfig, best_of: int | None = None) -> Iterator[tuple[str, GuidanceConfig, int]]:
    """(label, settings, K of the comparison) of every method, search and temperature, repetitions left out; the seed is
    still the default.

    Args:
        config: whose `methods`, `searches`, `temperatures` and `settings` are combined.
        best_of: samples of best-of-N, where "auto" has been worked out.

    Raises:
        UsageError: a setting that the sampler does not take.
    """
    from entrgi_kernels.guidance.config import GuidanceConfig

    base = dict(config.settings)
    if config.model == TINY:
        base = {"max_new_tokens": 32, "steps": 16, "batch_size": 12, **base}
    seen, labels = set(), set()
    searches = [_entry("search", entry) for entry in config.searches] or [{}]
    for method in (_entry("method", entry) for entry in config.methods):
        for search in searches if "search" not in method else [{}]:
            twice = sorted(set(method) & set(search) - {"label"})
            if twice:
                raise UsageError(f"{', '.join(twice)}: set in methods: {method!r} and in searches: {search!r}")
            swept = {k: _listed(v) for k, v in {**method, **search}.items() if k != "label"}
            swept.setdefault("temperature", list(config.temperatures))
            for name, entry in (("methods", method), ("searches", search)):
                if "label" in entry and any(len(swept[k]) > 1 for k in entry if k not in ("label", "temperature")):
                    raise UsageError(f"{name}: {entry!r}: one label for several combinations")
            for values in itertools.product(*swept.values()):
                chosen = dict(zip(swept, values, strict=True))
                try:
                    settings = GuidanceConfig().replace(**{**base, **chosen})
                except (ValueError, TypeError) as error:
                    where = f"methods: {method!r}" + (f", searches: {search!r}" if search else "")
                    raise UsageError(f"{error} (in {where})") from None
                compared = settings.num_samples
                if is_best_of_n(settings) and "num_samples" not in chosen:
                    wanted = best_of if config.best_of == "auto" else config.best_of
                    settings = settings.replace(num_samples=wanted or settings.num_samples)
                identity = json.dumps(settings_identity(settings))
                if identity in seen:
                    continue
                label = label_of({**chosen, "search": settings.search}, method.get("label"), search.get("label"))
                if (label, settings.temperature) in labels:  # the tables would take them for one
                    raise UsageError(f"methods: two have the label {label!r}: give each its own")
                seen.add(identity)
                labels.add((label, settings.temperature))
                yield label, settings, compared


def is_best_of_n(config: GuidanceConfig) -> bool:
    """Whether it is what all others are compared with: samples of the model alone, each for itself."""
    return not config.guided and config.search == "best"


def label_of(chosen: Mapping[str, Any], method: str | None = None, search: str | None = None) -> str:
    """A method and its search, and what was changed in them, as in "EntRGi + SMC, M = 1".

    Args:
        chosen: the method and the search, and all that differs from the evaluation's settings.
        method, search: labels of their own, which stand for all that was changed in them.
    """
    parts = [tables.label_of(chosen["method"], chosen["search"], method, search)]
    for name, value in chosen.items():
        named = search if name in _SEARCH_ONLY else method
        if named is not None or name in ("method", "search", "temperature"):
            continue
        if name == "weight":
            parts += [str(value)] if value is not None else []
        else:
            parts.append(name.replace("_", "-") if value is True else f"{SYMBOLS.get(name, name)} = {value}")
    return ", ".join(parts)


def settings_identity(config: GuidanceConfig) -> dict[str, Any]:
    """The settings that texts depend on."""
    if not config.guided:
        dropped, own = ("guidance_steps", *_ADAM_ONLY, *_FIRST_ORDER_ONLY), {"method": "none"}
    else:
        dropped = _FIRST_ORDER_ONLY if METHODS[config.method].adam else _ADAM_ONLY
        own = {"guidance_steps": config.inner_steps}
    content = {name: value for name, value in config.to_dict().items() if name not in (*SPEED_ONLY, *dropped)}
    # Likewise of searches; without one there is nothing of them, as before there were any.
    unused = {*_SEARCH_ONLY.difference(SEARCHES[config.search].settings)}
    unused |= {"search"} if config.search == "best" else set()
    content = {name: value for name, value in content.items() if name not in unused}
    return {**content, **own}


def cells_of(
    config: EvaluationConfig, best_of: int | None = None, files: Mapping[str, str | None] | None = None
) -> list[Cell]:
    """The grid in its order: reward model, dataset, seed, temperature and method.

    Args:
        config: whose grid.
        best_of: samples of best-of-N, where "auto" has been worked out.
        files: what identifies the models' files, as in :attr:`Plan.files`.
    """
    from entrgi_kernels.guidance.keys import revision

    files = files or {}
    methods = list(methods_of(config, best_of))
    cells = []
    for reward, dataset, seed in itertools.product(config.rewards, config.datasets, config.seeds):
        for label, settings, compared in methods:
            settings = settings.replace(seed=seed)
            models = [config.model, reward, files.get(f"model:{config.model}"), files.get(f"reward:{reward}")]
            drawn = revision(settings)
            # Cells of revision 1 have the keys of before there were any.
            version = [__version__, drawn] if drawn > 1 else __version__
            identity = [*models, version, config.dtype, dataset.name, settings_identity(settings)]
            cells.append(
                Cell(digest(identity)[:12], label, dataset.name, reward, settings, min(compared, settings.num_samples))
            )
    return cells


def _entry(kind: str, entry: Any) -> Mapping[str, Any]:
    """An entry of `methods` or `searches` as a mapping."""
    entry = {kind: entry} if isinstance(entry, str) else entry
    plural = {"method": "methods", "search": "searches"}[kind]
    if not isinstance(entry, Mapping) or kind not in entry:
        raise UsageError(f"{plural}: {entry!r}: expected a {kind}'s name, or a mapping with `{kind}`")
    other = [name for name in _AXES if name in entry] if kind == "search" else []
    if other:
        raise UsageError(f"searches: {entry!r}: {', '.join(other)} belong to methods, temperatures or seeds")
    if not isinstance(entry.get("label", ""), str):
        raise UsageError(f"{plural}: {entry!r}: label: expected text")
    return entry


def _dataset(entry: Any, where: str) -> Dataset:
    if isinstance(entry, Dataset):
        return entry
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise UsageError(f"{where}: datasets: {entry!r}: expected a path or hub name, or a mapping with `path`")
    _known(entry, [field.name for field in dataclasses.fields(Dataset)], f"{where}: datasets")
    dataset = Dataset(**{"name": Path(entry["path"]).stem or entry["path"], **entry})
    for name in ("name", "split", "subset", "field"):
        value = getattr(dataset, name)
        if not isinstance(value, str) and (name, value) != ("subset", None):
            raise UsageError(f"{where}: datasets: {name}={value!r}: expected text")
    count, shuffle = dataset.num_prompts, dataset.shuffle
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise UsageError(f"{where}: {dataset.name}: num_prompts={count!r}: expected a number >= 1")
    if not (shuffle in (None, "seed") or (isinstance(shuffle, int) and not isinstance(shuffle, bool))):
        raise UsageError(f"{where}: {dataset.name}: shuffle={shuffle!r}: expected null, seed or a number")
    return dataset


def _known(content: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    unknown = sorted(str(name) for name in content if name not in names)
    if unknown:
        raise UsageError(f"{where}: no key {', '.join(map(repr, unknown))}; there are {', '.join(names)}")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{where}: {value!r} is no number")
    return float(value)
