"""Writes the measured figures into the model card."""

import argparse
import json
from pathlib import Path
from typing import Any

from vision_server.shapes.patch_truth import MAX_SHAPES
from vision_server.shapes.questions import KINDS, LANGUAGES

WEIGHTS = Path(__file__).parent / "weights"
BEGIN, END = "<!-- figures: written by card_tables.py -->", "<!-- end of figures -->"

DETECTOR_ROWS = (
    ("map50", "mAP50"),
    ("map50_95", "mAP50-95"),
    ("recall", "recall at confidence 0.25"),
    ("false_boxes_per_scene", "false boxes a scene at confidence 0.25"),
    ("false_boxes_per_empty_scene", "false boxes a scene without shapes"),
    ("median_confidence", "median confidence of true boxes"),
    ("share_above_half_confidence", "true boxes above confidence 0.5"),
    ("scenes", "scenes"),
    ("objects", "shapes"),
)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def detector_table(measured: dict[str, dict[str, float]]) -> str:
    """One row a figure, one column a source of scenes."""
    sources = list(measured)
    rows = []
    for key, title in DETECTOR_ROWS:
        values = [measured[source][key] for source in sources]
        rows.append([title, *(str(value) for value in values)])
    return _table(["", *sources], rows)


def describer_table(measured: dict[str, dict[str, Any]]) -> str:
    """One row a question kind and language, one column a source of scenes with or without detected objects."""
    sources = list(measured)

    def shown(source: str, group: str, name: str) -> str:
        rate = measured[source][group].get(name)
        return "-" if rate is None else f"{rate:.3f}"

    rows = []
    for kind in KINDS:
        for language in LANGUAGES:
            rates = [shown(source, "exact_by_kind", f"{kind} {language}") for source in sources]
            rows.append([f"{kind} ({language})", *rates])
    for amount in range(MAX_SHAPES + 1):
        rates = [shown(source, "exact_by_shapes", str(amount)) for source in sources]
        rows.append([f"pictures with {amount}", *rates])
    rows.append(["**all**", *(f"**{measured[source]['exact']:.3f}**" for source in sources)])
    rows.append(["questions", *(str(measured[source]["questions"]) for source in sources)])
    return _table(["exact answers", *sources], rows)


def figures(report: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    return "\n\n".join(
        [
            f"Seed {report['seed']}, far from every training seed.",
            "**Detector**",
            detector_table(report["detector"]),
            "**Describer**",
            describer_table(report["describer"]),
        ]
    )


def main() -> None:
    """Replace what stands between the two marks of the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=WEIGHTS / "evaluation.json", help="written by evaluate.py")
    parser.add_argument("--card", type=Path, default=WEIGHTS / "MODEL_CARD.md")
    arguments = parser.parse_args()
    before, rest = arguments.card.read_text().split(BEGIN)
    _, after = rest.split(END)
    tables = figures(json.loads(arguments.report.read_text()))
    arguments.card.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")


if __name__ == "__main__":
    main()
