"""Find what would go wrong before the compute is spent.

A check is a function with `@check` in a module of a room; it takes facts and yields findings, and
nothing lists it (`registry.py`). Checks judge the effect on ids, labels and stop tokens, never a
setting.

    labels/          rows of ids and labels, from any tool: facts.py table.py judge.py
    conversations/   rows as they were read: rows.py
    coming_run/      the settings of a run, and the embeddings of its model
    saved_model/     a finished model or adapter, from any tool: checkpoint.py
    lengths.py fit.py                           what a length limit costs; whether a run fits
    preflight.py                                the first three rooms for a planned run
"""
