-- What became of a try to tell a job's end: a.outcome is 'delivered', 'failed' (again after a.delay_ms) or 'given_up'; a.error: a base64
-- Status. A failure counts only for who took it last (a.take); what was delivered was. Nothing counts for an end that a retry by hand has
-- undone (a.rev). Answers {the outcome, tries made}; a failure whose next try would come too late is 'given_up'; or {'refused', 0}.
even_when_full()
local id, hooks = a.job_id, key('hooks')
local job = load(id, 'rev', 'hook_take', 'hook_ms', 'expire_ms')
if not job or tonumber(job.rev) ~= a.rev or job.hook_ms ~= '' then return {'refused', 0} end
local outcome = a.outcome
if outcome ~= 'delivered' and tonumber(job.hook_take) ~= a.take then return {'refused', 0} end
if outcome == 'failed' and now + a.delay_ms >= tonumber(job.expire_ms) then outcome = 'given_up' end
local tries = redis.call('HINCRBY', key('job', id), 'hook_n', 1)
if outcome == 'delivered' then
  redis.call('HSET', key('job', id), 'hook_ms', int(now))
  redis.call('HDEL', key('job', id), 'hook_error')
else
  redis.call('HSET', key('job', id), 'hook_error', a.error)
end
if outcome == 'failed' then
  redis.call('ZADD', hooks, now + a.delay_ms, id)
else
  redis.call('HDEL', key('job', id), 'hook_take')
  redis.call('ZREM', hooks, id)
end
redis.call('HINCRBY', key('hooks', 'n'), outcome, 1)
return {outcome, tries}
