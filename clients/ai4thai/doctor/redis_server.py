"""Does Redis answer, let us in, and keep what it has accepted?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from ai4thai.doctor.findings import Finding, Level, Situation, gigabytes
from ai4thai.doctor.servers import ask_health, base_url

DEFAULT_PORT: Final = 6379
LEAST_VERSION: Final = (6, 2)
FULL_SHARE: Final = 0.9
"""Of maxmemory: from here on submissions are refused, where QUEUE_MAX_MEMORY_SHARE says nothing else."""
_SOON_FULL: Final = 0.83
"""Of that share: from here on it is time to do something."""
_ASK_S = 2.0
_KEEP = "In redis.conf, or by CONFIG SET and CONFIG REWRITE: "


class NoPackage(Exception):
    """Python has no redis here: an image that does not talk to Redis."""


def redis_url(situation: Situation) -> str:
    """Where the queue server and the workers would look."""
    return situation.secret("REDIS_URL") or f"redis://127.0.0.1:{situation.port('REDIS_PORT', DEFAULT_PORT)}/0"


def shown(url: str) -> str:
    """The address without user, password and options."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def open_redis(situation: Situation) -> Any:
    """A client for it, with times of a person's patience.

    Raises:
        NoPackage: Python has no redis here.
        ValueError: REDIS_URL cannot be read.
    """
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
        from redis.sentinel import Sentinel
    except ImportError:
        raise NoPackage from None
    url = redis_url(situation)
    once = Retry(NoBackoff(), 0)
    times: dict[str, Any] = {
        "socket_timeout": _ASK_S,
        "socket_connect_timeout": _ASK_S,
        "retry": once,
        "decode_responses": True,
    }
    parts = urlsplit(url)
    if (password := situation.secret("REDIS_PASSWORD")) and ":" not in parts.netloc.rpartition("@")[0]:
        times["password"] = password
    if not parts.scheme.endswith("+sentinel"):
        return redis.Redis.from_url(url, **times)
    userinfo, _, hosts = parts.netloc.rpartition("@")
    user, _, inline = userinfo.partition(":")
    times |= {name: unquote(text) for name, text in (("username", user), ("password", inline)) if text}
    options = dict(parse_qsl(parts.query))
    own = {name: options[f"sentinel_{name}"] for name in ("username", "password") if f"sentinel_{name}" in options}
    addresses = [urlsplit(f"//{place}") for place in hosts.split(",")]
    places = [(address.hostname or "", address.port or 26379) for address in addresses]
    bounds: dict[str, Any] = {"socket_timeout": 0.5, "socket_connect_timeout": 0.5, "retry": once}
    if parts.scheme.startswith("rediss") or options.get("ssl", "") in ("true", "yes", "1"):
        secured = {"ssl": True, **{name: value for name, value in options.items() if name.startswith("ssl_")}}
        bounds |= secured
        times |= secured
    sentinel: Any = Sentinel(places, sentinel_kwargs={**own, **bounds})  # type: ignore[no-untyped-call]
    return sentinel.master_for(parts.path.strip("/").partition("/")[0], **times)


def check_redis(situation: Situation) -> Iterator[Finding]:
    """Reachable, the right password, a version that will do, and what its settings promise of the jobs."""
    url = redis_url(situation)
    try:
        client = open_redis(situation)
    except NoPackage:
        yield Finding("redis", Level.NOTE, "not asked: nothing in this environment talks to Redis")
        return
    except ValueError:
        yield Finding(
            "redis",
            Level.FAILURE,
            "REDIS_URL cannot be read",
            "In a password write %40 for @, %3A for :, %2F for /; or leave it out, and set REDIS_PASSWORD. Forms: docs/queue.md",
        )
        return
    import redis

    with closing(client):
        try:
            info: Mapping[str, Any] = client.info()
        except redis.AuthenticationError as error:
            yield _refused(situation, url, error)
            return
        except redis.TimeoutError as error:
            if "connecting" in str(error):  # redis-py has one class for both
                yield _unreached(situation, url, error)
                return
            cure = "Is its machine out of memory, or its disk full or stuck? Then: docker compose restart redis"
            yield Finding("redis", Level.FAILURE, f"{shown(url)} takes connections, but does not answer: {error}", cure)
            return
        except redis.ConnectionError as error:
            yield _unreached(situation, url, error)
            return
        except redis.RedisError as error:
            level = Level.WARNING if "LOADING" in str(error) else Level.FAILURE
            cure = (
                "Wait, it reads its files."
                if level is Level.WARNING
                else "docs/queue.md has the rights that a user needs."
            )
            yield Finding("redis", level, f"{shown(url)} answers: {error}", cure)
            return
        version = str(info.get("valkey_version") or info.get("redis_version", "?"))
        yield _judge_version(url, version, info)
        yield from _judge_role(info)
        try:
            settings = {
                name: value
                for wanted in ("maxmemory-policy", "appendfsync", "save")
                for name, value in client.config_get(wanted).items()
            }
        except redis.RedisError:  # forbidden, as with many managed services: INFO alone tells
            settings = {}
    yield from _judge_memory(info, settings, _full_share(situation))
    yield from _judge_disk(info, settings)


def _refused(situation: Situation, url: str, error: Exception) -> Finding:
    has_one = "@" in urlsplit(url).netloc or situation.secret("REDIS_PASSWORD")
    found = "the password is wrong" if has_one else "it wants a password, and none is set"
    return Finding(
        "redis",
        Level.FAILURE,
        f"{shown(url)}: {found} ({error})",
        "Set REDIS_PASSWORD, or its file redis_password among the secrets, to what Redis was started with; then restart.",
    )


