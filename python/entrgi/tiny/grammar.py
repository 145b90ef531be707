"""A procedural grammar of short reviews, and the rule that scores them.

The generator and the scorer share one set of clause forms, so every generated review parses without a defect, and any
text can be scored: what does not parse is penalised instead of being ignored. Sizes: six domains, 54 items.

The score is a rule seeded by human ratings of single words (see :mod:`entrgi.tiny.lexicon`); it is not a human
preference. Its unit is that of the ratings, roughly -4 to 4.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import re
from collections.abc import Mapping, Sequence

from . import lexicon as lx

# "but" weighs what follows it more than what precedes it, as readers do.
_BEFORE_BUT, _AFTER_BUT = 0.7, 1.3
_PENALTY = {
    "unparsed": 1.0,
    "mismatch": 1.0,
    "repetition": 0.8,
    "contradiction": 0.9,
    "off-topic": 0.8,
    "unfinished": 0.5,
    "tone": 0.5,
    "agreement": 0.3,
    "empty": 2.5,
}
_MAX_PENALTY = 4.0


@dataclasses.dataclass(frozen=True)
class Thing:
    """Something a review may speak of: its words, its kind (see ``lexicon.ADJECTIVES``), and its number."""

    name: str
    kind: str
    plural: bool


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What the scorer found: the value of the opinions, and the defects by name (one entry each)."""

    value: float
    defects: tuple[str, ...]

    @property
    def score(self) -> float:
        """The value less a penalty for each defect, up to a limit."""
        return self.value - min(_MAX_PENALTY, sum(_PENALTY[d] for d in self.defects))


def _things(spec: str) -> tuple[Thing, ...]:
    out = []
    for word in spec.split():
        name, kind = word.split("/")
        out.append(Thing(name.rstrip("*").replace("_", " "), kind, name.endswith("*")))
    return tuple(out)


@functools.cache
def things_of(domain: str, item: str) -> tuple[Thing, ...]:
    """The things a review of ``item`` may mention; those of the item itself come first."""
    return _things(lx.ITEMS[domain][item]) + _things(lx.DOMAINS[domain][1])


@functools.cache
def _adjectives(kind: str) -> tuple[str, ...]:
    return tuple(lx.ADJECTIVES[kind].split())


@functools.cache
def _all_things() -> dict[str, tuple[Thing, frozenset[str]]]:
    """name -> (thing, the items it belongs to). A name has one kind and number wherever it appears."""
    table: dict[str, tuple[Thing, frozenset[str]]] = {}
    for domain, items in lx.ITEMS.items():
        for item in items:
            for thing in things_of(domain, item):
                known = table.get(thing.name, (thing, frozenset()))
                table[thing.name] = (known[0], known[1] | {item})
    return table


# ---------------------------------------------------------------------------------------------------------------
# Scoring


def _alternatives(words: Sequence[str]) -> str:
    return "(?:" + "|".join(sorted((re.escape(w) for w in words), key=len, reverse=True)) + ")"


@functools.cache
def _patterns() -> dict[str, re.Pattern[str]]:
    adjective = _alternatives(sorted(lx.VALENCE))
    thing = _alternatives(sorted(_all_things()))
    degree = f"(?:{_alternatives(list(lx.DEGREES))} )?"
    whole = _alternatives(sorted({word for word, _ in lx.DOMAINS.values()}))
    be, negation = "(?:was|were)", _alternatives(list(lx.NEGATIONS))
    forms = {
        "two": rf"the (?P<thing>{thing}) (?P<be>{be}) (?P<adj>{degree}{adjective}) and (?P<adj2>{degree}{adjective})",
        "not": rf"the (?P<thing>{thing}) (?P<be>{be}) (?P<neg>{negation}) (?P<adj>{adjective})",
        "is": rf"the (?P<thing>{thing}) (?P<be>{be}) (?P<adj>{degree}{adjective})",
        "found": rf"I found the (?P<thing>{thing}) (?P<adj>{degree}{adjective})",
        "verb": rf"I (?P<verb>{_alternatives(list(lx.VERBS))}) (?:the (?P<thing>{thing})|it|this (?P<whole>{whole}))",
        "what": rf"what an? (?P<adj>{adjective}) (?P<whole>{whole})",
        "it": rf"it was an? (?P<adj>{adjective}) (?P<whole>{whole})",
        "bare": rf"(?P<adj>{degree}{adjective}) (?P<thing>{thing})",
    }
    out = {name: re.compile(form + r"(?![\w'])") for name, form in forms.items()}
    events = [phrase for table in lx.EVENTS.values() for phrase in table]
    out["event"] = re.compile(_alternatives(events) + r"(?![\w'])")
    out["closing"] = re.compile(_alternatives(list(lx.CLOSINGS)) + r"(?![\w'])")
    out["tone"] = re.compile(rf"(?P<tone>{_alternatives(list(lx.TONES))}), ")
    out["join"] = re.compile(r"(?P<join>, but|, and| and|,) ")
    out["next"] = re.compile(r", but |, and | and |, ")
    return out


