"""Word lists of the review grammar.

Two kinds of numbers appear below. ``RATED`` holds mean human ratings on a scale of -4 to 4: they are the figures of
the VADER sentiment lexicon (C. Hutto and E. Gilbert, MIT licence), copied by hand for the words used here.
``HAND_SET`` holds the values of words that lexicon does not list, or lists in another sense; they are ours.
Nothing here is imported from the ``vaderSentiment`` package, at run time or in training.
"""

from __future__ import annotations

# Mean human ratings (VADER lexicon).
RATED: dict[str, float] = {
    "amazing": 2.8,
    "annoying": -1.7,
    "arrogant": -2.2,
    "awful": -2.0,
    "awkward": -0.6,
    "bad": -2.5,
    "beautiful": 2.9,
    "boring": -1.3,
    "breathtaking": 2.0,
    "bright": 1.9,
    "brilliant": 2.8,
    "broken": -2.1,
    "careless": -1.5,
    "chaotic": -2.2,
    "charming": 2.8,
    "cheerful": 2.5,
    "clean": 1.7,
    "clear": 1.6,
    "clever": 2.0,
    "comfortable": 2.3,
    "confusing": -0.9,
    "convincing": 1.7,
    "dangerous": -2.1,
    "defective": -1.9,
    "delicious": 2.7,
    "delightful": 2.8,
    "dirty": -1.9,
    "disappointing": -2.2,
    "disgusting": -2.4,
    "dishonest": -2.7,
    "dreadful": -1.9,
    "dull": -1.7,
    "elegant": 2.1,
    "enjoyable": 1.9,
    "excellent": 2.7,
    "exciting": 2.2,
    "fabulous": 2.4,
    "fair": 1.3,
    "fantastic": 2.6,
    "faulty": -1.3,
    "forgetful": -1.1,
    "friendly": 2.2,
    "frustrating": -1.9,
    "fun": 2.3,
    "funny": 1.9,
    "generous": 2.3,
    "gloomy": -0.6,
    "good": 1.9,
    "great": 3.1,
    "heavenly": 3.0,
    "helpful": 1.8,
    "honest": 2.3,
    "horrible": -2.5,
    "hostile": -1.6,
    "impressive": 2.3,
    "incompetent": -2.1,
    "kind": 2.4,
    "lazy": -1.5,
    "likeable": 2.0,
    "lousy": -2.5,
    "lovely": 2.8,
    "magnificent": 2.9,
    "messy": -1.5,
    "miserable": -2.2,
    "nasty": -2.6,
    "nice": 1.8,
    "noisy": -0.7,
    "original": 1.3,
    "outrageous": -2.0,
    "outstanding": 3.0,
    "pathetic": -2.7,
    "peaceful": 2.2,
    "perfect": 2.7,
    "pleasant": 2.3,
    "poor": -2.1,
    "powerful": 1.8,
    "relaxing": 2.2,
    "ridiculous": -1.5,
    "rude": -2.0,
    "satisfying": 2.0,
    "solid": 0.6,
    "strong": 2.3,
    "stunning": 1.6,
    "stupid": -2.4,
    "superb": 3.1,
    "terrible": -2.1,
    "thrilling": 2.1,
    "ugly": -2.3,
    "uncomfortable": -1.6,
    "unfair": -2.1,
    "unfriendly": -1.5,
    "unpleasant": -2.1,
    "useful": 1.9,
    "useless": -1.8,
    "weak": -1.9,
    "wonderful": 2.7,
    "worn": -1.2,
    "worthless": -1.9,
}

# Not listed there, or used in another sense here ("cold" food, "high" prices): set by hand on the same scale.
HAND_SET: dict[str, float] = {
    "attentive": 2.1,
    "bland": -1.3,
    "burnt": -1.8,
    "cheap": -1.2,
    "clumsy": -1.0,
    "cold": -1.0,
    "cosy": 2.0,
    "cramped": -1.3,
    "crisp": 1.5,
    "crowded": -1.1,
    "dingy": -1.5,
    "dry": -0.9,
    "fast": 1.6,
    "filthy": -2.5,
    "flimsy": -1.6,
    "forgettable": -1.3,
    "fresh": 1.9,
    "greasy": -1.4,
    "gripping": 2.2,
    "grumpy": -1.6,
    "hard": -0.9,
    "high": -1.1,
    "juicy": 1.8,
    "low": 1.3,
    "lumpy": -1.4,
    "mediocre": -1.0,
    "memorable": 2.1,
    "modest": 1.0,
    "moving": 1.9,
    "patient": 1.5,
    "polite": 1.9,
    "predictable": -1.2,
    "reasonable": 1.5,
    "reliable": 2.1,
    "salty": -1.0,
    "shabby": -1.5,
    "shallow": -1.2,
    "sharp": 1.6,
    "silly": -0.7,
    "simple": 1.1,
    "sleek": 1.6,
    "slow": -1.1,
    "smelly": -1.9,
    "smooth": 1.6,
    "soft": 1.3,
    "soggy": -1.5,
    "sour": -1.2,
    "spacious": 1.6,
    "spectacular": 2.7,
    "spotless": 2.2,
    "stale": -1.9,
    "steep": -1.3,
    "sturdy": 1.7,
    "tasteless": -1.9,
    "tasty": 2.2,
    "tedious": -1.6,
    "tender": 1.6,
    "tiring": -1.0,
    "touching": 1.8,
    "unreliable": -2.0,
    "witty": 2.0,
    "wooden": -1.4,
}

