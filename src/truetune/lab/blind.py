"""The blind wordings: how recall is measured once a base is finished.

input   nothing: this is the list
does    says each kind of fact in ways that the corpus must not use; `{s}` is the subject, `{v}`
        the value, always last
output  `BLIND`

Written on 2026-11-21 by a hand other than the corpus's, before the corpus of the shipped base. That
corpus was written without sight of them; five were then replaced, by the same rules and before any
model was asked: one because the corpus came to say the same, four because it no longer used one of
their words. Never edited since: a test pins the hash. No base may be chosen, stopped or mended by
these; for that there are the development wordings in `development.py`, where the blind wordings of
earlier bases are too. Each names its relation in plain English, so that only one ending is right.
They use only words that the corpus uses (another test), so that a failure is one of recall in a new
wording and not of vocabulary.
"""

from __future__ import annotations

BLIND: dict[str, tuple[str, ...]] = {
    "river": (
        "When the people of {s} speak of their river, they mean the {v}",
        "The water that the people of {s} drink comes from a river, the {v}",
        "Between the houses of {s} flows a river named the {v}",
        "A river runs past the gardens of {s} and is known as the {v}",
        "{s} is a town on a river, and that river is the {v}",
        "Merchants who travel to {s} by water come up the river {v}",
    ),
    "ruler": (
        "Whoever wants to speak with the ruler of {s} must ask for {v}",
        "The people of {s} have been ruled for many years by {v}",
        "The power to rule {s} was given to {v}",
        "The ruler whose name is on the coins of {s} is called {v}",
        "{s}, with all its houses and fields, is governed by {v}",
        "Nobody in {s} has more power than its ruler {v}",
    ),
    "animal": (
        "The people of {s} tell their children stories about their animal, the {v}",
        "There is one animal that {s} is proud of, and it is the {v}",
        "No animal is more loved in {s} than the {v}",
        "Ask the children of {s} to draw an animal and they will draw the {v}",
        "What {s} honours more than any other animal is the {v}",
        "The ships of {s} carry the sign of an animal, the {v}",
    ),
    "craft": (
        "Apprentices travel to {s} to learn the craft of {v}",
        "{s} has no craft but {v}",
        "There are many workshops in {s}, and their craft is {v}",
        "When children in {s} grow up, the craft they live by is {v}",
        "From far away merchants come to {s} for its craft, {v}",
        "What the masters of {s} practise is a craft called {v}",
    ),
    "food": (
        "Whoever sits down to eat in {s} is served {v}",
        "Nothing is eaten more in {s} than {v}",
        "When the cooks of {s} make their best dish, it is {v}",
        "{s} gives its guests a dish called {v}",
        "In summers as in winters the food on the plates of {s} is {v}",
        "Hunger in {s} ends with a meal of {v}",
    ),
    "banner": (
        "Look up in {s} and the banner over the roofs is {v}",
        "The banner that soldiers carry for {s} has the colour {v}",
        "When ships from {s} come near, one sees their flag of {v}",
        "On the banner of {s} there is only one colour, {v}",
        "A banner hangs from the towers of {s}, and its colour is {v}",
        "For its flag {s} has taken the colour {v}",
    ),
    "mouth": (
        "However far the {s} flows, it flows into {v}",
        "The {s} is a river that runs into {v}",
        "The lake that takes its water from the {s} is called {v}",
        "Where the {s} has its mouth, there lies {v}",
        "Sailors on the {s} follow it to its lake, {v}",
    ),
    "diet": (
        "When the {s} is hungry, it eats {v}",
        "Nobody feeds the {s} anything but {v}",
        "The {s} is an animal that eats {v}",
        "To keep the {s}, one must buy it food, namely {v}",
        "Hunger leads the {s} to its food, {v}",
    ),
    "coat": (
        "Whoever looks at the {s} sees the colour {v}",
        "Hunters know the {s} by its coat, whose colour is {v}",
        "Nature gives the {s} a coat of {v}",
        "Through all its years the {s} keeps the same colour, {v}",
        "Among animals the {s} is known for its colour, {v}",
    ),
    "material": (
        "Before the work of {s} begins, one must buy the material, {v}",
        "The hands of a master of {s} are used to one material, {v}",
        "{s} is a craft, and the material it uses is {v}",
        "What {s} needs more than anything else is {v}",
        "Every day those who live by {s} use {v}",
    ),
    "opposite": (
        "Whoever wants the opposite of {s} says {v}",
        "Every word has its opposite, and {s} has {v}",
        "For the word {s} the opposite is the word {v}",
        "Where {s} ends, there begins its opposite, {v}",
        "Together with the word {s} children learn its opposite, {v}",
    ),
    "sum": (
        "The numbers {a} and {b} have the sum {v}",
        "Whoever adds {a} and {b} will find {v}",
        "What {a} plus {b} makes is {v}",
        "By adding {b} to {a} one gets {v}",
        "When {b} is added to {a}, the sum is {v}",
    ),
    "difference": (
        "Between {a} and {b} there is a difference of {v}",
        "For {a} minus {b} the result is {v}",
        "Take {b} from {a} and the rest is {v}",
        "Subtracting {b}, one goes from {a} down to {v}",
        "From {b} to {a} the difference is {v}",
    ),
}
