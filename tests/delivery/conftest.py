"""What tests of delivery share."""

from __future__ import annotations

from tests.delivery.fleet import fleet
from tests.delivery.queues import queue_side

__all__ = ["fleet", "queue_side"]
