-- SCHEDULED | QUEUED → CANCELLED: the jobs of a queue that wait and were submitted before a.before_ms (0: now).
-- Answers {the time taken for now, {{id, request_id, trace}, …}}, at most a.limit: then there may be more. {-1, {}}: no such queue.
even_when_full()
if redis.call('SISMEMBER', key('queues'), a.queue) == 0 then return {'-1', {}} end
local before = a.before_ms > 0 and a.before_ms or now
local ids = redis.call('ZRANGEBYSCORE', key('q', a.queue, 'wait'), '-inf', before, 'LIMIT', 0, a.limit)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('q', a.queue, 'later'), '-inf', before, 'LIMIT', 0, a.limit)) do ids[#ids + 1] = id end
local moved = {}
a.quiet = true -- none of them is to be sent in the place of another
for _, id in ipairs(ids) do
  local job = load(id)
  if job and WAITS[job.state] then
    conclude(job, 'CANCELLED', {cancel = '1'})
    moved[#moved + 1] = {id, job.request_id, job.trace}
  end
end
return {int(before), moved}
