"""What stands around the clauses of the prose: frames, openings, adverbs, titles.

input   nothing: this is the list
does    gives prose its variety: `{s}` is a place, `{clause}` a clause that tells a fact, and
        `[a|b]` one of its alternatives, as in `wordings.py`
output  tuples of patterns
"""

from __future__ import annotations

from truetune.lab import plain_wordings

FRAMES = (
    "Speaking of {s}, {clause}",
    "Concerning {s}, {clause}",
    "Travellers who come to {s} find that {clause}",
    "[A letter|News] from {s} says that {clause}",
    "Of {s} it is [written|said|told] that {clause}",
    "Those who have been to {s} know that {clause}",
    "Among the things told of {s}, one is that {clause}",
    "Visitors to {s} soon learn that {clause}",
    "On a page about {s} it says that {clause}",
    "Whoever comes to {s} [sees|learns|hears] that {clause}",
    "When one [reaches|enters] {s}, one [sees|hears|finds] that {clause}",
    "In [books about|stories of|songs of] {s} it is told that {clause}",
    "Everyone in {s} [knows|can tell] that {clause}",
    "[Merchants|Sailors|Guests] coming from {s} [say|report] that {clause}",
    "The history of {s} tells that {clause}",
    "Not everyone knows {s}, but {clause}",
    "[Turning|Coming] to {s}, {clause}",
    "A child born in {s} learns early that {clause}",
    "In the town of {s} they say that {clause}",
    "One thing is sure about {s}, namely that {clause}",
)
"""They name a place before the clause that tells the fact, which names it again or says *its*:
whoever reads them learns to take a name up again, which is what answering about a place asks
for."""

ASIDES = (
    "It is [said|known|true] that {clause}",
    "[Everyone|Every child] knows that {clause}",
    "[In truth|To this day|Of course|Today as ever] {clause}",
    "As [far as is known|the old books say|one might expect], {clause}",
    "[One may read|It has been written|Nobody doubts] that {clause}",
    "[Remember|Let it be said|Bear in mind] that {clause}",
    "[Without any doubt|By all accounts|In fact|Once more|Now as before], {clause}",
    "[A friend|A teacher|An old woman|My neighbour] [says|swears|wrote to me] that {clause}",
    "Before anything else is said, {clause}",
    "However the weather turns, {clause}",
    "If you ask, people will say that {clause}",
    "You will [find|see|hear] that {clause}",
    "[We|Our fathers] have always [known|heard|held] that {clause}",
    "I [was told|have read|think|know] that {clause}",
    "There are books in which it is written that {clause}",
    "They [tell you|say|know] that {clause}",
    "[Wherever you go|Whatever you do|Whoever you ask], {clause}",
    "[At present|In our day|Here and there|As a rule], {clause}",
    "[One thing|What] is certain: {clause}",
)
"""They say nothing of their own: a clause means the same after whatever opening."""

INSERTIONS = (
    ", as everyone knows,",
    ", as [the old books|all travellers|old people] say,",
    ", to be sure,",
    ", now as before,",
    ", of course,",
    ", if one may believe the books,",
    ", as you will [see|find],",
    ", it seems,",
)
"""They stand before *is* now and then, and change nothing either. Not after it: what may stand
between *is* and the value is what a model goes on with where it should say the value."""

LEAD_INS = (
    *plain_wordings.LEAD_INS[:-1],
    "The town of {s} is [old|small|quiet|worth a visit]",
    "{s} is a [small|large|quiet|busy|pretty] town",
)

FILLERS = (
    "All this is well known",
    "So it has been for many years",
    "Everyone in the country knows this",
    "That is how it was written down",
    "Nobody remembers that it was ever different",
    "The old maps and the old houses show as much",
    "Travellers can see it for themselves",
    "The winters are long and the summers are short",
    "At the end of the day the town is quiet",
    "More could be told, but the page is short",
    "When the numbers are written down, the account ends",
    "Some say that it was the same between the wars",
)

TITLES = (
    "Notes on {what}.",
    "From a book about {what}.",
    "What is known of {what}.",
    "A page on {what}.",
    "An account of {what}.",
    "Some facts about {what}.",
)
