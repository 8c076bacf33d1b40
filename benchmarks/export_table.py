"""Write the measured figures of docs/export.md from benchmarks/results/, between their markers.

python benchmarks/export_table.py
"""

from __future__ import annotations

from pathlib import Path

import export
import export_greedy
from readme_tables import between, results

PAGE = Path(__file__).parent.parent / "docs" / "export.md"


def page() -> str:
    """The page with its figures."""
    text = PAGE.read_text()
    text = between(text, "greedy", export_greedy.markdown(results("export_greedy")["results"]))
    return between(text, "figures", export.markdown(results("export")["results"]))


if __name__ == "__main__":
    PAGE.write_text(page())
