"""Writes the measured figures into the model card."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vision_server.shapes.patch_truth import MAX_SHAPES
from vision_server.shapes.questions import KINDS, LANGUAGES
from vision_server.shapes.scenes import LABELS

WEIGHTS = Path(__file__).parent / "weights"
BEGIN, END = "<!-- figures: written by card_tables.py -->", "<!-- end of figures -->"

# The report's name of what finds shapes, its title, what is compared.
FINDERS = (
    ("detector", "Detector", "boxes"),
    ("segmenter", "Segmenter", "masks"),
    ("oriented", "Oriented boxes", "turned boxes"),
    ("pose", "Pose", "named points, half right at 0.17 of the shape's side"),
    ("pose_exact", "Pose, twice as exact", "named points, half right at 0.09 of the shape's side"),
)
FINDER_ROWS = (
    ("map50", "mAP50"),
    ("map50_95", "mAP50-95"),
    ("recall", "recall at confidence 0.25"),
    ("median_agreement", "median agreement of what was found with the truth"),
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


CLASSIFIER_ROWS = (
    ("top1", "first class right"),
    *((f"top1_{label}", f"first class right, {label}") for label in LABELS),
    ("median_confidence", "median confidence"),
    ("scenes", "pictures"),
)


def figures_table(measured: dict[str, dict[str, float]], shown: Sequence[tuple[str, str]]) -> str:
    """One row a figure, one column a source of scenes."""
    rows = [[title, *(str(figures[key]) for figures in measured.values())] for key, title in shown]
    return _table(["", *measured], rows)


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


def quantized_table(measured: dict[str, dict[str, Any]]) -> str:
    """One column a quantization: exact answers by question kind and language, memory, speed."""
    shown = measured.values()
    rows = [
        [f"{kind} ({language})", *(f"{one['exact_by_kind'][f'{kind} {language}']:.3f}" for one in shown)]
        for kind in KINDS
        for language in LANGUAGES
    ]
    rows.append(["**all**", *(f"**{one['exact']:.3f}**" for one in shown)])
    rows.append(["questions", *(str(one["questions"]) for one in shown)])
    rows.append(["memory of the weights", *(f"{one['memory_bytes'] / 1e6:.1f} MB" for one in shown)])
    rows.append(["tokens a second of one CPU core", *(f"{one['tokens_per_cpu_second']:.0f}" for one in shown)])
    return _table(["exact answers", *measured], rows)


def figures(report: dict[str, Any]) -> str:
    """All tables as Markdown."""
    parts = [f"Seed {report['seed']}, far from every training seed."]
    for name, title, compared in FINDERS:
        parts += [f"**{title}**: {compared}", figures_table(report[name], FINDER_ROWS)]
    parts += ["**Classifier**", figures_table(report["classifier"], CLASSIFIER_ROWS)]
    parts += ["**Describer**", describer_table(report["describer"])]
    parts += ["**Describer, quantized**: on a CPU", quantized_table(report["describer_quantized"])]
    return "\n\n".join(parts)


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
