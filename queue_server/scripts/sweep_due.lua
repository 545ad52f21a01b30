-- SCHEDULED → QUEUED: those whose time has come. Answers {{id, request_id, trace}, …}, at most a.limit.
even_when_full()
local moved = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('delayed'), '-inf', now, 'LIMIT', 0, a.limit)) do
  local job = load(id)
  if job and job.state == 'SCHEDULED' then
    change(id, {state = 'QUEUED'})
    move(job, 'QUEUED')
    dispatch(job, nil)
    moved[#moved + 1] = {id, job.request_id, job.trace}
  end
  redis.call('ZREM', key('delayed'), id)
end
return moved