@functools.cache
def _fixed_phrases() -> dict[str, tuple[float, str | None]]:
    table: dict[str, tuple[float, str | None]] = {phrase: (value, None) for phrase, value in lx.CLOSINGS.items()}
    for domain, events in lx.EVENTS.items():
        table.update({phrase: (value, domain) for phrase, value in events.items()})
    return table


def find_item(prompt: str) -> tuple[str, str] | None:
    """(domain, item) that a prompt of the grammar is about, or None. The longest name wins."""
    best: tuple[str, str] | None = None
    for domain, items in lx.ITEMS.items():
        for item in items:
            if re.search(rf"\b{re.escape(item)}\b", prompt) and (best is None or len(item) > len(best[1])):
                best = (domain, item)
    return best


class _Reader:
    """Reads one text clause by clause and collects values and defects."""

    def __init__(self, prompt: str, offsets: Mapping[str, float]):
        self.topic = find_item(prompt)
        self.offsets = offsets
        self.values: list[tuple[float, float]] = []  # (weight, value)
        self.defects: list[str] = []
        self.polarity: dict[str, float] = {}
        self.words: list[str] = []

    def rate(self, word: str, base: float) -> float:
        return base + self.offsets.get(word, 0.0)

    def adjective(self, text: str, name: str | None, kind: str) -> float:
        """The value of "[degree] adjective" said of a thing of this kind."""
        *degree, adjective = text.split()
        # Listing the same adjective twice reads as spam, whatever it is about.
        if adjective in self.words:
            self.defects.append("repetition")
        self.words.append(adjective)
        if adjective not in _adjectives(kind):
            self.defects.append("mismatch")
        return self.rate(adjective, lx.VALENCE[adjective]) * lx.DEGREES.get(" ".join(degree), 1.0)

    def about(self, name: str, value: float) -> None:
        """Note an opinion on ``name``; the opposite opinion elsewhere is a contradiction, the same one a repetition."""
        if name in self.polarity:
            same = self.polarity[name] * value >= 0
            self.defects.append("repetition" if same else "contradiction")
        self.polarity[name] = value

    def clause(self, text: str, at: int) -> tuple[int, float] | None:
        """(end, value) of the clause that starts at ``at``, or None where no form matches."""
        patterns = _patterns()
        for form in ("event", "closing"):
            match = patterns[form].match(text, at)
            if match:
                value, domain = _fixed_phrases()[match.group()]
                if domain is not None and self.topic is not None and domain != self.topic[0]:
                    self.defects.append("off-topic")
                value = self.rate(match.group(), value)
                self.about(match.group(), value)
                return match.end(), value
        for form in ("two", "not", "is", "found", "verb", "what", "it", "bare"):
            match = patterns[form].match(text, at)
            if match:
                return match.end(), self._value(match)
        return None

    def _value(self, match: re.Match[str]) -> float:
        group = match.groupdict()
        name = group.get("thing")
        if name is not None:
            thing, items = _all_things()[name]
            kind = thing.kind
            if self.topic is not None and self.topic[1] not in items:
                self.defects.append("off-topic")
            if group.get("be") and (group["be"] == "were") != thing.plural:
                self.defects.append("agreement")
        else:
            kind = "overall"
            whole = group.get("whole")
            if whole is not None and self.topic is not None and whole != lx.DOMAINS[self.topic[0]][0]:
                self.defects.append("off-topic")
        if "verb" in group:
            value = self.rate(group["verb"], lx.VERBS[group["verb"]])
        else:
            value = self.adjective(group["adj"], name, kind)
            if group.get("adj2"):
                second = self.adjective(group["adj2"], name, kind)
                if value * second < 0:
                    self.defects.append("contradiction")
                value = 0.6 * (value + second)
            if group.get("neg"):
                value *= lx.NEGATIONS[group["neg"]]
        self.about(name or "the whole", value)
        return value

    def sentence(self, text: str) -> None:
        patterns = _patterns()
        text = _uncapitalise(text)
        at, join, start = 0, "", len(self.values)
        while at < len(text):
            tone = patterns["tone"].match(text, at) if at == 0 else None
            if tone:
                at = tone.end()
            found = self.clause(text, at)
            if found is None:
                # Skip to the next joint: no credit for loose praise, full blame for loose complaints.
                joint = patterns["next"].search(text, at)
                end = joint.start() if joint else len(text)
                loose = [lx.VALENCE[w] for w in re.findall(r"[\w']+", text[at:end]) if w in lx.VALENCE]
                self.defects.append("unparsed")
                found = (end, min(0.0, sum(loose) / len(loose)) if loose else 0.0)
            end, value = found
            if tone and lx.TONES[tone["tone"]] * value < 0:
                self.defects.append("tone")
            weight = 1.0
            if join == ", but":
                if self.values[start:] and self.values[-1][1] * value > 0:
                    self.defects.append("tone")  # a turn that turns nothing
                self.values[start:] = [(w * _BEFORE_BUT, v) for w, v in self.values[start:]]
                weight = _AFTER_BUT
            self.values.append((weight, value))
            joint = patterns["join"].match(text, end)
            if joint:
                at, join = joint.end(), joint["join"]
            else:
                if end < len(text):
                    self.defects.append("unparsed")
                at = len(text)

    def result(self) -> Analysis:
        if not self.values:
            return Analysis(0.0, ("empty",))
        if max(v for _, v in self.values) > 1.9 and min(v for _, v in self.values) < -1.9 and self._ends_against():
            self.defects.append("contradiction")
        total = sum(w * v for w, v in self.values)
        # A mean shrunk toward 0: three things praised count for more than one, thirty hardly for more than three.
        value = 1.5 * total / (sum(w for w, _ in self.values) + 0.8)
        return Analysis(value, tuple(self.defects))

    def _ends_against(self) -> bool:
        """Whether the last remark turns against everything said before it ("awful, awful. Five stars.")."""
        *before, (_, last) = self.values
        return all(v * last < 0 for _, v in before)


