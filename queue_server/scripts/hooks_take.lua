-- Takes ended jobs whose webhook is due, until a.lease_ms from now: unless they are settled by then, any server may take them again.
-- A receiver is a URL's beginning up to its host and port. a.sending: what is under way, by receiver; one with a.per_receiver gets no
-- more. a.resting: receivers that have just failed, with the ms for which their webhooks are put off. Answers {record, …}, at most a.limit.
even_when_full()
local hooks = key('hooks')
local taken, passed, seen = {}, 0, 0
-- What a receiver that is busy leaves at the head is passed over; after so many there is another time.
while #taken < a.limit and seen < 1000 do
  local due = redis.call('ZRANGEBYSCORE', hooks, '-inf', now, 'LIMIT', passed, 100)
  if #due == 0 then break end
  for _, id in ipairs(due) do
    seen = seen + 1
    local job = load(id, 'hook')
    if not job or job.hook == '' or WAITS[job.state] or job.state == 'RUNNING' then
      redis.call('ZREM', hooks, id)
    else
      local receiver = string.match(job.hook, '^[^/]*//[^/?#]*') or ''
      local under_way = a.sending[receiver] or 0
      if a.resting[receiver] then
        redis.call('ZADD', hooks, now + a.resting[receiver], id)
      elseif under_way >= a.per_receiver or #taken >= a.limit then
        passed = passed + 1
      else
        a.sending[receiver] = under_way + 1
        redis.call('ZADD', hooks, now + a.lease_ms, id)
        redis.call('HINCRBY', key('job', id), 'hook_take', 1)
        taken[#taken + 1] = redis.call('HGETALL', key('job', id))
      end
    end
  end
end
return taken
