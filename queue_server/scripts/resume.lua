-- A queue's jobs are handed out again. Answers how many were sent now, at most a.limit: then there may be more.
even_when_full()
redis.call('SREM', key('paused'), a.queue)
local sent = 0
for _, client in ipairs(redis.call('ZRANGE', key('q', a.queue, 'clients'), 0, -1)) do
  sent = sent + release_held(a.queue, client, a.limit - sent)
  if sent >= a.limit then break end
end
return sent