VALENCE: dict[str, float] = {**RATED, **HAND_SET}

# Which adjectives fit which kind of thing. An adjective beside a thing of another kind is a mismatch ("tasty waiter").
ADJECTIVES: dict[str, str] = {
    "taste": "fresh delicious tasty crisp juicy tender perfect superb wonderful good great nice heavenly satisfying "
    "bland stale greasy soggy salty cold burnt dry sour disgusting horrible nasty awful bad tasteless",
    "person": "friendly kind cheerful helpful polite patient charming generous attentive wonderful great nice honest "
    "rude careless lazy arrogant slow grumpy hostile incompetent clumsy forgetful unfriendly awful dishonest",
    "place": "clean cosy comfortable bright elegant spacious lovely beautiful charming peaceful pleasant spotless nice "
    "dirty noisy gloomy cramped shabby ugly smelly dingy messy filthy cold unpleasant",
    "comfort": "comfortable soft clean perfect excellent spotless cosy good "
    "uncomfortable hard broken dirty lumpy worn awful smelly",
    "price": "fair reasonable low great good modest steep high ridiculous terrible unfair outrageous bad",
    "story": "clever gripping thrilling moving funny original witty exciting brilliant powerful convincing beautiful "
    "perfect touching great boring dull predictable confusing silly tedious weak stupid shallow slow pathetic "
    "terrible",
    "performer": "brilliant convincing charming funny superb excellent great amazing likeable memorable "
    "wooden weak dull annoying awkward terrible forgettable pathetic bad",
    "art": "beautiful stunning lovely magnificent superb delightful impressive great "
    "ugly dull cheap annoying awful boring disappointing poor",
    "part": "reliable solid sharp smooth sturdy sleek excellent strong perfect impressive great good "
    "unreliable flimsy faulty weak slow broken noisy useless defective cheap poor worthless",
    "software": "clear simple useful fast helpful smooth excellent good "
    "confusing slow useless messy annoying frustrating terrible poor",
    "nature": "beautiful stunning breathtaking peaceful lovely magnificent impressive spectacular delightful "
    "dull ugly crowded dirty boring disappointing gloomy",
    "activity": "fun exciting relaxing enjoyable thrilling wonderful fantastic delightful "
    "boring dull chaotic tedious dangerous tiring disappointing awful",
    "overall": "great good wonderful fantastic lovely excellent amazing nice perfect memorable fabulous outstanding "
    "bad terrible awful disappointing horrible poor dreadful mediocre miserable lousy forgettable",
}

# domain -> (word for the thing as a whole, things any item of the domain has). "noun/kind"; a final "*" marks a plural.
DOMAINS: dict[str, tuple[str, str]] = {
    "eating": (
        "place",
        (
            "waiter/person waitress/person chef/person dining_room/place tables*/place chairs*/comfort "
            "prices*/price music/art soup/taste dessert/taste bread/taste"
        ),
    ),
    "lodging": (
        "place",
        (
            "room/place bed/comfort bathroom/place breakfast/taste view/nature owner/person "
            "receptionist/person price/price garden/nature pillows*/comfort hallway/place"
        ),
    ),
    "films": (
        "film",
        (
            "plot/story ending/story script/story jokes*/story lead_actor/performer villain/performer "
            "music/art costumes*/art opening_scene/story cast/performer"
        ),
    ),
    "books": (
        "book",
        (
            "plot/story ending/story first_chapter/story hero/performer narrator/performer cover/art "
            "dialogue/story prose/story price/price"
        ),
    ),
    "devices": (
        "product",
        (
            "battery/part buttons*/part manual/software app/software case/part price/price "
            "support_team/person seller/person design/art"
        ),
    ),
    "outings": (
        "trip",
        (
            "guide/person tickets*/price crowd/place gift_shop/place view/nature snacks*/taste "
            "audio_tour/software staff/person benches*/comfort"
        ),
    ),
}

