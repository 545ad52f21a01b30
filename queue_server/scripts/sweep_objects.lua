-- Which objects belong to no file? Those whose writer has fallen silent, and those whose file's lifetime has passed.
-- Answers their names, at most a.limit; each comes again after a.again_ms until it is taken out of the index: `<name> -`.
-- No name is ever used twice, so that nobody can be storing what is deleted here.
even_when_full()
local objects = key('objects')
local dead = {}
for _, member in ipairs(redis.call('ZRANGEBYSCORE', objects, '-inf', now, 'LIMIT', 0, a.limit)) do
  local name, media = string.match(member, '^(%S+) ?(%S*)$')
  local left_ms = -2
  if media ~= '' and media ~= '-' and redis.call('HGET', key('media', media), 'object') == name then
    left_ms = redis.call('PTTL', key('media', media))
  end
  if left_ms == -2 then
    redis.call('ZREM', objects, member)
    redis.call('ZADD', objects, now + a.again_ms, name .. ' -')
    dead[#dead + 1] = name
  else
    redis.call('ZADD', objects, now + (left_ms == -1 and a.pinned_ms or left_ms + 1), member)
  end
end
return dead
