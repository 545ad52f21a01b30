-- Takes ended jobs whose webhook is due, until a.lease_ms from now: unless they are settled by then, any server may take them again.
-- A receiver is a URL's beginning up to its host and port. a.taken: what this server has in hand, by receiver; one with a.per_receiver
-- gets no more. a.resting: receivers that have just failed, with the ms for which their webhooks are put off. Answers {record, …}, at
-- most a.limit.
even_when_full()
local hooks = key('hooks')
local taken, passed, seen = {}, {}, 0
while #taken < a.limit and seen < 1000 do
  local due = redis.call('ZRANGEBYSCORE', hooks, '-inf', now, 'LIMIT', #passed, 100)
  if #due == 0 then break end
  for _, id in ipairs(due) do
    seen = seen + 1
    local receiver = string.match(redis.call('HGET', key('job', id), 'hook') or '', '^[^/]*//[^/?#]*') or ''
    local in_hand = a.taken[receiver] or 0
    if a.resting[receiver] then
      redis.call('ZADD', hooks, now + a.resting[receiver], id)
    elseif in_hand >= a.per_receiver or #taken >= a.limit then
      passed[#passed + 1] = id
    else
      local job = load(id)
      if not job or WAITS[job.state] or job.state == 'RUNNING' then
        redis.call('ZREM', hooks, id)
      else
        a.taken[receiver] = in_hand + 1
        redis.call('ZADD', hooks, now + a.lease_ms, id)
        redis.call('HINCRBY', key('job', id), 'hook_take', 1)
        taken[#taken + 1] = redis.call('HGETALL', key('job', id))
      end
    end
  end
end
-- One receiver's crowd at the head makes way, so that the next look finds those behind it.
if seen >= 1000 and #taken < a.limit then
  for _, id in ipairs(passed) do redis.call('ZADD', hooks, now + 100, id) end
end
return taken
