-- SCHEDULED | QUEUED → EXPIRED: those whose deadline has passed. Answers {{id, request_id}, …}, at most a.limit.
even_when_full()
local moved = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('deadlines'), '-inf', now, 'LIMIT', 0, a.limit)) do
  local job = load(id, 'kind', 'queue', 'priority', 'request_id', 'created_ms')
  if job and (job.state == 'SCHEDULED' or job.state == 'QUEUED') then
    conclude(id, job, 'EXPIRED', {error = a.expired})
    withdraw(id, job.queue, job.priority)
    moved[#moved + 1] = {id, job.request_id}
  end
  redis.call('ZREM', key('deadlines'), id)
end
return moved
