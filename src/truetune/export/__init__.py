"""Other forms of a trained model."""

from truetune.export.merged import Exported, write_merged

__all__ = ["Exported", "write_merged"]
