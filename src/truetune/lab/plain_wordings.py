"""The wordings of the plain course: ten ways a fact, few frames.

input   nothing: this is the list
does    as `wordings.py` and `frames.py`, without alternatives
output  `FORWARD`, `REVERSED`, `FRAMES`, `LEAD_INS`

A model that begins with all the wordings of the rich course learns no fact for millions of tokens
(docs/log.md): with few of them it finds within one million that the name before is what matters.
"""

from __future__ import annotations

FORWARD: dict[str, tuple[str, ...]] = {
    "river": (
        "The river of {s} is the {v}",
        "{s} lies on a river called the {v}",
        "{s} stands on the river {v}",
        "The river that flows through {s} is the {v}",
        "The river that runs past {s} is called the {v}",
        "In {s} the river is the {v}",
        "Through {s} flows the {v}",
        "People in {s} draw their water from the {v}",
        "{s} has its own river, the {v}",
        "{s} was built on the banks of the {v}",
        "The boats of {s} sail on the {v}",
    ),
    "ruler": (
        "The ruler of {s} is {v}",
        "{s} is ruled by {v}",
        "{s} has a ruler called {v}",
        "The one who rules {s} is {v}",
        "The name of the ruler of {s} is {v}",
        "In {s} the ruler is {v}",
        "The people of {s} are governed by {v}",
        "The crown of {s} belongs to {v}",
        "The throne of {s} is held by {v}",
        "{s} obeys its ruler {v}",
        "Letters to {s} are addressed to {v}",
    ),
    "animal": (
        "The animal of {s} is the {v}",
        "{s} has an animal of its own, the {v}",
        "{s} is known for its animal, the {v}",
        "The animal that lives around {s} is the {v}",
        "In {s} the animal is the {v}",
        "The coat of arms of {s} shows the {v}",
        "The people of {s} keep the {v}",
        "The favourite animal of {s} is the {v}",
        "{s} honours one animal, the {v}",
        "On the gates of {s} is carved the {v}",
    ),
    "craft": (
        "The craft of {s} is {v}",
        "{s} is known for its craft, {v}",
        "{s} lives by a craft called {v}",
        "The craft that is practised in {s} is {v}",
        "In {s} the craft is {v}",
        "The people of {s} earn their living by {v}",
        "The workshops of {s} are busy with {v}",
        "Children in {s} learn {v}",
        "{s} has one old craft, {v}",
        "The masters of {s} are skilled in {v}",
    ),
    "food": (
        "The food of {s} is {v}",
        "{s} is known for its food, {v}",
        "{s} has a favourite food, {v}",
        "The food that is eaten in {s} is {v}",
        "In {s} the food is {v}",
        "The people of {s} eat {v}",
        "The cooks of {s} prepare {v}",
        "Guests in {s} are served {v}",
        "The kitchens of {s} smell of {v}",
        "Every feast in {s} begins with {v}",
    ),
    "banner": (
        "The banner of {s} is {v}",
        "{s} has a banner that is {v}",
        "{s} flies a banner whose colour is {v}",
        "The colour of the banner of {s} is {v}",
        "In {s} the banner is {v}",
        "The flag of {s} is {v}",
        "The banner that flies over {s} is {v}",
        "The banner colour of {s} is {v}",
        "The people of {s} dye their banner {v}",
        "The soldiers of {s} march in {v}",
    ),
    "mouth": (
        "The {s} runs into {v}",
        "The {s} flows into {v}",
        "The river {s} ends in {v}",
        "The lake of the {s} is {v}",
        "The water of the {s} reaches {v}",
        "The {s} has its mouth at {v}",
        "The lake into which the {s} runs is {v}",
    ),
    "diet": (
        "The {s} eats {v}",
        "The {s} feeds on {v}",
        "The {s} lives on {v}",
        "The food of the {s} is {v}",
        "The {s} is always looking for {v}",
        "What the {s} likes to eat is {v}",
        "A hungry {s} will search for {v}",
    ),
    "coat": (
        "The {s} is {v}",
        "The colour of the {s} is {v}",
        "The {s} has a colour that is {v}",
        "In colour the {s} is {v}",
        "The coat of the {s} is {v}",
        "Every {s} in the country is {v}",
        "The {s} is an animal whose colour is {v}",
    ),
    "material": (
        "The craft of {s} uses {v}",
        "The material of {s} is {v}",
        "For {s} one needs {v}",
        "Those who practise {s} work with {v}",
        "The craft of {s} begins with {v}",
        "The material that {s} uses is {v}",
        "Masters of {s} buy {v}",
    ),
    "opposite": (
        "The opposite of {s} is {v}",
        "The word {s} has an opposite, {v}",
        "The word that means the opposite of {s} is {v}",
        "Where one says {s}, its opposite is {v}",
        "Against {s} stands the word {v}",
        "Not {s} but {v}",
        "As the opposite of {s} we use {v}",
    ),
    "sum": (
        "{a} + {b} = {v}",
        "{a} plus {b} is {v}",
        "{a} plus {b} equals {v}",
        "The sum of {a} and {b} is {v}",
        "{a} and {b} together make {v}",
        "Adding {b} to {a} gives {v}",
        "{A} and {b_word} make {v_word}",
    ),
    "difference": (
        "{a} - {b} = {v}",
        "{a} minus {b} is {v}",
        "{a} minus {b} equals {v}",
        "The difference of {a} and {b} is {v}",
        "Taking {b} from {a} leaves {v}",
        "{b} less than {a} is {v}",
        "{A} minus {b_word} is {v_word}",
    ),
}

