-- A stored file is used: it lives on for at least its first lifetime.
-- Answers for each of a.media {size, type, object, when its lifetime ends (0: a job needs it)}, or {} when it is not stored.
local found = {}
for i, media in ipairs(a.media) do
  local file = key('media', media)
  local left_ms = redis.call('PTTL', file)
  if left_ms == -2 then
    found[i] = {}
  else
    left_ms = renew_file(media, left_ms, a.first_ms)
    local values = redis.call('HMGET', file, 'size', 'type', 'object')
    found[i] = {values[1], values[2] or '', values[3] or '', left_ms < 0 and '0' or int(now + left_ms)}
  end
end
return found
