"""What a run leaves behind to be looked at: curves, pictures and texts in files and trackers, and one page of them."""

from .callback import ReportCallback
from .page import write_report


__all__ = ["ReportCallback", "write_report"]
