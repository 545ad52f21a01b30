-- QUEUED → QUEUED: those whose message is in nobody's hands any more (a worker died with it, a broker lost it).
-- Dramatiq's list is first in, first out: who was sent before the list's head was sent, long ago, is not in it.
-- One that a live worker holds without having begun it is sent twice; the first number is stale then. Answers {{id, request_id, trace}, …}.
even_when_full()
local moved = {}
for _, priority in ipairs(a.priorities) do
  local horizon = now - a.overdue_ms
  local head = redis.call('LINDEX', key('d', priority), 0)
  if head then
    local sent = tonumber(redis.call('HGET', key('job', string.match(head, '^[^.]+')), 'sent_ms') or nil)
    if sent and sent < horizon then horizon = sent end
  end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('wait', priority), '-inf', '(' .. int(horizon), 'LIMIT', 0, a.limit)) do
    local job = load(id)
    if job and job.state == 'QUEUED' and job.held ~= '1' then
      list(job, now, false)
      moved[#moved + 1] = {id, job.request_id, job.trace}
    else
      redis.call('ZREM', key('wait', priority), id)
    end
  end
end
return moved
