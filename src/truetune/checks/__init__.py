"""What can be known to go wrong before the compute is spent.

A check is a function with `@check` in a module of a room; it takes facts and yields findings, and
nothing lists it (`registry.py`). Judged is the effect on ids, labels and stop ids, never a setting.

    labels/          rows of ids and labels, whoever made them: facts.py table.py judge.py
    conversations/   rows as they were read: rows.py
    coming_run/      the numbers of a run, and the tables of its model
    saved_model/     a finished model or adapter, from any tool: checkpoint.py
    lengths.py fit.py                           what a length limit costs; whether a run fits
    preflight.py                                the first three rooms on a coming run
"""
