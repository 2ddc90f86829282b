"""Reports of a run: curves, pictures and texts in files and trackers, and an HTML page of them."""

from .callback import ReportCallback
from .page import write_report


__all__ = ["ReportCallback", "write_report"]
