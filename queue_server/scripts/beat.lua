-- A worker lives: what it is, how much it may do, what it is at.
even_when_full()
local record = key('worker', a.worker)
redis.call('HSET', record, 'concurrency', int(a.concurrency), 'start_ms', int(a.start_ms), 'seen_ms', int(now), 'jobs', a.jobs,
  'ended', int(a.ended))
redis.call('PEXPIRE', record, a.alive_ms)
redis.call('ZADD', key('workers'), now, a.worker)
redis.call('ZREMRANGEBYSCORE', key('workers'), '-inf', '(' .. int(now - a.alive_ms))
return 1