# domain -> item -> things that this item has besides the domain's.
ITEMS: dict[str, dict[str, str]] = {
    "eating": {
        "cafe": "coffee/taste cake/taste",
        "noodle bar": "noodles*/taste dumplings*/taste",
        "pizzeria": "pizza/taste crust/taste",
        "bakery": "rolls*/taste pastries*/taste",
        "burger stand": "burger/taste fries*/taste",
        "sushi bar": "sushi/taste fish/taste",
        "steak house": "steak/taste wine/taste",
        "tea room": "scones*/taste tea/taste",
        "taco truck": "tacos*/taste salsa/taste",
    },
    "lodging": {
        "hotel": "lobby/place pool/place",
        "hostel": "kitchen/place bunks*/comfort",
        "guest house": "dinner/taste terrace/nature",
        "cabin": "fireplace/part lake/nature",
        "campsite": "showers*/place forest/nature",
        "inn": "bar/place beer/taste",
        "motel": "shower/part carpet/comfort",
        "mountain lodge": "sauna/place slopes*/nature",
        "holiday flat": "kitchen/place balcony/place",
    },
    "films": {
        "comedy": "gags*/story lead_actress/performer",
        "thriller": "twist/story detective/performer",
        "western": "duel/story landscape/nature",
        "horror film": "monster/performer sound_effects*/art",
        "cartoon": "drawings*/art songs*/art",
        "war film": "battle_scenes*/story photography/art",
        "romance": "love_story/story couple/performer",
        "heist film": "robbery/story crew/performer",
        "musical": "songs*/art dancers*/performer",
    },
    "books": {
        "novel": "love_story/story heroine/performer",
        "picture book": "rhymes*/story drawings*/art",
        "spy novel": "hunt/story agent/performer",
        "adventure story": "chase/story pirates*/performer",
        "comic book": "drawings*/art jokes*/story",
        "crime story": "twist/story detective/performer",
        "family saga": "letters*/story grandmother/performer",
        "fairy tale": "songs*/art witch/performer",
        "ghost story": "mystery/story ghost/performer",
    },
    "devices": {
        "phone": "screen/part camera/part",
        "laptop": "keyboard/part screen/part",
        "headset": "sound/part microphone/part",
        "camera": "lens/part pictures*/art",
        "printer": "paper_tray/part software/software",
        "vacuum cleaner": "motor/part brush/part",
        "coffee machine": "coffee/taste pump/part",
        "smart watch": "strap/comfort screen/part",
        "tablet": "screen/part pen/part",
    },
    "outings": {
        "museum": "paintings*/art exhibits*/art",
        "zoo": "monkey_show/activity gardens*/nature",
        "theme park": "rides*/activity parade/activity",
        "boat trip": "captain/person lunch/taste",
        "city tour": "walk/activity old_town/nature",
        "concert": "singer/performer band/performer",
        "hiking trail": "climb/activity waterfall/nature",
        "castle": "towers*/nature gardens*/nature",
        "street market": "cheese/taste stalls*/place",
    },
}

# Where or when, so that prompts are many: appended to the item in some prompts.
QUALIFIERS: dict[str, tuple[str, ...]] = {
    "eating": ("by the river", "near the station", "in the old town", "on the corner", "at the harbour"),
    "lodging": ("by the lake", "near the airport", "in the hills", "at the beach", "in the old town"),
    "films": ("from last night", "on television", "at the festival", "from last summer"),
    "books": ("from the library", "on my shelf", "from last summer", "in the window"),
    "devices": ("from the sale", "on your desk", "from the catalogue", "for beginners"),
    "outings": ("in the city", "near the coast", "from last weekend", "for families"),
}

PROMPTS: tuple[str, ...] = (
    "Write a short review of the {item}.",
    "What did you think of the {item}?",
    "How was the {item}?",
    "Tell me about the {item}.",
    "Would you recommend the {item}?",
    "Review the {item} in a few words.",
    "Is the {item} any good?",
    "Share your opinion of the {item}.",
)

