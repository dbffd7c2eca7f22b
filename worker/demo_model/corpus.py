"""Writes the conversations that the demo model learns from. All of it is ours: no foreign text.

`conversation(rng)` gives OpenAI-style messages: perhaps a system message, then one to three turns.
Words and sentences lie in corpus.json. Equal seeds give equal text, and the order of the draws is
part of the corpus: change it, and a model trained again is another model.

    python -m worker.demo_model.corpus     prints a dozen conversations
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from worker.demo_model.story import ANIMALS, WORDS, an, capital, poem, story

Message = dict[str, str]
Turn = tuple[str, str]

TALK: dict[str, list[str]] = WORDS["talk"]
NAMES: list[str] = WORDS["names"]
CAPITALS: dict[str, str] = WORDS["capitals"]
DEFINITIONS: dict[str, str] = WORDS["definitions"]
OPPOSITES: dict[str, str] = WORDS["opposites"] | {b: a for a, b in WORDS["opposites"].items()}
LISTS: dict[str, list[str]] = WORDS["lists"] | {"colors": WORDS["lists"]["colours"]}
GREETING_SUGGESTIONS: list[str] = WORDS["suggestions"][:4]


def conversation(rng: Random) -> list[Message]:
    """One conversation, ending with an answer."""
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(WORDS["system_messages"])})
    turns = rng.choices([1, 2, 3], [6, 3, 1])[0]
    name = None
    for number in range(turns):
        if name and rng.random() < 0.5:
            question = rng.choice(TALK["my_name"])
            answer = rng.choice(TALK["my_name_answers"]).format(name=name)
        elif number == 0 and turns > 1 and rng.random() < 0.3:
            question, answer = _name(rng)
            name = next(known for known in NAMES if re.search(rf"\b{known}\b", question))
        else:
            kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
            question, answer = KINDS[kind][1](rng)
            question = _as_people_type(rng, question)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _as_people_type(rng: Random, question: str) -> str:
    if rng.random() < 0.25:
        question = question.lower()
    if rng.random() < 0.25:
        question = question.rstrip(".?!")
    if rng.random() < 0.08:
        question = rng.choice(TALK["polite_before"]) + question
    if rng.random() < 0.05:
        question += rng.choice(TALK["polite_after"])
    return question


# --- stories and poems --------------------------------------------------------------------------


def _story(rng: Random) -> Turn:
    hero = rng.choice(ANIMALS)
    thing = _perhaps(rng, "things")
    place = _perhaps(rng, "places")
    long = rng.random() < 0.2
    adjective = _perhaps(rng, "adjectives")
    what = an(f"{adjective} {hero}" if adjective else hero)
    short = ["", ""] if long else [rng.choice(["", "short "]) for _ in range(2)]
    question = rng.choice(TALK["story"]).format(
        long="long " if long else "", also_long=" long" if long else "", short=short, what=what
    )
    if thing:
        question += f" and {an(thing)}"
    if place:
        question += rng.choice([f" in the {place}", f" near the {place}"])
    question += rng.choice([".", ".", "?" if question.startswith("Can") else "."])
    return question, story(rng, hero, thing, place, adjective, long=long)


def _perhaps(rng: Random, what: str) -> str | None:
    """One of the words, in a third of all cases."""
    return rng.choice([None, None, rng.choice(WORDS[what])])


def _any_story(rng: Random) -> Turn:
    long = rng.random() < 0.4
    return rng.choice(TALK["long_story" if long else "any_story"]), story(rng, long=long)


def _poem(rng: Random) -> Turn:
    subject = rng.choice(list(WORDS["poems"]))
    question = rng.choice(TALK["poem"]).format(it=subject, an_it=an(subject))
    return question, poem(rng, subject)


def _sentence(rng: Random) -> Turn:
    animal = rng.choice(ANIMALS)
    place = rng.choice(WORDS["places"])
    thing = rng.choice(WORDS["things"])
    question = rng.choice(TALK["sentence"]).format(it=animal, an_it=an(animal))
    adjectives = [rng.choice(WORDS["adjectives"]) for _ in range(2)]
    name = rng.choice(NAMES)
    answer = rng.choice(TALK["sentence_answers"]).format(
        it=animal,
        An_it=capital(an(animal)),
        place=place,
        a_thing=an(thing),
        adjectives=adjectives,
        a_second_adjective=an(adjectives[1]),
        name=name,
    )
    return question, answer


def _letter(rng: Random) -> Turn:
    to, sender = rng.sample(NAMES, 2)
    facts = {"thing": rng.choice(WORDS["things"]), "place": rng.choice(WORDS["places"])}
    question = rng.choice(TALK["letter"]).format(to=to, sender=sender)
    parts = ("letter_reasons", "letter_wishes", "letter_ends")
    text = " ".join(rng.choice(TALK[part]).format(**facts) for part in parts)
    return question, f"Dear {to},\n{text}\nYour friend,\n{sender}"


# --- small facts --------------------------------------------------------------------------------


def _capital(rng: Random) -> Turn:
    country = rng.choice(list(CAPITALS))
    facts = {"country": country, "city": CAPITALS[country]}
    if rng.random() < 0.2:
        question = rng.choice(TALK["city"]).format(**facts)
        if rng.random() < 0.5:
            return question, f"{facts['city']} is in {country}. It is the capital of {country}."
        return question, f"{facts['city']} is the capital of {country}."
    question = rng.choice(TALK["capital"]).format(**facts)
    return question, rng.choice(TALK["capital_answers"]).format(**facts)


def _sum(rng: Random) -> Turn:
    kind = rng.random()
    if kind < 0.5:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        word, sign, result = "plus", "+", a + b
    elif kind < 0.75:
        a = rng.randint(1, 20)
        b = rng.randint(0, min(a, 12))
        word, sign, result = "minus", "-", a - b
    else:
        a, b = rng.randint(1, 10), rng.randint(1, 10)
        word, sign, result = "times", "*", a * b
    written = rng.choice([f"{a} {word} {b}", f"{a} {sign} {b}"])
    return rng.choice(TALK["sum"]).format(sum=written), f"{a} {word} {b} is {result}."


def _compare(rng: Random) -> Turn:
    a, b = rng.sample(range(21), 2)
    question = rng.choice(TALK["compare"]).format(a=a, b=b)
    return question, f"{max(a, b)} is bigger than {min(a, b)}."


def _count(rng: Random) -> Turn:
    first = rng.randint(1, 5)
    last = rng.randint(first + 2, first + 8)
    question = rng.choice(TALK["count"]).format(first=first, last=last)
    return question, ", ".join(map(str, range(first, last + 1))) + "."


def _opposite(rng: Random) -> Turn:
    word = rng.choice(list(OPPOSITES))
    question = rng.choice(TALK["opposite"]).format(word=word)
    answer = f"The opposite of {word} is {OPPOSITES[word]}."
    return question, rng.choice([answer, answer])


def _list(rng: Random) -> Turn:
    kind = rng.choice(list(LISTS))
    count = rng.randint(2, 5)
    things = rng.sample(LISTS[kind], count)
    in_words = WORDS["number_words"][count]
    asked = rng.choice([in_words, str(count)])
    question = rng.choice(TALK["list"]).format(count=asked, kind=kind)
    in_a_row = f"Here are {in_words} {kind}: {', '.join(things[:-1])} and {things[-1]}."
    in_lines = "\n".join(f"{n}. {capital(thing)}" for n, thing in enumerate(things, 1))
    return question, rng.choice([in_a_row, in_lines])


def _sound(rng: Random) -> Turn:
    animal = rng.choice(list(WORDS["sounds"]))
    question = rng.choice(TALK["sound"]).format(an_it=an(animal))
    return question, f"{capital(an(animal))} says {WORDS['sounds'][animal]}."


def _colour(rng: Random) -> Turn:
    thing = rng.choice(list(WORDS["colours"]))
    question = rng.choice(TALK["colour"]).format(it=thing)
    return question, f"{capital(thing)} is {WORDS['colours'][thing]}."


def _yes_or_no(rng: Random) -> Turn:
    colours: dict[str, str] = WORDS["colours"]
    thing = rng.choice(list(colours))
    asked = rng.choice([colours[thing], rng.choice(list(colours.values()))])
    word = "Yes" if asked == colours[thing] else "No"
    return f"Is {thing} {asked}?", f"{word}, {thing} is {colours[thing]}."


def _definition(rng: Random) -> Turn:
    thing = rng.choice(list(DEFINITIONS))
    question = rng.choice(TALK["definition"]).format(it=thing, last_word=thing.split()[-1])
    answer = f"{capital(thing)} is {DEFINITIONS[thing]}."
    if rng.random() < 0.35:
        answer += " " + rng.choice(WORDS["definition_extras"])
    return question, answer


# --- small talk ---------------------------------------------------------------------------------


def _feeling(rng: Random) -> Turn:
    feeling = rng.choice(list(WORDS["comfort"]))
    question = rng.choice(TALK["feeling"]).format(it=feeling)
    count = rng.choice([1, 2])
    return question, " ".join(rng.sample(WORDS["comfort"][feeling], count))


def _who(rng: Random) -> Turn:
    question = rng.choice(TALK["who"])
    answer = rng.choice(WORDS["self_descriptions"])
    if rng.random() < 0.6:
        answer += " " + rng.choice(GREETING_SUGGESTIONS)
    return question, answer


def _hello(rng: Random) -> Turn:
    question = rng.choice(TALK["hello"])
    suggestion = rng.choice(GREETING_SUGGESTIONS)
    return question, rng.choice(TALK["hello_answers"]).format(suggestion=suggestion)


def _unknown(rng: Random) -> Turn:
    asked: str = rng.choice(WORDS["unknown_questions"])
    question = asked.format(x=rng.choice(WORDS["unknown_topics"]))
    return question, f"{rng.choice(TALK['unknown_answers'])} {rng.choice(WORDS['suggestions'])}"


def _name(rng: Random) -> Turn:
    name = rng.choice(NAMES)
    question = rng.choice(TALK["name"]).format(name=name)
    return question, rng.choice(TALK["name_answers"]).format(name=name)


def _repeat(rng: Random) -> Turn:
    options = [rng.choice(NAMES), rng.choice(ANIMALS), f"the {rng.choice(WORDS['places'])}"]
    options += [rng.choice(WORDS["things"]), " ".join(rng.sample(WORDS["adjectives"], 2))]
    options.append(f"I like the {rng.choice(WORDS['places'])}")
    options.append(f"the {rng.choice(WORDS['adjectives'])} {rng.choice(ANIMALS)}")
    said = rng.choice(options)
    return rng.choice(TALK["repeat"]).format(it=said), f"{capital(said)}."


def _fixed(kind: str) -> Callable[[Random], Turn]:
    """A kind of turn whose questions and answers are all written out."""
    return lambda rng: (rng.choice(TALK[kind]), rng.choice(TALK[f"{kind}_answers"]))


# How often each kind comes, and what writes it.
KINDS: dict[str, tuple[int, Callable[[Random], Turn]]] = {
    "story": (17, _story),
    "any story": (5, _any_story),
    "poem": (5, _poem),
    "capital": (11, _capital),
    "sum": (12, _sum),
    "opposite": (7, _opposite),
    "list": (6, _list),
    "sound": (3, _sound),
    "colour": (3, _colour),
    "definition": (10, _definition),
    "count": (4, _count),
    "feeling": (5, _feeling),
    "who": (4, _who),
    "hello": (5, _hello),
    "unknown": (9, _unknown),
    "thanks": (2, _fixed("thanks")),
    "repeat": (3, _repeat),
    "name": (3, _name),
    "joke": (3, _fixed("joke")),
    "bye": (1, _fixed("bye")),
    "can": (2, _fixed("can")),
    "sentence": (4, _sentence),
    "yes or no": (4, _yes_or_no),
    "compare": (4, _compare),
    "letter": (3, _letter),
}


if __name__ == "__main__":
    printing = Random(0)
    for _ in range(12):
        for message in conversation(printing):
            print(f"[{message['role']}] {message['content']}")
        print("--")
