"""How a list of detected objects is put in front of a question."""

from collections import Counter
from collections.abc import Sequence


def ground(question: str, labels: Sequence[str]) -> str:
    """Return the question with what a detector found before it.

    Labels are counted and sorted by name, so the same picture always gives the same text; an empty list says
    "none", because "the detector ran and found nothing" also helps to answer.
    """
    counts = Counter(labels)
    found = ", ".join(f"{counts[label]} {label}" for label in sorted(counts)) or "none"
    return f"Detected objects: {found}.\n{question}"