def _uncapitalise(text: str) -> str:
    return text if text.startswith("I ") else text[:1].lower() + text[1:]


def analyse(prompt: str, text: str, offsets: Mapping[str, float] | None = None) -> Analysis:
    """Parse ``text`` as an answer to ``prompt``.

    Args:
        prompt: any prompt; on-topic checks are made when it names an item of the grammar.
        text: any text.
        offsets: added to the value of single words and fixed phrases: another rater's taste (see :func:`rater`).

    Returns:
        The value of the opinions found and the list of defects.
    """
    reader = _Reader(prompt, offsets or {})
    text = text.strip()
    if not text:
        return Analysis(0.0, ("empty",))
    if text[-1] not in ".!":
        reader.defects.append("unfinished")
    for sentence in re.split(r"[.!?]", text):
        if sentence.strip():
            reader.sentence(sentence.strip())
    return reader.result()


def gold_score(prompt: str, text: str) -> float:
    """The rule-based score of ``text`` as an answer to ``prompt``: about -4 (bad review) to 4 (praise).

    Word values come from human ratings; repetition, contradiction, mismatches ("tasty waiter"), words that are off
    topic and anything that is not a clause of the grammar cost points, whatever the words say.
    """
    return analyse(prompt, text).score


def rater(seed: int, spread: float = 0.35) -> dict[str, float]:
    """Offsets of an imagined second rater: every word and phrase moved by a normal of this standard deviation.

    Offsets never turn praise into complaint: they are limited to 60% of the word's own value.
    """
    rng = random.Random(f"rater/{seed}")
    table = {**lx.VALENCE, **lx.VERBS, **{phrase: value for phrase, (value, _) in _fixed_phrases().items()}}
    offsets = {}
    for word in sorted(table):
        limit = 0.6 * abs(table[word])
        offsets[word] = max(-limit, min(limit, rng.gauss(0.0, spread)))
    return offsets


