"""Loads the Lua scripts, one for each transition of a job, each put behind record.lua."""

from __future__ import annotations

from importlib.resources import files

NAMES = (
    *("submit", "claim", "renew", "finish", "redispatch", "cancel", "delete", "beat"),
    *("retry", "pause", "resume", "purge", "sweep_held"),
    *("touch_media", "store_media", "begin_object", "sweep_objects"),
    *("hooks_take", "hooks_settle"),
    *("sweep_due", "sweep_lost", "sweep_expired", "sweep_overdue", "sweep_forgotten"),
)


def load_all() -> dict[str, str]:
    """The source of every script by its name, ready for EVAL with KEYS[1] = keys.TAG and ARGV[1] = JSON."""
    folder = files(__name__)
    prelude = (folder / "record.lua").read_text("utf-8")
    return {name: prelude + (folder / f"{name}.lua").read_text("utf-8") for name in NAMES}