def _unreached(situation: Situation, url: str, error: Exception) -> Finding:
    words = re.sub(r"\s+", " ", str(error)).partition(" : <")[0]  # every sentinel follows, with all its options
    cure = 'Is it started (docker compose ps redis), and REDIS_URL right? From here: redis-cli -u "$REDIS_URL" ping'
    if not situation.secret("REDIS_URL"):
        # With compose Redis is not published: what the queue server says of it counts more than what can be reached from here.
        base = base_url(situation.queue)
        said = ask_health(base).health.get("checks", {}).get("redis", {}).get("status") if base else None
        if said in ("OK", "WARNING"):
            found = f"{shown(url)}: nothing answers here; the queue server at {situation.queue} reaches its own"
            return Finding("redis", Level.NOTE, found)
        is_meant = "redis" in situation.asked or situation.env.get("REDIS_PORT") or situation.secret("REDIS_PASSWORD")
        if said is None and not is_meant:
            return Finding("redis", Level.NOTE, f"{shown(url)}: nothing answers; ai4thai up brings its own")
        cure = "Start it (ai4thai up; docker compose up -d redis; docker compose ps redis), or set REDIS_URL to where it is."
    return Finding("redis", Level.FAILURE, f"{shown(url)}: {words}", cure)


def _judge_version(url: str, version: str, info: Mapping[str, Any]) -> Finding:
    name = "Valkey" if "valkey_version" in info else "Redis"
    # Valkey tells the version of Redis that it stands for, too.
    numbers = tuple(int(part) for part in re.findall(r"\d+", str(info.get("redis_version", "0")))[:2])
    if numbers < LEAST_VERSION:
        return Finding(
            "redis", Level.FAILURE, f"{shown(url)}: {name} {version} is too old", "Redis 6.2 or newer, or Valkey."
        )
    return Finding("redis", Level.OK, f"{shown(url)}: {name} {version}, up for {info.get('uptime_in_days', 0)} days")


def _judge_role(info: Mapping[str, Any]) -> Iterator[Finding]:
    if info.get("role") == "slave":
        yield Finding(
            "redis",
            Level.FAILURE,
            f"it is a replica of {info.get('master_host')}:{info.get('master_port')}, which takes no jobs",
            "Let REDIS_URL name the master, or the sentinels: redis+sentinel://h1:26379,h2:26379/mymaster/0",
        )


def _full_share(situation: Situation) -> float:
    """The share of maxmemory from which on the queue server refuses; one that it would not start with is told by itself."""
    try:
        share = float(situation.env.get("QUEUE_MAX_MEMORY_SHARE", ""))
    except ValueError:
        return FULL_SHARE
    return share if 0 < share <= 1 else FULL_SHARE


def _judge_memory(info: Mapping[str, Any], settings: Mapping[str, str], full_share: float) -> Iterator[Finding]:
    policy = settings.get("maxmemory-policy") or str(info.get("maxmemory_policy", "?"))
    if policy not in ("noeviction", "?"):
        yield Finding(
            "redis",
            Level.FAILURE,
            f"maxmemory-policy is {policy}: it would delete accepted jobs, and the queue server refuses to work with it",
            f"{_KEEP}maxmemory-policy noeviction",
        )
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if not most:
        yield Finding(
            "redis",
            Level.WARNING,
            f"{gigabytes(used)} used, and no maxmemory: it grows until the machine has no more",
            f"{_KEEP}maxmemory 4gb (what the machine has left)",
        )
        return
    told = f"{gigabytes(used)} of {gigabytes(most)} used ({used / most:.0%}), {policy}"
    cure = "More maxmemory; more workers; QUEUE_MEDIA_URL for files; ai4thai queue purge NAME throws waiting jobs away."
    if used >= most * full_share:
        yield Finding("redis", Level.FAILURE, f"{told}: new jobs are refused", cure)
    elif used >= most * full_share * _SOON_FULL:
        yield Finding("redis", Level.WARNING, f"{told}: at {full_share:.0%} new jobs are refused", cure)
    elif policy in ("noeviction", "?"):
        yield Finding("redis", Level.OK, told)


def _judge_disk(info: Mapping[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    if info.get("aof_last_write_status", "ok") != "ok" or info.get("aof_last_bgrewrite_status", "ok") != "ok":
        yield Finding(
            "redis",
            Level.FAILURE,
            "it cannot write its append-only file",
            "See to its disk: df -h, its log; then it goes on.",
        )
    elif not int(info.get("aof_enabled", 0)):
        snapshots = settings.get("save", "?")
        what = (
            "only snapshots" if snapshots not in ("", "?") else "nothing" if snapshots == "" else "no append-only file"
        )
        yield Finding(
            "redis",
            Level.WARNING,
            f"appendonly is no: it keeps {what} on disk, and a crash loses accepted jobs",
            f"{_KEEP}appendonly yes, appendfsync everysec",
        )
    elif (pace := settings.get("appendfsync", "?")) == "no":
        yield Finding(
            "redis",
            Level.WARNING,
            "appendfsync is no: a power loss may lose half a minute",
            f"{_KEEP}appendfsync everysec, or always to lose nothing",
        )
    else:
        yield Finding("redis", Level.OK, f"append-only file on, appendfsync {pace}")
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        yield Finding(
            "redis",
            Level.FAILURE,
            "its last snapshot failed; with stop-writes-on-bgsave-error it refuses every write (MISCONF)",
            "See to its disk and memory (vm.overcommit_memory=1), then: redis-cli BGSAVE",
        )
