-- RUNNING → QUEUED | FAILED | CANCELLED: those whose worker has not renewed its lease. a.errors: a Status for each worker's name.
-- Answers {{id, request_id, trace, state, worker}, …}; a worker that a.errors lacks is answered with the state 'UNKNOWN', unmoved.
even_when_full()
local moved = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('leases'), '-inf', now, 'LIMIT', 0, a.limit)) do
  local job = load(id, 'attempt', 'spent', 'max_attempts', 'cancel', 'started_ms', 'worker', 'deadline_ms')
  if not job or job.state ~= 'RUNNING' then
    redis.call('ZREM', key('leases'), id)
  elseif not a.errors[job.worker] then
    moved[#moved + 1] = {id, job.request_id, job.trace, 'UNKNOWN', job.worker}
  else
    count_attempt(job, 'lost', job.started_ms)
    local failure = a.errors[job.worker]
    local fields = attempt_fields(job.attempt, job.started_ms, job.worker, failure)
    local state = 'QUEUED'
    if job.cancel == '1' then
      state = 'CANCELLED'
    elseif tonumber(job.spent) >= tonumber(job.max_attempts) then
      state = 'FAILED'
      fields.error = failure
    end
    if state == 'QUEUED' then
      fields.state = state
      change(id, fields)
      redis.call('ZREM', key('leases'), id)
      move(job, 'QUEUED')
      if tonumber(job.deadline_ms) > 0 then redis.call('ZADD', key('deadlines'), job.deadline_ms, id) end
      dispatch(job, nil)
      release_held(job.queue, job.client, a.share.window)
    else
      conclude(job, state, fields)
    end
    moved[#moved + 1] = {id, job.request_id, job.trace, state, job.worker}
  end
end
return moved
