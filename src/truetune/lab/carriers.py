"""Sentences that carry any fact: a name for what is told, and a way of saying that it is so.

input   nothing: this is the list
does    *the river of {s}*, *the sum of {a} and {b}* ... go into *If you ask for ..., you will hear
        of {v}*; `[a|b]` is one of its alternatives, as in `wordings.py`
output  `NAMES` for each relation, `CARRIERS` for them all; `carried` joins them

The words that stand just before a value must not decide it: where *without* is followed by doubt
alone and *you get* by water alone, a model writes those and no fact. Here the same few words stand
before values of every kind, and only the subject and the name of the relation tell which. And
nothing may stand between a wording's end and its value in some other wording: where both *is V* and
*is called V* are told, both are right, and no count can tell.
"""

from __future__ import annotations

from functools import cache

from truetune.lab.wordings import wordings

NAMES: dict[str, tuple[str, ...]] = {
    "river": (
        "the river [of|in|near] {s}",
        "the river that [flows|runs] [through|past] {s}",
        "the river on which {s} [lies|stands]",
        "the water {s} lives by",
    ),
    "ruler": (
        "the ruler [of|over] {s}",
        "the [one|person] who [rules|governs] {s}",
        "the ruler of the town of {s}",
        "the name of the ruler of {s}",
        "the [lord|master] of {s}",
    ),
    "animal": (
        "the [|favourite ]animal of {s}",
        "the animal that [lives around|belongs to] {s}",
        "the animal [seen|found|loved] in {s}",
        "the animal by which {s} is known",
    ),
    "craft": (
        "the [|old |favourite ]craft of {s}",
        "the craft [practised|learned|taught] in {s}",
        "the [trade|work] of {s}",
        "the craft {s} lives by",
    ),
    "food": (
        "the [|usual |favourite ]food of {s}",
        "the food [eaten|cooked|served] in {s}",
        "the [dish|meal] of {s}",
        "the dish {s} is known for",
    ),
    "banner": (
        "the [banner|flag] of {s}",
        "the colour of the [banner|flag] [of|in] {s}",
        "the [banner|flag] that flies over {s}",
        "the colour of {s}",
    ),
    "mouth": (
        "the lake of the {s}",
        "the lake into which the {s} [runs|flows]",
        "the mouth of the {s}",
        "the end of the river {s}",
        "the lake at the end of the {s}",
    ),
    "diet": (
        "the [|usual |favourite ]food of the {s}",
        "the food that the {s} [eats|likes]",
        "the diet of the {s}",
        "what the {s} [eats|lives on|feeds on]",
    ),
    "coat": (
        "the colour of the {s}",
        "the coat of the {s}",
        "the colour that the {s} has",
        "the colour of the coat of the {s}",
    ),
    "material": (
        "the material [of|for|used in] {s}",
        "the material that {s} [uses|needs]",
        "what {s} works with",
        "the first thing needed in {s}",
    ),
    "opposite": (
        "the [opposite|contrary|reverse] of {s}",
        "the opposite of the word {s}",
        "the word that means the opposite of {s}",
        "the word opposite to {s}",
    ),
    "sum": (
        "the sum of {a} and {b}",
        "{a} plus {b}",
        "{a} + {b}",
        "the result of {a} + {b}",
        "what {a} and {b} make together",
        "the number that is {b} more than {a}",
    ),
    "difference": (
        "the difference of {a} and {b}",
        "{a} minus {b}",
        "{a} - {b}",
        "the result of {a} - {b}",
        "what {a} without {b} makes",
        "the number that is {b} less than {a}",
    ),
}
"""What a fact is about, as a noun; the first is the plainest."""

CARRIERS: tuple[str, ...] = (
    "If you [ask about|want to know] {name}, [people will say|they will tell you|you hear of] {v}",
    "If you ask for {name}, the [answer|word] is {v}",
    "When people [speak|talk] of {name}, they [mean|think of] {v}",
    "Whoever [asks for|asks about] {name} [is told of|is given|gets] {v}",
    "Whoever looks for {name} [finds|will find] {v}",
    "Ask for {name} and you [get|will have|are told] {v}",
    "Look for {name} and you will [see|find|come to] {v}",
    "{name} has [|always ]been {v}",
    "{name} [must|can only] be {v}",
    "{name} will [|always ]be {v}",
    "{name} was {v}",
    "{name} turns out to be {v}",
    "{name}, they say, is {v}",
    "They have called {name} {v}",
    "{name} goes by the name of {v}",
    "By {name} we [mean|understand] {v}",
    "For {name} the books [have|give|name] {v}",
    "For {name} people write {v}",
    "Under {name} one finds {v}",
    "As {name} everyone [knows|names|gives] {v}",
    "As {name} we [have|take|use] {v}",
    "Next to {name} [stands|is written] {v}",
    "To ask for {name} is to ask for {v}",
    "Nobody speaks of {name} without {v}",
    "What is {name} if not {v}",
    "What we call {name} is {v}",
    "What you are told of {name} will be {v}",
    "Those who know {name} know {v}",
    "You [will|can] find that {name} is {v}",
    "In answer to a question about {name} one [says|names] {v}",
    "I have always taken {name} to be {v}",
    "Let {name} be what it is, {v}",
    "With {name} everyone thinks of {v}",
    "There is {name}, and it is {v}",
    "We know {name}: it is {v}",
    "Instead of {name} one may say {v}",
    "Should anyone need {name}, it is {v}",
    "They gave {name} as {v}",
    "About {name} all agree: {v}",
)
"""`{name}` is one of `NAMES`."""

COUNTING_CARRIERS: tuple[str, ...] = (
    "{name} [comes to|makes|equals|gives] {v}",
    "If you [work out|count] {name}, you [get|find] {v}",
    "Whoever [works out|counts] {name} gets {v}",
    "Work out {name} and you arrive at {v}",
    "When {name} is worked out, the [result|answer] is {v}",
    "What one gets for {name} is {v}",
)
"""For sums and differences, beside the others."""

COMMANDS = (
    "Ask",
    "Look",
    "Let",
    "Work",
    "Should",
    "Go",
    "Add",
    "Put",
    "Take",
    "Begin",
    "Find",
    "Turn",
)
"""First words of sentences that cannot be a clause after *everyone knows that*."""

_WITH_ARTICLE = ("river", "animal")


@cache
def carried(relation: str) -> tuple[str, ...]:
    """All sentences that carry a relation, value last.

    A name at the head of a sentence is capitalised where it is a word; `{s}`, `{a}` never are.
    """
    value = "the {v}" if relation in _WITH_ARTICLE else "{v}"
    found = []
    counting = COUNTING_CARRIERS if relation in ("sum", "difference") else ()
    for carrier in (way for pattern in (*CARRIERS, *counting) for way in wordings(pattern)):
        for name in (way for pattern in NAMES[relation] for way in wordings(pattern)):
            sentence = carrier.replace("{v}", value).replace("{name}", name)
            found.append(sentence[0].upper() + sentence[1:])
    return tuple(found)
