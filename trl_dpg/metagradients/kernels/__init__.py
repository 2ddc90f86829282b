"""Shortcuts that change what a run costs, and never what it computes."""

from .chunked_head import ChunkedHead
from .switches import building_graph, switched


__all__ = ["ChunkedHead", "building_graph", "switched"]
