"""What is written into Redis: Dramatiq's own layout, the names of keys.py, the constants that scripts and Python share."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import dramatiq
import redis

from queue_server import jobs, keys, scripts, statistics
from queue_server.actors import QUEUE, build_broker, declare_actor
from queue_server.jobs import Priority
from tests.queue_server.conftest import Front


async def test_our_messages_are_laid_out_as_dramatiqs_own(front: Front, redis_client: redis.Redis) -> None:
    # Given a job that our script has queued
    job = await front.submit()
    assert redis_client.lrange(keys.dramatiq_list("standard"), 0, -1) == [f"{job.job_id}.1".encode()]
    (ours,) = redis_client.hvals(keys.dramatiq_messages("standard"))
    redis_client.delete(keys.dramatiq_list("standard"), keys.dramatiq_messages("standard"))
    # When Dramatiq itself sends the same message through its own broker to a queue of that name
    broker = dramatiq.brokers.redis.RedisBroker(client=redis_client, namespace=keys.DRAMATIQ_NAMESPACE, middleware=[])
    broker.declare_queue("standard")
    sent = broker.enqueue(dramatiq.Message("standard", "run", (job.job_id, 1), {}, {"priority": "standard"}))
    # Then the same keys have come about, with the same fields of the same types
    number = sent.options["redis_message_id"]
    assert redis_client.lrange(keys.dramatiq_list("standard"), 0, -1) == [number.encode()]
    theirs = json.loads(redis_client.hget(keys.dramatiq_messages("standard"), number))
    mine = json.loads(ours)
    assert {name: type(value) for name, value in mine.items()} == {name: type(value) for name, value in theirs.items()}
    assert mine["args"] == theirs["args"] and mine["actor_name"] == theirs["actor_name"] and mine["kwargs"] == {}
    assert mine["options"].keys() == theirs["options"].keys()
    assert abs(mine["message_timestamp"] - theirs["message_timestamp"]) < 60_000
    assert mine["queue_name"] == QUEUE
    # And Dramatiq reads ours
    message = dramatiq.Message.decode(ours)
    assert message.args == (job.job_id, 1) and message.message_id == f"{job.job_id}.1"


async def test_the_consumer_takes_the_first_priority_first_and_no_more_than_it_may(front: Front, redis_client) -> None:
    for priority in (3, 2, 1, 1):
        await front.submit(priority=priority)
    broker = build_broker(redis_client)
    declare_actor(broker, lambda job_id, dispatch_no: None)
    consumer = broker.consume(QUEUE, prefetch=3, timeout=10)
    taken = [next(consumer) for _ in range(4)]
    assert [message and message.options["priority"] for message in taken] == [
        "interactive",
        "interactive",
        "standard",
        None,
    ]
    # And what it has not handed on goes back to its list
    consumer.ack(taken[0])
    consumer.requeue([taken[2]])
    consumer.close()
    assert [redis_client.llen(keys.dramatiq_list(priority)) for priority in Priority] == [0, 1, 1]
    assert redis_client.hlen(keys.dramatiq_messages("interactive")) == 1
    # And Dramatiq's own notes of what is in hand, which its script has made, know of the one that is left
    (notes,) = redis_client.keys("{vq}:d:__acks__.*")
    assert redis_client.smembers(notes) == {taken[1].options["redis_message_id"].encode()}


async def test_every_key_has_a_name_of_keys_py(front: Front, start_worker, redis_client: redis.Redis) -> None:
    await start_worker()
    await front.end((await front.submit(b"ok", request_id="mine")).job_id)
    text = files("queue_server").joinpath("keys.py").read_text("utf-8")
    known = [re.escape(name) for name in re.findall(r"\{vq\}[^\s,]*", text)] + [
        r"\{vq\}:job:<id>:(ev|work|res|media|files|base)"
    ]
    patterns = [re.compile(re.sub("<[a-z_]+>", "[^ ]*", name).replace("…", ".+")) for name in known]
    patterns += [re.compile(r"\{vq\}:(idx:(all|state:.+|queue:.+|client:.*)|q:.+|blob:.+)")]
    for key in redis_client.keys("*"):
        assert any(pattern.fullmatch(key.decode()) for pattern in patterns), key
    assert keys.job("x").startswith("{vq}:") and keys.DRAMATIQ_NAMESPACE == "{vq}:d"


def test_scripts_and_python_share_their_constants() -> None:
    text = scripts.load_all()["claim"]
    assert int(re.search(r"local ATTEMPTS = (\d+)", text)[1]) == jobs.MAX_ATTEMPTS_KEPT
    assert int(re.search(r"local SLOT_S = (\d+)", text)[1]) == keys.SLOT_S
    bounds = re.search(r"local BUCKETS_S = \{(.+?)\}", text)[1].split(",")
    assert tuple(float(bound) for bound in bounds) == statistics.BUCKETS_S
    # Every script is loaded, and none beginning with a write that takes memory can be refused but what brings more
    names = {path.name.removesuffix(".lua") for path in files(scripts).iterdir() if path.name.endswith(".lua")}
    assert names == {*scripts.NAMES, "record"}
    for name, source in scripts.load_all().items():
        body = source.removeprefix(files(scripts).joinpath("record.lua").read_text("utf-8"))
        assert ("even_when_full()" in body) == (name not in ("submit", "retry", "touch_media", "begin_object")), name
