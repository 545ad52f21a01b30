-- Sends held jobs for which there is room: after a resume of very many, after a change of the settings. Answers how many.
even_when_full()
local sent = 0
for _, queue in ipairs(redis.call('SMEMBERS', key('queues'))) do
  if tonumber(redis.call('HGET', key('q', queue, 'n'), 'HELD') or 0) > 0 and redis.call('SISMEMBER', key('paused'), queue) == 0 then
    for _, client in ipairs(redis.call('ZRANGE', key('q', queue, 'clients'), 0, -1)) do
      sent = sent + release_held(queue, client, a.limit - sent)
      if sent >= a.limit then return sent end
    end
  end
end
return sent
