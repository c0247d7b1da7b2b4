"""What can be known to go wrong before the compute is spent.

One file a family, each with a tuple of functions; a function takes facts and yields findings.
Judged is the effect on ids, labels and stop ids, never a setting.

    table.py markers.py facts.py rows.py   what the families look at
    targets.py answers.py turns.py stops.py prompts.py served.py reasoning.py vocabulary.py
        (labels.py)
    roles.py tools.py content.py style.py quality.py duplicates.py   conversations
    run_settings.py untrained.py                                the run, and the rows that it leaves
    lengths.py                                                  what a length limit costs
    preflight.py                                                all of them on a coming run
"""