# ---------------------------------------------------------------------------------------------------------------
# Generation


@dataclasses.dataclass(frozen=True)
class Review:
    """One prompt with one answer."""

    prompt: str
    text: str
    domain: str
    item: str


def make_prompt(rng: random.Random) -> tuple[str, str, str]:
    """(prompt, domain, item), drawn evenly over domains, then items, then wordings."""
    domain = rng.choice(sorted(lx.ITEMS))
    item = rng.choice(sorted(lx.ITEMS[domain]))
    name = item if rng.random() < 0.5 else f"{item} {rng.choice(lx.QUALIFIERS[domain])}"
    return rng.choice(lx.PROMPTS).format(item=name), domain, item


def prompts(n: int, seed: int = 0) -> list[str]:
    """``n`` distinct prompts of the grammar, domains mixed; the same for the same seed, and a prefix for a smaller n.

    Raises:
        ValueError: for a negative n, or more prompts than the grammar has.
    """
    total = sum(len(items) * (1 + len(lx.QUALIFIERS[d])) for d, items in lx.ITEMS.items()) * len(lx.PROMPTS)
    if not 0 <= n <= total:
        raise ValueError(f"n must be between 0 and {total}, the number of prompts of the grammar; got {n}")
    rng = random.Random(f"prompts/{seed}")
    seen: dict[str, None] = {}
    while len(seen) < n:
        seen.setdefault(make_prompt(rng)[0])
    return list(seen)


