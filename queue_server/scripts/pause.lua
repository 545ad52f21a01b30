-- A queue's jobs are no longer handed out. Answers 1, or 0 when there are too many queues.
even_when_full()
if redis.call('SISMEMBER', key('queues'), a.queue) == 0 and redis.call('SCARD', key('paused')) >= a.limits.queues then return 0 end
redis.call('SADD', key('paused'), a.queue)
return 1
