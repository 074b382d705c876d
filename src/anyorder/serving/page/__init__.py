"""The page: one file, nothing fetched from elsewhere."""

from pathlib import Path

PAGE = Path(__file__).with_name("index.html")
