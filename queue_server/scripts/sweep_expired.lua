-- SCHEDULED | QUEUED → EXPIRED: those whose deadline has passed. Answers {{id, request_id, trace}, …}, at most a.limit.
even_when_full()
local moved = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('deadlines'), '-inf', now, 'LIMIT', 0, a.limit)) do
  local job = load(id)
  if job and WAITS[job.state] then
    conclude(job, 'EXPIRED', {error = a.expired})
    moved[#moved + 1] = {id, job.request_id, job.trace}
  end
  redis.call('ZREM', key('deadlines'), id)
end
return moved