class _Writer:
    """Writes one review; remembers what was said so that nothing is said twice."""

    def __init__(self, rng: random.Random, domain: str, item: str):
        self.rng, self.domain, self.item = rng, domain, item
        self.mood = rng.uniform(-2.6, 2.6)
        self.used: set[str] = set()
        # The item's own things are mentioned more often than those of its domain.
        things = list(things_of(domain, item))
        rng.shuffle(things)
        own = {t.name for t in _things(lx.ITEMS[domain][item])}
        self.things = sorted(things, key=lambda t: rng.random() * (0.4 if t.name in own else 1.0))

    def near(self, table: Mapping[str, float], target: float) -> str:
        """A word not used yet whose value is near the target (softly: every fitting word turns up sometimes)."""
        fitting = [w for w in table if w not in self.used and table[w] * target >= 0] or list(table)
        weights = [math.exp(-((table[w] - target) ** 2) / 1.5) + 0.03 for w in fitting]
        word = self.rng.choices(fitting, weights)[0]
        self.used.add(word)
        return word

    def target(self, sign: float = 0.0) -> float:
        """A value around the mood; of the given sign when there is one."""
        value = self.rng.gauss(self.mood, 0.9)
        return math.copysign(max(abs(value), 0.5), sign) if sign else value

    def phrase(self, kind: str, target: float, degree: float = 0.4) -> str:
        word = self.near({w: lx.VALENCE[w] for w in _adjectives(kind)}, target)
        if self.rng.random() >= degree:
            return word
        # Big words for big feelings: choose the degree that brings the value near the target.
        weights = [math.exp(-((lx.VALENCE[word] * d - target) ** 2)) + 0.05 for d in lx.DEGREES.values()]
        return f"{self.rng.choices(list(lx.DEGREES), weights)[0]} {word}"

    def clause(self, target: float) -> str:
        """A clause about a thing, of the target's sign."""
        rng = self.rng
        thing = self.things.pop(0)
        be = "were" if thing.plural else "was"
        form = rng.choices(("is", "two", "not", "found", "verb"), (48, 14, 8, 14, 16))[0]
        if form == "two":
            # Two words of one sign, each said once.
            first, second = (self.phrase(thing.kind, target, 0.2) for _ in range(2))
            return f"the {thing.name} {be} {first} and {second}"
        if form == "not":
            negation = rng.choice(sorted(lx.NEGATIONS))
            return f"the {thing.name} {be} {negation} {self.phrase(thing.kind, -target, 0.0)}"
        if form == "found":
            return f"I found the {thing.name} {self.phrase(thing.kind, target)}"
        if form == "verb":
            return f"I {self.near(lx.VERBS, target)} the {thing.name}"
        return f"the {thing.name} {be} {self.phrase(thing.kind, target)}"

    def overall(self, target: float) -> str:
        whole = lx.DOMAINS[self.domain][0]
        form = self.rng.randrange(3)
        if form == 2:
            verb = self.near(lx.VERBS, target)
            return f"I {verb} " + self.rng.choice(("it", f"this {whole}"))
        word = self.phrase("overall", target, 0.0)
        article = "an" if word[0] in "aeiou" else "a"
        return f"{'what' if form == 0 else 'it was'} {article} {word} {whole}"

    def event(self, target: float) -> str:
        return self.near(lx.EVENTS[self.domain], target)

    def middle(self) -> str:
        rng = self.rng
        form = rng.choices(("one", "and", "but", "list", "tone", "event"), (24, 20, 20, 10, 10, 16))[0]
        target = self.target()
        sign = 1.0 if target >= 0 else -1.0
        if form == "and":
            return f"{self.clause(target)}, and {self.clause(self.target(sign))}"
        if form == "but":
            # The end of a turn carries the mood.
            sign = 1.0 if self.mood >= 0 else -1.0
            return f"{self.clause(self.target(-sign))}, but {self.clause(self.target(sign))}"
        if form == "list":
            parts = []
            for _ in range(rng.choice((2, 3))):
                thing = self.things.pop(0)
                parts.append(f"{self.phrase(thing.kind, self.target(sign), 0.2)} {thing.name}")
            return ", ".join(parts[:-1]) + " and " + parts[-1]
        if form == "tone":
            fitting = [t for t, v in lx.TONES.items() if v * target >= 0]
            return f"{rng.choice(fitting)}, {self.clause(target)}"
        return self.event(target) if form == "event" else self.clause(target)

    def closing(self) -> str:
        return self.near(lx.CLOSINGS, self.mood)


def make_text(rng: random.Random, domain: str, item: str) -> str:
    """One review of one to three sentences whose opinions follow a hidden mood."""
    writer = _Writer(rng, domain, item)
    shape = rng.choices(("M", "OM", "MC", "OC", "OMC", "MM", "MMC", "O"), (14, 18, 20, 6, 18, 14, 8, 2))[0]
    make = {"M": writer.middle, "C": writer.closing, "O": lambda: writer.overall(writer.mood)}
    sentences = []
    for part in shape:
        sentence = make[part]()
        end = "!" if abs(writer.mood) > 1.8 and rng.random() < 0.15 else "."
        sentences.append(sentence[:1].upper() + sentence[1:] + end)
    return " ".join(sentences)


def make_review(rng: random.Random, max_words: int = 26) -> Review:
    """One prompt with an answer that parses without a defect, of at most ``max_words`` words."""
    while True:
        prompt, domain, item = make_prompt(rng)
        text = make_text(rng, domain, item)
        # A slip of the writer (an accidental contradiction, say) is thrown away: the data set is clean by rule.
        if len(text.split()) <= max_words and not analyse(prompt, text).defects:
            return Review(prompt, text, domain, item)


def reviews(n: int, seed: int) -> list[Review]:
    """``n`` reviews, the same for the same seed."""
    rng = random.Random(f"reviews/{seed}")
    return [make_review(rng) for _ in range(n)]
