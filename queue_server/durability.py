"""What Redis' own settings promise about the jobs it has accepted, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What CONFIG GET is asked for. It may be forbidden, to us (ACL) or to everybody (managed services): then only INFO tells.
WANTED = ("appendfsync", "save")


@dataclass(frozen=True)
class Durability:
    """`promise`: what is kept when Redis' machine loses power. `warning`: what the operator should change; empty: nothing."""

    promise: str
    warning: str = ""


def judge(info: Mapping[str, Any], config: Mapping[str, str] | None) -> Durability:
    """Reads INFO, and CONFIG GET of WANTED; None: it is not known."""
    if not int(info.get("aof_enabled", 0)):
        return _without_log(None if config is None else config.get("save", ""))
    if str(info.get("aof_last_write_status", "ok")) != "ok":
        return Durability(
            "nothing new is on disk: its append-only file cannot be written",
            "Redis cannot write its append-only file (aof_last_write_status). See to its disk.",
        )
    match None if config is None else config.get("appendfsync"):
        case "always":
            return Durability("a power loss loses nothing (appendfsync always)")
        case "everysec":
            return Durability("a power loss loses at most the last second (appendfsync everysec)")
        case "no":
            return Durability(
                "a power loss may lose half a minute (appendfsync no)",
                "The system decides when jobs reach the disk. Set `appendfsync everysec`, or `always` to lose nothing.",
            )
        case _:
            return Durability(
                "a power loss loses at most the last seconds (appendonly yes; appendfsync cannot be read)"
            )


def _without_log(save: str | None) -> Durability:
    cure = "Set `appendonly yes` and `appendfsync everysec` (or `always`)."
    if save is None:
        return Durability(
            "unknown: no append-only file, snapshots cannot be read",
            f"Redis writes no append-only file: a crash loses the jobs since its last snapshot, or all of them. {cure}",
        )
    if save:
        return Durability(
            "a crash loses every job since the last snapshot (no append-only file)",
            f"Redis keeps only snapshots (save {save}): a crash loses the jobs since the last one. {cure}",
        )
    return Durability(
        "a crash loses every job (nothing is on disk)",
        f"Redis keeps nothing on disk: when it stops, every job is lost. {cure}",
    )