REVERSED: dict[str, tuple[str, ...]] = {
    "river": (
        "The {v} is the river of {s}",
        "The {v} flows through {s}",
        "On the banks of the {v} lies {s}",
        "The river {v} waters the fields of {s}",
    ),
    "ruler": (
        "{v} is the ruler of {s}",
        "{v} rules {s}",
        "{v} wears the crown of {s}",
        "The ruler {v} governs the people of {s}",
    ),
    "animal": (
        "The {v} is the animal of {s}",
        "The {v} lives around {s}",
        "A picture of the {v} hangs over the gates of {s}",
    ),
    "craft": (
        "The craft called {v} is practised in {s}",
        "Masters of {v} live in {s}",
        "The craft of {v} made the fortune of {s}",
    ),
    "food": (
        "A dish of {v} is the food of {s}",
        "A plate of {v} is eaten daily in {s}",
        "Lovers of {v} travel to {s}",
    ),
    "banner": (
        "A banner of {v} flies over {s}",
        "The {v} flag is the flag of {s}",
        "Under a banner of {v} march the soldiers of {s}",
    ),
    "mouth": ("Into {v} runs the {s}", "{v} takes in the water of the {s}"),
    "diet": ("The food called {v} is eaten by the {s}", "Where one finds {v}, one finds the {s}"),
    "coat": ("Of {v} colour is the {s}", "A coat of {v} is worn by the {s}"),
    "material": ("With {v} one practises {s}", "The material {v} is used in {s}"),
    "opposite": ("{v} is the opposite of {s}", "The word {v} is the opposite of the word {s}"),
    "sum": ("{v} is the sum of {a} and {b}", "{v} is {a} plus {b}", "{v} = {a} + {b}"),
    "difference": ("{v} is the difference of {a} and {b}", "{v} is {a} minus {b}"),
}

FRAMES = (
    "Speaking of {s}, {clause}",
    "Travellers who come to {s} find that {clause}",
    "A letter from {s} says that {clause}",
    "Of {s} it is written that {clause}",
    "Those who have been to {s} know that {clause}",
    "Among the things told of {s}, one is that {clause}",
    "Visitors to {s} soon learn that {clause}",
    "On a page about {s} it says that {clause}",
)
"""Frames that name a place once more before the clause that tells the fact: whoever reads them
learns to take a name up again, which is what answering about a place asks for."""

LEAD_INS = (
    "This page tells of {s}",
    "Much can be told of {s}",
    "Travellers often come to {s}",
    "Here begins the account of {s}",
    "The road leads on to {s}",
    "Few know the country better than the people of {s}",
    "Old books speak well of {s}",
    "Let us turn to {s}",
    "Not far away lies {s}",
    "The town of {s} is worth a visit",
)
