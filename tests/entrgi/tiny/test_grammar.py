"""The review grammar and its scorer."""

import random

import pytest

from entrgi import tiny
from entrgi.tiny import grammar
from entrgi.tiny import lexicon as lx

PROMPT = "How was the noodle bar?"


def test_reviews_are_deterministic_and_seeded():
    assert grammar.reviews(40, seed=3) == grammar.reviews(40, seed=3)
    assert grammar.reviews(40, seed=3) != grammar.reviews(40, seed=4)


def test_generated_reviews_parse_without_defect():
    for review in grammar.reviews(300, seed=5):
        assert grammar.analyse(review.prompt, review.text).defects == (), review
        assert grammar.find_item(review.prompt) == (review.domain, review.item)


def test_moods_reach_both_ends():
    scores = [tiny.gold_score(r.prompt, r.text) for r in grammar.reviews(300, seed=6)]
    assert max(scores) > 2.5 and min(scores) < -2.5
    assert abs(sum(scores) / len(scores)) < 0.6


def test_every_adjective_has_a_value_and_every_kind_both_signs():
    used = set()
    for kind, words in lx.ADJECTIVES.items():
        values = [lx.VALENCE[w] for w in words.split()]
        assert min(values) < 0 < max(values), kind
        used.update(words.split())
    assert used == set(lx.VALENCE)
    assert not set(lx.RATED) & set(lx.HAND_SET)


def test_a_thing_means_one_thing_everywhere():
    seen = {}
    for domain, items in lx.ITEMS.items():
        for item in items:
            for thing in grammar.things_of(domain, item):
                assert thing.kind in lx.ADJECTIVES
                assert seen.setdefault(thing.name, thing) == thing


def test_prompts_are_distinct_deterministic_and_mixed():
    prompts = tiny.prompts(60)
    assert len(set(prompts)) == 60
    assert prompts == tiny.prompts(60) and prompts[:7] == tiny.prompts(7)
    assert prompts != tiny.prompts(60, seed=1)
    assert {grammar.find_item(p)[0] for p in prompts} == set(lx.DOMAINS)
    assert tiny.prompts(0) == []


@pytest.mark.parametrize("n", [-1, 10**6])
def test_prompts_refuse_impossible_numbers(n):
    with pytest.raises(ValueError, match="number of prompts"):
        tiny.prompts(n)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("The soup was delicious.", "The soup was bland."),
        ("The soup was very fresh.", "The soup was slightly fresh."),
        ("The soup was fresh.", "The soup was not fresh."),
        ("The soup was bland, but the waiter was kind.", "The waiter was kind, but the soup was bland."),
        ("The soup was fresh. The waiter was kind.", "The soup was fresh."),
        ("Friendly waiter.", "Tasty waiter."),
        ("The soup was fresh.", "The soup was fresh. The soup was fresh."),
        ("The soup was great.", "The plot was great."),
        ("I hated it. I regret it.", "I hated it. I hated it."),
        ("The soup was delicious.", "delicious superb great wonderful heavenly"),
        ("The soup was delicious.", "The soup was delicious"),
        ("The prices were fair.", "The prices was fair."),
        ("Sadly, the soup was bland.", "Luckily, the soup was bland."),
        ("I liked it.", ""),
    ],
)
def test_the_scorer_prefers(better, worse):
    assert tiny.gold_score(PROMPT, better) > tiny.gold_score(PROMPT, worse)


@pytest.mark.parametrize(
    ("text", "defect"),
    [
        ("Tasty waiter.", "mismatch"),
        ("The plot was clever.", "off-topic"),
        ("I read it in one night.", "off-topic"),
        ("The soup was fresh", "unfinished"),
        ("Soup the fresh was.", "unparsed"),
        ("The soup was fresh. The soup was bland.", "contradiction"),
        ("The soup was fresh and the bread was fresh.", "repetition"),
        ("", "empty"),
        ("...", "empty"),
    ],
)
def test_defects_are_named(text, defect):
    assert defect in grammar.analyse(PROMPT, text).defects


def test_off_topic_needs_a_known_topic():
    assert grammar.analyse("Hello there", "The plot was clever.").defects == ()


def test_scorer_survives_any_text():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("the soup was ,.!?é'\n but and I ") for _ in range(rng.randint(0, 60)))
        assert -10 < tiny.gold_score(PROMPT, text) < 10


def test_another_rater_differs_but_never_turns_a_word_round():
    offsets = grammar.rater(1)
    assert offsets == grammar.rater(1) and offsets != grammar.rater(2)
    for word, value in lx.VALENCE.items():
        assert (value + offsets[word]) * value > 0
    text = "The soup was delicious. I liked it."
    moved = grammar.analyse(PROMPT, text, offsets).score
    assert moved != tiny.gold_score(PROMPT, text) and abs(moved - tiny.gold_score(PROMPT, text)) < 2
