"""Folders of real files: read, cut into passages, and kept in step with a store."""

from __future__ import annotations

from qwen_rerank.folders.reading import read_files
from qwen_rerank.folders.records import FolderSettings
from qwen_rerank.folders.sync import FileReport, Progress, SyncReport, forget_folder, sync_folder

__all__ = ["FileReport", "FolderSettings", "Progress", "SyncReport", "forget_folder", "read_files", "sync_folder"]