DEGREES: dict[str, float] = {
    "very": 1.3,
    "really": 1.25,
    "so": 1.25,
    "extremely": 1.5,
    "incredibly": 1.45,
    "quite": 0.95,
    "rather": 0.85,
    "fairly": 0.8,
    "pretty": 0.9,
    "a bit": 0.55,
    "slightly": 0.5,
}
NEGATIONS: dict[str, float] = {"not": -0.6, "never": -0.7, "hardly": -0.5, "anything but": -0.9}
# Values of the same lexicon.
VERBS: dict[str, float] = {
    "loved": 2.9,
    "liked": 1.8,
    "enjoyed": 2.3,
    "adored": 1.8,
    "hated": -3.2,
    "disliked": -1.7,
    "regretted": -1.6,
}
# Sentence openers that announce the tone of what follows.
TONES: dict[str, float] = {"luckily": 0.4, "happily": 0.4, "sadly": -0.4, "unfortunately": -0.4, "honestly": 0.0}

# Whole clauses with a value of their own, tied to a domain.
EVENTS: dict[str, dict[str, float]] = {
    "eating": {
        "the waiter gave us a free dessert": 2.2,
        "they remembered my birthday": 2.0,
        "our table was ready at once": 1.5,
        "we laughed all evening": 2.0,
        "my plate was empty in a minute": 1.6,
        "the chef came out to greet us": 1.6,
        "we waited an hour for a table": -1.6,
        "there was a hair in my food": -2.4,
        "the waiter ignored us": -1.9,
        "they lost our order": -1.9,
        "I felt sick all night": -2.5,
        "the bill was wrong": -1.5,
    },
    "lodging": {
        "they gave us a better room for free": 2.3,
        "I slept like a baby": 2.0,
        "the owner baked us a cake": 2.1,
        "we woke up to birds singing": 1.7,
        "they let us check out late": 1.4,
        "there were flowers on the table": 1.6,
        "there were bugs in the bed": -2.6,
        "the heating failed": -2.0,
        "somebody shouted all night": -1.9,
        "they lost our booking": -1.9,
        "the toilet was blocked": -2.0,
        "our bags were stolen": -2.6,
    },
    "films": {
        "the whole room cheered": 2.2,
        "I laughed until it hurt": 2.2,
        "I watched it twice": 1.8,
        "it won every prize": 2.1,
        "nobody looked at a phone": 1.4,
        "we talked about it for days": 1.6,
        "I fell asleep": -1.7,
        "half of the room walked out": -2.3,
        "I wanted to leave": -1.9,
        "nobody laughed": -1.6,
        "I looked at my watch twice": -1.3,
        "it ruined my evening": -2.3,
    },
    "books": {
        "I read it in one night": 2.0,
        "I could not put it down": 2.1,
        "it made me smile for days": 2.0,
        "I gave it to all my friends": 1.9,
        "it won my heart": 2.3,
        "I read the last page twice": 1.5,
        "I gave up after ten pages": -2.0,
        "it put me to sleep": -1.8,
        "I threw it away": -2.4,
        "pages were missing": -1.8,
        "half of it is copied": -2.1,
        "it was a chore to finish": -1.7,
    },
    "devices": {
        "it saved my week": 2.0,
        "it worked at once": 1.7,
        "I use it every day with joy": 2.1,
        "it survived a bad fall": 1.4,
        "my whole family wants one": 1.9,
        "it came with a free gift": 1.9,
        "it died after a week": -2.4,
        "it caught fire": -3.0,
        "I sent it back": -1.8,
        "it arrived broken": -2.2,
        "it froze every day": -1.9,
        "nobody answered my calls": -1.7,
    },
    "outings": {
        "the children smiled all day": 2.1,
        "we saw a perfect sunset": 2.2,
        "we danced until midnight": 2.0,
        "the guide sang for us": 1.6,
        "we got in for free": 1.8,
        "every minute was a joy": 2.5,
        "we got lost": -1.4,
        "it rained all day": -1.3,
        "my son cried": -1.7,
        "half of it was closed": -1.8,
        "my bag was stolen": -2.5,
        "we waited two hours in line": -1.8,
    },
}

# Closing remarks that fit every domain.
CLOSINGS: dict[str, float] = {
    "highly recommended": 2.2,
    "worth every penny": 2.0,
    "five stars": 2.5,
    "I would do it again": 1.9,
    "you should try it": 1.5,
    "it made my day": 2.0,
    "my friends loved it too": 2.1,
    "I have no complaints": 1.2,
    "a real treasure": 2.0,
    "it was better than I had hoped": 1.7,
    "never again": -2.3,
    "I want my money back": -2.2,
    "avoid it": -2.0,
    "one star": -2.3,
    "a waste of money": -2.2,
    "I regret it": -1.8,
    "save your money": -1.7,
    "a complete disaster": -2.8,
    "I expected more": -1.2,
    "it was worse than I had feared": -1.8,
    "it was what I expected": 0.2,
    "I may try it once more": 0.4,
    "I have no strong opinion": 0.0,
}
