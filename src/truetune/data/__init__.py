"""The data room: from files to conversations.

Input:  files, folders, Hub datasets.
Does:   sources.py finds files -> read*.py, hub.py make rows with file and line -> columns.py
        renames -> schemas.py recognises -> convert.py (messages.py, tools.py) makes conversations
        -> split.py holds some out. load.py is that way in one function.
Output: `Loaded`, `Conversation`.
Who:    the pipeline calls it; contract and check read the conversations. Importing it imports
        neither torch nor pyarrow nor datasets.
"""
