-- QUEUED → RUNNING: the worker's, once for each dispatch number. The same claim_id again gets the same attempt again.
-- Answers {'claimed', record, work}, or {'gone' | 'stale' | 'paused'}, or {'expired', request_id, trace}.
even_when_full()
local id = a.job_id
local job = load(id, 'dispatch', 'claim', 'attempt', 'spent', 'deadline_ms', 'sent_ms')
if not job then return {'gone'} end
if job.state == 'RUNNING' and job.claim == a.claim_id then
  return {'claimed', redis.call('HGETALL', key('job', id)), redis.call('GET', key('job', id, 'work'))}
end
if job.state ~= 'QUEUED' or job.held == '1' or tonumber(job.dispatch) ~= a.dispatch_no then return {'stale'} end
if tonumber(job.deadline_ms) > 0 and tonumber(job.deadline_ms) <= now then
  conclude(job, 'EXPIRED', {error = a.expired})
  return {'expired', job.request_id, job.trace}
end
if redis.call('SISMEMBER', key('paused'), job.queue) == 1 then
  unlist(job)
  hold(job, tonumber(job.sent_ms))
  return {'paused'}
end
local attempt = tonumber(job.attempt) + 1
redis.call('HSET', key('job', id), 'claim', a.claim_id)
local fields = {
  state = 'RUNNING', attempt = int(attempt), spent = int(tonumber(job.spent) + 1), started_ms = int(now), worker = a.worker,
  done = '0', msg = '',
  ['att:' .. attempt] = cjson.encode({now, 0, a.worker, ''}),
}
if attempt > ATTEMPTS then fields['att:' .. (attempt - ATTEMPTS)] = '' end
change(id, fields)
observe(job, 'wait', now - tonumber(redis.call('ZSCORE', key('q', job.queue, 'wait'), id) or now))
withdraw(job)
redis.call('ZREM', key('deadlines'), id)
redis.call('ZADD', key('leases'), now + a.lease_ms, id)
move(job, 'RUNNING')
release_held(job.queue, job.client, a.share.window)
redis.call('HINCRBY', key('q', job.queue, 'n'), 'attempts:' .. job.kind, 1)
return {'claimed', redis.call('HGETALL', key('job', id)), redis.call('GET', key('job', id, 'work'))}
