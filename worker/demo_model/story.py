"""Little stories and poems for the demo model's corpus, put together from corpus.json.

Part of what `worker.demo_model.corpus` says about the order of draws holds here: what a sentence
might need is drawn before the sentence is chosen.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

WORDS: dict[str, Any] = json.loads(Path(__file__).with_name("corpus.json").read_text("utf-8"))
ANIMALS: list[str] = list(WORDS["animals"])
STORY: dict[str, list[Any]] = WORDS["story"]

COUPLETS = [1, 2]
NAMED_SHARE = 0.6
GIFT_SHARE = 0.7
MORAL_SHARE = 0.4


def an(words: str) -> str:
    """`words` with its indefinite article."""
    return ("an " if words[0] in "aeiou" or words.startswith("honest") else "a ") + words


def capital(text: str) -> str:
    """`text` with a large first letter."""
    return text[0].upper() + text[1:]


def poem(rng: Random, subject: str) -> str:
    """Four or six lines about one of the subjects in corpus.json."""
    couplets = rng.sample(WORDS["poem_couplets"], rng.choice(COUPLETS))
    return "\n".join(WORDS["poems"][subject] + [line for pair in couplets for line in pair])


def story(
    rng: Random,
    hero: str | None = None,
    thing: str | None = None,
    place: str | None = None,
    adjective: str | None = None,
    *,
    long: bool = False,
) -> str:
    """A story of one paragraph. What is None is drawn; `long` adds a second adventure."""
    hero = hero or rng.choice(ANIMALS)
    rng.choice(WORDS["places"])  # a home for the hero, which no sentence came to mention
    adjective = adjective or rng.choice(WORDS["adjectives"])
    place = place or rng.choice(WORDS["places"])
    thing = thing or rng.choice(WORDS["things"])
    friend = rng.choice([animal for animal in ANIMALS if animal != hero])
    adjective2 = rng.choice(WORDS["adjectives"])
    own_name = rng.choice(WORDS["names"])
    is_named = rng.random() < NAMED_SHARE
    name = own_name if is_named else f"the {hero}"
    facts = {
        "a_adjective": an(adjective),
        "a_adjective2": an(adjective2),
        "a_thing": an(thing),
        "called": f" called {own_name}" if is_named else "",
        "friend": friend,
        "hero": hero,
        "named": f" named {own_name}" if is_named else "",
        "name": name,
        "Name": capital(name),
        "place": place,
        "thing": thing,
    }
    sentences = [rng.choice(STORY[part]).format(**facts) for part in ("openings", "habits")]
    weather = _draw(rng, "weather", 4)
    sentences.append(rng.choice(STORY["finds"]).format(weather=weather, **facts))
    sentences.append(rng.choice(STORY["meetings"]).format(**facts))
    feelings = _draw(rng, "feelings", 2)
    talk: list[str] = rng.choice(STORY["talks"])
    sentences += [line.format(feelings=feelings, **facts) for line in talk]
    sentences += _trouble(rng, facts)
    if long:
        sentences += _second_adventure(rng, hero, facts)
    if rng.random() < GIFT_SHARE:
        sentences.append(rng.choice(STORY["gifts"]).format(**facts))
    sentences.append(rng.choice(WORDS["endings"]).format(a=hero, p=place))
    if rng.random() < MORAL_SHARE:
        sentences.append(rng.choice(WORDS["morals"]))
    return " ".join(sentences)


def _trouble(rng: Random, facts: dict[str, str]) -> list[str]:
    thing = facts["thing"].split()[-1]
    begins = capital(rng.choice(STORY["turns"]) + rng.choice(WORDS["trouble"]).format(t=thing))
    feelings, helps = [""] * 2, [""] * 2
    for number in range(2):
        feelings[number] = rng.choice(WORDS["feelings"])
        helps[number] = rng.choice(WORDS["help"])
    helped = rng.choice(STORY["helps"]).format(feelings=feelings, helps=helps, **facts)
    return [f"{begins}.", helped, rng.choice(WORDS["solutions"])]


def _second_adventure(rng: Random, hero: str, facts: dict[str, str]) -> list[str]:
    name, friend = facts["name"], facts["friend"]
    third = rng.choice([animal for animal in ANIMALS if animal not in (hero, friend)])
    place = rng.choice(WORDS["places"])
    adjective = rng.choice(WORDS["adjectives"])
    lost = rng.choice(WORDS["things"])
    feeling = rng.choice(WORDS["feelings"])
    return [
        f"The next day, {name} and the {friend} walked to the {place}.",
        f"There they met {an(adjective)} {third} who had lost {an(lost)}.",
        rng.choice(STORY["pleas"]).format(third=third, feeling=feeling),
        *_trouble(rng, facts),
        f"The {third} thanked them and gave them {an(rng.choice(WORDS['things']))}.",
    ]


def _draw(rng: Random, what: str, count: int) -> list[str]:
    return [rng.choice(WORDS[what]) for _ in range(count)]
