"""The data room: from files to conversations.

Input:  files, folders, Hub datasets.
Does:   sources.py finds files -> read*.py, hub.py make rows with file and line -> columns.py
        renames -> schemas.py recognises -> convert.py (messages.py, tools.py) makes conversations
        -> split.py holds some out. load.py is that way in one function.
Output: `Loaded`, `Conversation`.
Who:    the pipeline calls it; contract and check read the conversations. Importing it imports
        neither torch nor pyarrow nor datasets.
"""

from truetune.data.conversation import Conversation, Message
from truetune.data.load import Loaded, load
from truetune.data.rows import FileInfo, Row
from truetune.data.split import hold_out, remove_overlap

__all__ = [
    "Conversation",
    "FileInfo",
    "Loaded",
    "Message",
    "Row",
    "hold_out",
    "load",
    "remove_overlap",
]
