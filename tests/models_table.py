"""docs/models.md, written from what one tiny model of every family does: `python tests/models_table.py`."""
from pathlib import Path
DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
def render() -> str:
    return ""
