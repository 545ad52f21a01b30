-- Forgets the jobs whose lifetime has passed. Answers {{id, request_id, trace}, …}, at most a.limit.
even_when_full()
local moved = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('ended'), '-inf', now, 'LIMIT', 0, a.limit)) do
  local job = load(id)
  if job then
    forget(id, job)
    moved[#moved + 1] = {id, job.request_id, job.trace}
  else
    redis.call('ZREM', key('ended'), id)
  end
end
return moved
